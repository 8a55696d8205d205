"""The leap law: leaps of one iteration, of seven and of any number decide alike and take the same time, to the ns."""

from __future__ import annotations

from hypothesis import given

from tests.laws.lawlib import Scenario
from tests.laws.strategies import law, scenarios, shared_scenarios


def same_for_all_leaps(scenario: Scenario) -> None:
    far = scenario.run(None).times()
    assert scenario.run(1).times() == far
    assert scenario.run(7).times() == far


@law(300)
@given(scenarios())
def test_leaps_of_any_size_give_the_same_times(scenario):
    same_for_all_leaps(scenario)


@law(150)
@given(shared_scenarios())
def test_lanes_that_share_an_instance_take_turns_at_any_leap(scenario):
    same_for_all_leaps(scenario)
