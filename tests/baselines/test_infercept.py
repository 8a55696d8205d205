"""InferCept's rule: books of both tiers, losses, the arithmetic of waste, exact tokens after every action."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.harness import run as run_config
from common.errors import ConfigError
from common.executors.network import LinkSpec
from common.sched.lane import EngineConfig
from common.types import SwapSpan
from systems.baselines.infercept import InferCeptPolicy
from systems.baselines.vllm import VllmPolicy
from systems.baselines.waste import Action, Rates
from systems.registry import make_policy
from tests.baselines.worlds import Load, Run, leap_matters, loads, play_local, same_times
from tests.fakes import US
from tests.laws.strategies import law

ACTIONS = st.sampled_from((tuple(Action), tuple(Action), (Action.DISCARD, Action.SWAP),
                           (Action.DISCARD, Action.PRESERVE)))  # fmt: skip
PCIE = st.sampled_from((5e8, 5e9, 5e10))


def rates(bandwidth=5e9):
    """What fits `tests.fakes.FakeCost` on four layers."""
    return {"cost_alpha": 0.08, "cost_beta": 800.0, "cost_gamma": 50_000.0, "cost_lambda": 45_000.0,
            "pcie_bandwidth": bandwidth, "pcie_latency_ns": 1_000.0}  # fmt: skip


def world(load, bandwidth=5e9):
    return load.model(extra=rates(bandwidth), pcie=LinkSpec(bandwidth, US))


def check(run: Run) -> None:
    """Nobody is forgotten; at boundaries both sides count the same blocks, of both tiers."""
    made, layers = run.policy, run.model.num_layers
    somewhere = {seq.request_id for seq in made._orphans}
    for lane in [*made.lanes.values(), *made._dying.values()]:
        paused = (*lane.waiting, *lane.joining, *lane.swapped, *(seq for seq, _ in lane.moving.values()))
        here = [*lane.running, *(seq.request_id for seq in paused)]
        assert len(here) == len(set(here))
        somewhere |= set(here)
    assert somewhere == run.live()
    for instance, lane in made.lanes.items():
        memory = run.executor.state.memory[instance]
        host = run.load.host_blocks
        assert 0 <= lane.free <= lane.num_blocks and 0 <= lane.host_free <= host
        assert memory.host_used == (host - lane.host_free) * layers
        served = run.executor.lanes.get(lane.lane)
        if served is None or served.command_id is None or served.ran == served.step_from:
            assert memory.used == (lane.num_blocks - lane.free) * layers, f"instance {instance}"


def taken(run: Run) -> Counter[Action]:
    return sum((lane.taken for lane in run.policy.lanes.values()), Counter())


def test_everyone_ends_and_no_block_is_lost_in_either_tier():
    met: Counter[Action] = Counter()

    @law(400)
    @given(loads(host=True, instances=(1, 2), most_blocks=24), ACTIONS, PCIE)
    def draws(load, actions, bandwidth):
        model = world(load, bandwidth)
        run = Run(load, InferCeptPolicy(model.info(), load.engine(), actions), model=model, check=check).drive()
        met.update(taken(run))
        for lane in run.policy.lanes.values():
            assert lane.free == lane.num_blocks and lane.host_free == load.host_blocks and not lane.reserved

    draws()
    assert all(met[action] > 20 for action in Action), met


@law(60)
@given(loads())
def test_with_discard_alone_it_is_vllm_to_the_nanosecond(load):
    model = world(load)
    mine = Run(load, InferCeptPolicy(model.info(), load.engine(), (Action.DISCARD,)), model=model).drive()
    theirs = Run(load, VllmPolicy(model.info(), load.engine())).drive()
    assert same_times(mine.record, theirs.record)


@law(100)
@given(loads(host=True, most_blocks=24), PCIE)
def test_leaps_change_nothing(load, bandwidth):
    model = world(load, bandwidth)
    info = model.info()
    assert not leap_matters(load, lambda one: Run(one, InferCeptPolicy(info, one.engine()), model=model).drive())


def test_waste_is_memory_by_time():
    rates = Rates(alpha=0.0, beta=100.0, gamma=0.0, swap_token_ns=10.0, swap_latency_ns=50.0)
    wastes = rates.wastes(tokens=10, others=90, wait_ns=7.0, under_way=5)
    assert wastes == {Action.DISCARD: 1_000 * 100, Action.PRESERVE: 70, Action.SWAP: (200 + 150) * 10}


@pytest.mark.parametrize(("bandwidth", "wait_ns", "best"), [
    (1e12, 1e9, Action.SWAP), (1e6, 1e9, Action.DISCARD), (1e6, 10.0, Action.PRESERVE),
])  # fmt: skip
def test_the_least_waste_is_chosen(bandwidth, wait_ns, best):
    wastes = Rates.of(rates(bandwidth), 1024).wastes(100, 200, wait_ns, 0)
    assert min(Action, key=wastes.__getitem__) is best


def test_who_was_swapped_comes_back_and_computes_nothing_anew():
    load = Load(((0, 100, 100),) * 3, instances=1, blocks=26, host_blocks=100)
    model = world(load, 5e10)
    run = Run(load, InferCeptPolicy(model.info(), load.engine(), (Action.DISCARD, Action.SWAP)), model=model,
              check=check).drive()  # fmt: skip
    swaps = run.commands(SwapSpan)
    assert [swap.out for swap in swaps].count(True) == [swap.out for swap in swaps].count(False) > 0
    assert Action.DISCARD not in taken(run)
    plain = Run(load, VllmPolicy(model.info(), load.engine()), model=model).drive()
    assert max(run.record.requests.finish_ns) < max(plain.record.requests.finish_ns)


def test_without_host_memory_nothing_swaps():
    load = Load(((0, 100, 100),) * 3, instances=1, blocks=26)
    model = world(load)
    run = Run(load, InferCeptPolicy(model.info(), load.engine()), model=model, check=check).drive()
    assert not run.commands(SwapSpan) and taken(run)


def test_a_configured_burst_recomputes_less_than_vllm():
    burst = ["cluster.num_instances=2", "workload=burst", "workload.rate=10", "workload.duration_s=60",
             "engine.kv_blocks=900", "seed=0"]  # fmt: skip
    mine, theirs = (run_config([f"system={name}", *burst])[1].requests for name in ("infercept", "vllm"))
    assert sum(mine.num_preemptions) < sum(theirs.num_preemptions)


@pytest.mark.parametrize(("config", "options", "text"), [
    ({}, {"actions": ["swap"]}, "discard must be among them"),
    ({}, {"actions": "swap"}, "give a list"),
    ({"prefix_caching": True}, {}, "does not cache prefixes"),
    ({}, {}, "has no cost_alpha: use cost.source=operators"),
])  # fmt: skip
def test_bad_options_are_one_line(config, options, text):
    with pytest.raises(ConfigError, match=text):
        make_policy("infercept", Load(()).model().info(), EngineConfig(**config), options)


def test_replies_are_those_of_an_undisturbed_run():
    met: Counter[Action] = Counter()

    @law(16)
    @given(loads(small=True, instances=(1, 2), host=True), ACTIONS)
    def draws(load, actions):
        met.update(taken(play_local(load, lambda info, engine: InferCeptPolicy(info._replace(extra=rates(5e10)),
                                                                               engine, actions), check)))  # fmt: skip

    draws()
    assert all(met[action] for action in Action), met
