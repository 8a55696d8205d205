"""`mode=off` is `system=vllm`: the same commands at the same times."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from systems.infinite_llm.policy import InfiniteLlmPolicy
from systems.infinite_llm.settings import Settings
from tests.laws.lawlib import Outcome, Scenario
from tests.laws.strategies import law, scenarios


@law(60)
@given(scenarios())
def test_off_gives_the_commands_of_vllm(scenario: Scenario) -> None:
    scenario = replace(scenario, routes=(), watch=0)
    base = scenario.run()
    policy = InfiniteLlmPolicy(scenario.model().info(), scenario.config(None), Settings("off", scenario.dispatch))
    ours = Outcome(scenario.executor(), policy)
    ours.drive(policy)
    assert ours.trace == base.trace and ours.times() == base.times()
