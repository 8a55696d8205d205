"""Workers by the wall clock (`runtime.clock=measured`): the same tokens, whatever the times; times that do pass."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from common.build_local import decoder_spec, parameter_source
from common.comm.hub import Timeouts
from common.types import RequestStatus
from tests.dist.pool import after_orders, at_most, nothing_left, own_hub
from tests.dist.stories import BASELINES, STORIES, play, replay
from tests.engine.worlds import check_replies
from tests.laws.strategies import NIGHTLY

MEASURED = "runtime.clock=measured"
NAMES = [*STORIES, "vllm_pp", "infercept"]
SURE = {"kunserve": ("drop", "load", "hidden"), "memserve": ("copy", "cached"), "vllm_pp": ("hidden",)}


def finished(name: str, made, lines: list) -> None:
    """All requests, with the replies of undisturbed runs; the log replays."""
    story = {**STORIES, **BASELINES}[name]
    config = story.config("runtime=dist", MEASURED)
    made.executor.world.source = parameter_source(config, decoder_spec(config, made.executor.world.spec.dtype))
    assert set(made.record.requests.status) == {RequestStatus.FINISHED}
    assert check_replies(made.executor) == sum(made.record.requests.output_tokens) > 0
    assert replay(story, lines, MEASURED).num_commands == made.record.num_commands


@pytest.mark.parametrize("name", NAMES)
def test_a_system_by_the_wall_clock(name: str) -> None:
    lines: list = []
    hub = own_hub(4, Timeouts())
    with nothing_left(hub), at_most(180):
        begin = time.monotonic()
        made = play({**STORIES, **BASELINES}[name], "dist", MEASURED, hub=hub, sink=lines.append)
        passed = time.monotonic() - begin
        finished(name, made, lines)
        assert 0.05 < made.record.end_ns * 1e-9 < passed, "times that did not pass"
        counts = made.counts()
        assert all(counts[kind] > 0 for kind in SURE.get(name, ())), counts
        for kind, ordered in made.report["ordered_bytes"].items():  # copies that were cancelled come all the same
            assert made.report["sent_bytes"][kind] == made.report["received_bytes"][kind] == ordered
            assert made.report["acknowledged_bytes"][kind] <= ordered
        columns = made.record.requests
        assert all(a < f <= e for a, f, e in zip(columns.arrival_ns, columns.first_token_ns, columns.finish_ns))


@pytest.mark.parametrize("name", STORIES if NIGHTLY else ["kunserve", "memserve"])
def test_a_worker_dies_by_the_wall_clock(name: str) -> None:
    lines: list = []
    story, rng = STORIES[name], random.Random(f"wall {name}")
    hub = own_hub(story.instances, Timeouts())
    with nothing_left(hub), at_most(180):
        victim = rng.randrange(story.instances)
        after_orders(hub, {rng.randrange(60, 300): lambda: os.kill(hub.processes[victim + 1].pid, signal.SIGKILL)})
        made = play(story, "dist", MEASURED, hub=hub, sink=lines.append)
        finished(name, made, lines)
        assert list(made.report["lost_workers"]) == [str(victim)]
