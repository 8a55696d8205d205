"""Laws of Infinite-LLM under random events, delays, losses and refusals, in the simulator (which checks every
placement and every count of blocks)."""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.types import RequestStatus
from tests.infinite_llm.worlds import FAST, World, worlds

NIGHTLY = bool(os.environ.get("KVPLANE_NIGHTLY"))
LAW = settings(max_examples=2000 if NIGHTLY else 60, deadline=None, derandomize=not NIGHTLY,
               suppress_health_check=list(HealthCheck))  # fmt: skip


def assert_all_ended(run) -> None:
    status = run.record.requests.status
    reasons = run.record.requests.reasons
    for index in range(len(status)):
        assert status[index] in (RequestStatus.FINISHED, RequestStatus.REJECTED), f"request {index} never ends"
        if status[index] == RequestStatus.REJECTED:
            assert "KV cache" in reasons[index]
    for instance, manager in run.policy.managers.items():
        lane = manager.lane
        assert not lane.running and not lane.waiting and not lane.away and not lane.borrowed.pieces
        assert run.executor.state.memory[instance].used == run.executor.state.memory[instance].host_used == 0
    assert not run.executor.state.held


@LAW
@given(worlds())
def test_all_requests_end_and_nothing_is_left(world: World) -> None:
    assert_all_ended(world.run())


@LAW
@given(worlds(faults=False, losses=False))
def test_lent_is_borrowed_whenever_messages_are_drained(world: World) -> None:
    run = world.run()
    assert_all_ended(run)
    assert run.drained
    for manager in run.policy.managers.values():
        assert manager.creditor.lent.total == 0 or run.flying


def outcome(instances: int, blocks: int, prompt: int, output: int, mode: str, early: int) -> RequestStatus:
    """Of a giant, alone or after a small request of `early` tokens that still runs when it comes."""
    chosen = replace(FAST, mode=mode, lend_cap=1.0)
    first = ((0, early, 30),) if early else ()
    run = World(instances, blocks, (*first, (100, prompt, output)), chosen, budget=512).run()
    assert_all_ended(run)
    return RequestStatus(run.record.requests.status[len(first)])


@LAW
@given(st.integers(1, 6), st.integers(6, 30), st.integers(1, 40), st.sampled_from(("proactive", "reactive", "debt")),
       st.sampled_from((0, 20)))  # fmt: skip
def test_the_longest_context_is_the_whole_pool(instances: int, blocks: int, output: int, mode: str, early: int) -> None:
    """A request that fills the last block of every instance is served, one that needs a block more is refused."""
    pool = instances * blocks * 16
    assert outcome(instances, blocks, pool - output, output, mode, early) == RequestStatus.FINISHED
    assert outcome(instances, blocks, pool + 1, output, mode, early) == RequestStatus.REJECTED
