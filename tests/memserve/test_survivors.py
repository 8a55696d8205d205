"""Roles that have died out: others take their work on; where nobody is left a request is refused with a word, or
waits, recorded, for a start that is coming. Nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.executors.sim import SimExecutor
from common.types import RequestStatus, StartInstance
from systems.memserve.config import DESIGNS, Options
from tests.laws.strategies import law
from tests.memserve.lib import PLANNER, Scenario, Turn, run, scenarios

SPLIT = [design for design in DESIGNS if DESIGNS[design].split]
TURNS = (*(Turn(index, 1, 40, 20) for index in range(4)), *(Turn(index, 5, 20, 20) for index in range(4)))


def base(design, roles, instances, **more):
    beat = {"heartbeat_s": 0.0005, "timeout_s": 0.0015, **more}
    options = Options(design=design, roles=roles, planner=PLANNER, **beat)
    return Scenario(TURNS, (48,) * 4, options, instances, 90, 40)


def all_finished(executor):
    return all(status == RequestStatus.FINISHED for status in executor.record.requests.status)


@pytest.mark.parametrize("transfer", ["by_layer", "by_request_agg"])
@pytest.mark.parametrize("design", SPLIT)
def test_without_prefill_instances_decode_instances_prefill(design, transfer):
    for when in (0, 3, 6, 9, 15):
        scenario = replace(base(design, "1P2D", 3, transfer=transfer), losses=((when, 0),))
        policy, executor = run(scenario)
        assert all_finished(executor), f"P lost at {when}"
        late = [flow for flow in policy.flows.values() if flow.prefill_at != 0]
        assert late and all(flow.prefill_at == flow.decode_at for flow in late)
        assert any(kind == "makeshift" for _, _, kind, _ in executor.record.marks), "nothing says so"


@pytest.mark.parametrize("transfer", ["by_layer", "by_request_agg"])
@pytest.mark.parametrize("design", SPLIT)
def test_without_decode_instances_prefill_instances_decode(design, transfer):
    for when in (0, 3, 6, 9, 15):
        scenario = replace(base(design, "2P1D", 3, transfer=transfer), losses=((when, 2),))
        _, executor = run(scenario)
        assert all_finished(executor), f"D lost at {when}"
        assert any(kind == "makeshift" for _, _, kind, _ in executor.record.marks), "nothing says so"


def test_roles_are_kept_as_soon_as_they_can_be():
    """A prefill instance that is started anew prefills again."""
    turns = (*TURNS, Turn(4, 200, 40, 20))
    scenario = replace(base("pd_caching_3", "1P1D", 2, restart=True), turns=turns, document=(48,) * 5,
                       losses=((6, 0),))  # fmt: skip
    policy, executor = run(scenario)
    assert all_finished(executor)
    assert (policy.flows[8].prefill_at, policy.flows[8].decode_at) == (0, 1)


def test_where_nobody_is_left_requests_are_refused_with_a_word():
    for beat in (0.0005, 0.0):
        scenario = replace(base("pd_caching_3", "1P1D", 2, heartbeat_s=beat), losses=((6, 0), (8, 1)))
        _, executor = run(scenario)
        statuses = executor.record.requests.status
        assert RequestStatus.REJECTED in statuses
        reasons = [text for _, _, kind, text in executor.record.marks if kind == "nobody left"]
        assert reasons, "nothing says why"


def test_where_a_start_is_coming_requests_wait_for_it():
    scenario = replace(base("pd_caching_3", "1P1D", 2, restart=True), losses=((6, 0), (8, 1)))
    _, executor = run(scenario)
    assert all_finished(executor)
    assert any(kind == "nobody left" for _, _, kind, _ in executor.record.marks), "that they wait is recorded"


def test_without_a_manager_failed_calls_say_who_is_gone():
    for victim in range(4):
        scenario = replace(base("pd_caching_3", "2P2D", 4, heartbeat_s=0.0), losses=((6, victim),))
        _, executor = run(scenario)
        assert all_finished(executor)


def test_a_start_that_fails_is_tried_again():
    """The instance is lost, started anew, and lost once more before it is up."""
    turns = (*TURNS, Turn(4, 400, 40, 20))
    scenario = replace(base("pd_caching_3", "1P1D", 2, restart=True), turns=turns, document=(48,) * 5,
                       losses=((6, 0), (40, 0)))  # fmt: skip
    seen = []
    workload, record, faults, _ = scenario.parts()
    executor = SimExecutor(scenario.model(), workload, record, faults=faults)
    submit = executor.submit
    executor.submit = lambda command: (seen.append(command), submit(command))
    policy, _ = run(scenario, executor, record)
    assert all_finished(executor)
    assert sum(isinstance(command, StartInstance) for command in seen) == 2
    assert (policy.flows[8].prefill_at, policy.flows[8].decode_at) == (0, 1)


@pytest.mark.parametrize("restart", [True, False])
def test_a_manager_that_died_learns_anew_who_is_there(restart):
    """It is away when an instance dies; back, it takes nobody for dead who is not, and misses the one that is."""
    turns = (*TURNS, Turn(4, 200, 40, 20))
    scenario = replace(base("pd_caching_3", "2P1D", 3, restart=restart), turns=turns, document=(48,) * 5)
    workload, record, _, _ = scenario.parts()
    executor = SimExecutor(scenario.model(), workload, record, faults=((800_000, 0),),
                           agent_faults=((500_000, "cm", 1_000_000),))  # fmt: skip
    policy, _ = run(scenario, executor, record)
    assert all_finished(executor)
    assert not policy.desk.limbo and (0 in policy.gs.members) == restart
    assert policy.members.cm.declared == 0, "it never knew of the dead one"
    assert {1, 2} <= set(policy.gs.members) and policy.sites[1].start == policy.sites[2].start == 0


@law(150)
@given(scenarios(losses=True), st.sampled_from((True, False, False)), st.sampled_from((0.0, 0.0005)))
def test_nobody_waits_for_ever(scenario, restart, heartbeat_s):
    """Any losses, with and without restarts, with and without a manager: every request ends, or is refused."""
    restart = restart and heartbeat_s > 0
    _, executor = run(replace(scenario, options=replace(scenario.options, restart=restart, heartbeat_s=heartbeat_s)))
    ended = (RequestStatus.FINISHED, RequestStatus.REJECTED)
    assert all(status in ended for status in executor.record.requests.status)
