"""The leap law: leaps of one iteration, of seven and of any number decide alike and take the same time, to the ns."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from common.types import Interrupt, RunStep
from tests.laws.lawlib import GRID, Request, Scenario, doubled
from tests.laws.strategies import law, scenarios, shared_scenarios


def same_for_all_leaps(scenario: Scenario) -> None:
    far = scenario.run(None).times()
    assert scenario.run(1).times() == far
    assert scenario.run(7).times() == far


@law(300)
@given(scenarios())
def test_leaps_of_any_size_give_the_same_times(scenario):
    same_for_all_leaps(scenario)


@law(100)
@given(scenarios() | shared_scenarios(), st.integers(0, 4))
def test_only_the_first_iteration_after_idleness_is_slower(scenario, units):
    same_for_all_leaps(replace(scenario, wake=units))


@law(150)
@given(shared_scenarios())
def test_lanes_that_share_an_instance_take_turns_at_any_leap(scenario):
    same_for_all_leaps(scenario)


def decisions(outcome):
    """What a policy decided, and when: everything but steps that merely go on."""
    found = {}
    for now, _, commands in outcome.trace:
        for command in commands:
            if isinstance(command, RunStep):
                if not (command.add or command.remove or command.park or command.place):
                    continue
                command = command._replace(command_id=0, max_iterations=None, reclaim=0)
            found.setdefault(now, []).append(command)
    return found


@law(150)
@given(scenarios())
def test_a_step_that_met_nothing_causes_only_resubmission(scenario):
    """With steps of one iteration a policy decides what it decides in long leaps, at the same times. It asks for
    fewer interrupts, for it knows the free blocks better."""
    often, seldom = decisions(scenario.run(1)), decisions(scenario.run(None))
    for now in sorted(often.keys() | seldom.keys()):
        eager, lazy = often.get(now, []), seldom.get(now, [])
        interrupts = [command for command in eager if isinstance(command, Interrupt)]
        assert all(command in lazy for command in interrupts)
        assert [command for command in eager if not isinstance(command, Interrupt)] == [
            command for command in lazy if not isinstance(command, Interrupt)
        ]


@law(60)
@given(scenarios(losses=False, caching=False), st.sampled_from((2, 8)))
def test_events_grow_with_requests_and_not_with_tokens(scenario, factor):
    """Where memory is ample, replies many times as long take not one policy event more than a bound in requests."""
    requests = tuple(replace(request, parent=-1) for request in scenario.requests)
    scenario = replace(scenario, requests=requests, blocks=10_000, watch=0, budget=512)
    for drawn in (scenario, doubled(scenario, factor)):
        events = len(drawn.run().trace)
        # up, arrival and at most one interrupt and one finish per request
        assert events <= drawn.instances + 4 * len(drawn.requests)


def test_doubled_replies_cost_no_more_events():
    requests = tuple(Request(5, 20, 30 + index % 7) for index in range(400))
    scenario = Scenario(requests, 2, 100_000, 16, max_num_seqs=256, budget=2048)
    once, twice = scenario.run(), doubled(scenario).run()
    assert len(twice.trace) <= 1.1 * len(once.trace)  # more arrivals interrupt somebody, none does so twice
    assert len(twice.trace) < 4 * 400 < sum(twice.record.requests.output_tokens) / 15


def test_an_arrival_at_a_boundary_waits_for_the_next_one():
    """By hand. One prompt of a token, then decodes, each iteration one unit long; the second request arrives at
    the very end of the third, whose boundary is then already told: it joins after the fourth."""
    scenario = Scenario((Request(0, 1, 10), Request(3, 1, 2)), blocks=64)
    for max_leap in (1, 2, 7, None):
        columns = scenario.run(max_leap).record.requests
        assert list(columns.arrival_ns) == [0, 3 * GRID]
        assert columns.first_token_ns[0] == GRID
        assert columns.first_token_ns[1] == 5 * GRID
        assert columns.finish_ns[1] == 6 * GRID
        assert columns.finish_ns[0] == 10 * GRID


def test_a_loss_at_a_boundary_undoes_the_iteration_that_ends_there():
    """By hand: a loss comes before everything else at its instant. Two tokens of the reply are out by then, and
    the request is computed anew elsewhere from its three known tokens (two units, and the third token of the reply
    with them), then decodes seven times."""
    scenario = Scenario((Request(0, 1, 10),), 2, 64, losses=((3, 0),))
    for max_leap in (1, 2, 7, None):
        outcome = scenario.run(max_leap)
        columns = outcome.record.requests
        steps = [entry for *_, commands in outcome.trace for command in commands if isinstance(command, RunStep)
                 for entry in command.add]  # fmt: skip
        assert [(entry.computed, entry.target) for entry in steps] == [(0, 1), (0, 3)]
        assert columns.first_token_ns[0] == GRID and columns.instance[0] == 1
        assert columns.finish_ns[0] == (3 + 2 + 7) * GRID
