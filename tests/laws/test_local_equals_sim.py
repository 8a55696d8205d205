"""With the modelled clock real tensors take exactly the simulator's time: every column of every request, to the
nanosecond, under the vllm policy in all its forms. And whatever is cached, preempted or lost on the way, replies are
those of undisturbed runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from common.driver import drive
from common.executors.local import LocalExecutor
from common.record import RequestColumns, RunRecord
from common.types import RequestStatus, Rule
from tests.engine.worlds import check_replies, fitting_cluster, tiny_spec, tiny_world
from tests.laws.lawlib import GRID, LAYERS, FakeCost, GridCost, Outcome, Request, Scenario
from tests.laws.strategies import law, scenarios, shared_scenarios

SPEC = tiny_spec(LAYERS, num_heads=4, num_kv_heads=2)


class RealScenario(Scenario):
    """A scenario whose cells and layers have the sizes of the tiny model, for either runtime."""

    def model(self):
        kind = GridCost if self.grid else FakeCost
        cost = lambda layers, first, last: kind(layers, first, last, self.alpha)  # noqa: E731
        return fitting_cluster(SPEC, self.instances, self.blocks * LAYERS, self.block_size, cost=cost)

    def local(self) -> LocalExecutor:
        """The same run with real tensors, driven to the end; its world is closed but its tokens stay."""
        model = self.model()
        record = RunRecord(RequestColumns.empty(len(self.requests)))
        losses = tuple((units * GRID, instance) for units, instance in self.losses)
        world = tiny_world(model, SPEC)
        executor = LocalExecutor(model, self.workload(), record, world=world, faults=losses)
        try:
            drive(self.policy(), executor, record)
            for instance, engine in world.instances.items():
                for tier, store in engine.stores.items():
                    store.check()
                    memory = executor.state.memory[instance]
                    assert store.used == (memory.used if tier == "hbm" else memory.host_used)
                named = engine.stores["hbm"].named
                assert len(list(named)) * LAYERS == executor.state.memory[instance].cached
        finally:
            executor.close()
        return executor


def real(scenario: Scenario) -> RealScenario:
    """A closed loop releases prompts whatever they are made of: without sessions nobody may name a reply to come."""
    fields = {name: getattr(scenario, name) for name in Scenario.__dataclass_fields__}
    if scenario.concurrency is not None:
        fields["requests"] = tuple(replace(request, parent=-1) for request in scenario.requests)
    return RealScenario(**{**fields, "watch": 0})


def compare(scenario: Scenario) -> LocalExecutor:
    """Both runtimes; the local one for more questions."""
    scenario = real(scenario)
    local = scenario.local()
    sim = Outcome(scenario.executor(), None)
    sim.drive(scenario.policy())
    mine, theirs = Outcome(local, None).times(), sim.times()
    for name, value in theirs.items():
        assert mine[name] == value, name
    check_replies(local)
    return local


@law(25)
@given(scenarios(caching=False, max_size=8))
def test_the_same_times(scenario):
    compare(scenario)


@law(40)
@given(scenarios(caching=True, max_size=8))
def test_the_same_times_with_prefix_caching(scenario):
    compare(scenario)


@law(12)
@given(shared_scenarios())
def test_the_same_times_on_shared_instances_and_pipelines(scenario):
    compare(scenario)


@law(12)
@given(scenarios(losses=False, caching=True, max_size=6))
def test_the_same_tokens_with_prefix_caching_and_without(scenario):
    with_cache, without = compare(scenario), compare(replace(scenario, caching=False))
    mine, theirs = with_cache.outputs(), without.outputs()
    for request_id, status in enumerate(with_cache.record.requests.status):
        if status == without.record.requests.status[request_id] == RequestStatus.FINISHED:
            assert mine[request_id] == theirs[request_id]


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("caching", [False, True])
def test_an_overload_with_preemption(rule, caching):
    """Half of what would fit, shared documents, and sessions that go on from their replies."""
    requests = tuple(
        Request(index % 3, 1 + index * 7 % 37, 1 + index * 11 % 29, index % 4 - 1, 3 * (index % 2),
                index - 4 if index % 4 == 3 and index > 4 else -1)
        for index in range(24))  # fmt: skip
    local = compare(Scenario(requests, 2, 48, 4, rule, 64, 8, caching=caching))
    assert sum(local.record.requests.num_preemptions) or caching
    assert not caching or any(local.record.requests.cached_tokens)


def test_a_turn_after_a_refused_one_names_a_reply_that_never_was():
    """The client goes on as its trace does; what the refused turn would have said is made up, the same way always."""
    requests = (Request(0, 30, 9), Request(1, 2, 3, parent=0), Request(1, 4, 3, parent=1))
    scenario = Scenario(requests, 1, 12, 4)
    local = compare(replace(scenario, blocks=7))
    assert list(local.record.requests.status)[:1] == [RequestStatus.REJECTED]
