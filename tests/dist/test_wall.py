"""Workers by the wall clock (`runtime.clock=measured`): the same tokens, whatever the times; times that do pass."""

from __future__ import annotations

import time

import pytest

import common.comm.hub
import common.comm.peers
from common.build_local import decoder_spec, parameter_source
from common.comm.hub import Timeouts
from common.comm.worker import start_worker
from common.types import RequestStatus
from tests.deadline import at_most
from tests.dist.pool import nothing_left, own_hub
from tests.dist.stories import BASELINES, STORIES, play, replay
from tests.engine.worlds import check_replies

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


def without_tags(environment: dict[str, str]) -> None:
    """A worker whose messages are told apart by their order alone, as NCCL's are."""
    common.comm.peers.TAGS = 1
    start_worker(environment)


@pytest.mark.parametrize("name", STORIES)
def test_messages_find_their_receivers_without_tags(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(common.comm.hub, "WORKER", without_tags)
    lines: list = []
    hub = own_hub(STORIES[name].instances, Timeouts())
    with nothing_left(hub), at_most(120):
        finished(name, play(STORIES[name], "dist", MEASURED, hub=hub, sink=lines.append), lines)
