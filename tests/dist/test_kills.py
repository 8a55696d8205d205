"""Workers killed with SIGKILL at random moments, under each system: nothing is lost, nothing is told twice, nothing
hangs, nobody is left behind."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from functools import partial

import pytest

from common.build_local import decoder_spec, parameter_source
from common.comm.hub import Hub, Timeouts
from common.comm.peers import KINDS
from common.log import Delivered
from common.types import RequestStatus, StepDone
from tests.deadline import at_most
from tests.dist.pool import after_orders, nothing_left, own_hub
from tests.dist.stories import STORIES, play, replay
from tests.engine.worlds import check_replies
from tests.laws.strategies import NIGHTLY

KILLS = 24 if NIGHTLY else 2  # per system
# About how many orders the policy process gives in each run: the modelled clock repeats it. With a number beyond the
# end nobody would be killed, and the test would say so.
ORDERS = {"kunserve": 1350, "infinite_llm": 880, "memserve": 1160, "mell": 650}
LIMIT_S = 120  # no run may take longer, whatever dies
TIMEOUTS = Timeouts(start_s=60.0, reply_s=60.0, transfer_s=60.0, heartbeat_s=20.0)


def kill(hub: Hub, instance: int) -> None:
    os.kill(hub.processes[instance + 1].pid, signal.SIGKILL)


def survive(name: str, kills: dict[int, int], *more: str) -> None:
    """`kills`: number of orders -> instance whose worker dies then."""
    story = STORIES[name]
    hub = own_hub(story.instances, TIMEOUTS)
    lines = []
    with nothing_left(hub), at_most(LIMIT_S):
        victims = {str(instance) for instance in kills.values()}
        after_orders(hub, {number: partial(kill, hub, instance) for number, instance in kills.items()})
        made = play(story, "dist", *more, hub=hub, sink=lines.append)
        config = story.config("runtime=dist")
        made.executor.world.source = parameter_source(config, decoder_spec(config, made.executor.world.spec.dtype))
        columns = made.record.requests
        ended = (RequestStatus.FINISHED, RequestStatus.REJECTED)
        assert all(status in ended for status in columns.status), "a request is lost"
        assert all(columns.reasons[index] for index, status in enumerate(columns.status)
                   if status == RequestStatus.REJECTED)  # fmt: skip
        check_replies(made.executor)  # whole replies, and those of undisturbed runs
        told = Counter(request_id for line in lines if isinstance(line, Delivered) and isinstance(line.event, StepDone)
                       for request_id in line.event.finished)  # fmt: skip
        finished = {index for index, status in enumerate(columns.status) if status == RequestStatus.FINISHED}
        assert set(told) == finished and set(told.values()) <= {1}, "a request is told twice"
        assert set(made.report["lost_workers"]) == victims
        for kind in KINDS:
            acknowledged, received, sent, ordered = (
                made.report[f"{count}_bytes"][kind] for count in ("acknowledged", "received", "sent", "ordered"))
            assert max(acknowledged, received) <= sent <= ordered, (kind, acknowledged, received, sent, ordered)
        assert replay(story, lines, *more).num_commands == made.record.num_commands
        hub.drain(0.5)
        assert not hub._answers, "answers that nobody will ask for"


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.parametrize("name", STORIES)
def test_a_worker_dies_at_a_random_moment(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    when = rng.randrange(1, ORDERS[name])
    survive(name, {when: rng.randrange(STORIES[name].instances)})


@pytest.mark.skipif(not NIGHTLY, reason="make nightly")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [name for name, story in STORIES.items() if story.instances > 2])
def test_two_workers_die(name: str, seed: int) -> None:
    rng = random.Random(f"two of {name} {seed}")
    instances = rng.sample(range(STORIES[name].instances), 2)
    survive(name, dict(zip(rng.sample(range(1, ORDERS[name]), 2), instances)))


@pytest.mark.skipif(not NIGHTLY, reason="make nightly")
@pytest.mark.parametrize("victims", [(0, 2), (1, 3)], ids=["prefill", "decode"])
def test_a_role_of_memserve_dies_out(victims: tuple[int, int]) -> None:
    """The others take its requests on."""
    survive("memserve", dict(zip((300, 500), victims)))
