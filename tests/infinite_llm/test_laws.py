"""Laws of Infinite-LLM under random events, delays, losses and refusals, in the simulator (which checks every
placement and every count of blocks)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings

from common.types import RequestStatus
from tests.infinite_llm.worlds import World, worlds

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
