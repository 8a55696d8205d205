"""Static pipelines: books, losses, memory by the formula, exact tokens; with one stage they are vllm."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.sched.lane import EngineConfig
from common.types import LayersDropped, RequestStatus, RunStep
from systems.baselines.vllm import VllmPolicy
from systems.baselines.vllm_pp import VllmPpPolicy, slices
from tests.baselines.worlds import Load, Run, leap_matters, loads, play_local, same_times
from tests.laws.strategies import law


def check(run: Run) -> None:
    """Both sides' books, and nobody is forgotten."""
    made, state = run.policy, run.executor.state
    spare: dict[int, int] = {}
    somewhere = {seq.request_id for seq in made._orphans}
    unsettled = set()
    for pipeline, lane in made.lanes.values():
        assert lane.free >= 0
        somewhere |= {*lane.running, *(seq.request_id for seq in (*lane.waiting, *pipeline.orphans))}
        for instance, layers in lane.stages:
            spare[instance] = spare.get(instance, 0) + lane.free * (layers[1] - layers[0])
            if pipeline.dead:
                unsettled.add(instance)
    for instance, capacity in made.ledger.capacity.items():
        used, taken = state.memory[instance].used, capacity - made.ledger.free[instance]
        if instance not in unsettled:
            assert taken - spare.get(instance, 0) <= used <= taken, f"instance {instance}"
        assert state.memory[instance].capacity >= capacity
    assert somewhere == run.live()


@law(150)
@given(loads(instances=(2, 4, 6)), st.sampled_from((1, 2, 2)), st.sampled_from(("round_robin", "least_outstanding")))
def test_everyone_ends_and_no_block_is_lost(load, stages, dispatch):
    model = load.model()
    Run(load, VllmPpPolicy(model.info(), load.engine(), stages, dispatch), check=check).drive()


@law(40)
@given(loads(instances=(4,)))
def test_one_pipeline_of_all(load):
    Run(load, VllmPpPolicy(load.model().info(), load.engine(), 4), check=check).drive()


BACK_BETWEEN_EQUALS = Load(  # an instance that is back is as new to both: nobody has chosen it yet
    requests=((1000, 16, 10), (0, 150, 10), (1000, 300, 60), (4000, 100, 30), (4000, 100, 30), (0, 200, 10), (0, 16, 1),
              (0, 1, 30), (0, 1, 1), (0, 200, 10), (0, 8, 120), (0, 200, 1)),
    instances=4, blocks=12, layers=6, losses=((1153, 1),), back=True, budget=256, max_num_seqs=64, host_blocks=0,
    max_leap=7)  # fmt: skip


@law(40)
@example(BACK_BETWEEN_EQUALS)
@given(loads())
def test_with_one_stage_it_is_vllm_to_the_nanosecond(load):
    model = load.model()
    mine = Run(load, VllmPpPolicy(model.info(), load.engine(), 1)).drive()
    theirs = Run(load, VllmPolicy(model.info(), load.engine())).drive()
    assert same_times(mine.record, theirs.record)


@law(60)
@given(loads(), st.sampled_from((1, 2)))
def test_leaps_change_nothing(load, stages):
    assert not leap_matters(load, lambda one: Run(one, VllmPpPolicy(one.model().info(), one.engine(), stages)).drive())


@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (6, 4), (7, 3), (5, 5)])
def test_slices_tile_the_layers(layers, stages):
    parts = slices(layers, stages)
    assert [parts[0][0], parts[-1][1]] == [0, layers] and len(parts) == stages
    assert all(one[1] == two[0] for one, two in pairwise(parts))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


def test_memory_is_what_the_smaller_share_leaves():
    load = Load(((0, 30, 5),) * 4)
    run = Run(load, VllmPpPolicy(load.model().info(), load.engine(), 2)).drive()
    drops = [event for _, event, _ in run.trace if isinstance(event, LayersDropped)]
    assert {event.kv_cells for event in drops} == {24 * 4 + 2 * 8}  # a layer's parameters are as large as 8 cells
    blocks = run.policy.ledger.capacity_blocks(run.policy.pipelines[0].set.stages)
    assert blocks == 2 * 24 + 2 * 8 // 2


def test_as_many_micro_batches_as_stages_are_in_flight():
    load = Load(((0, 30, 40),) * 8, instances=4, blocks=60)
    run = Run(load, VllmPpPolicy(load.model().info(), load.engine(), 4)).drive()
    assert {step.lane for step in run.commands(RunStep)} == {0, 1, 2, 3}


def test_without_overload_ttft_is_near_vllm():
    """A pipeline of two shares what two instances do: light load waits for hops and the other stage only."""
    load = Load(tuple((3000, 60, 12) for _ in range(40)), blocks=200)
    mine = Run(load, VllmPpPolicy(load.model().info(), load.engine(), 2)).drive().record.requests
    theirs = Run(load, VllmPolicy(load.model().info(), load.engine())).drive().record.requests
    ttft = [sum(a - b for a, b in zip(one.first_token_ns, one.arrival_ns)) for one in (mine, theirs)]
    assert ttft[1] < ttft[0] < 1.5 * ttft[1]
    assert sum(mine.num_preemptions) == 0


def test_survivors_of_two_broken_pipelines_make_one():
    load = Load(tuple((200, 60, 20) for _ in range(20)), instances=4, losses=((2_000, 0), (2_500, 3)))
    run = Run(load, VllmPpPolicy(load.model().info(), load.engine(), 2), check=check).drive()
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 20
    [pipeline] = run.policy.pipelines
    assert [stage.instance for stage in pipeline.set.stages] == [2, 1]


def test_what_does_not_divide_is_refused_in_one_line():
    info = Load(()).model().info()
    with pytest.raises(ConfigError, match="stages=3: must divide the 2 instances"):
        VllmPpPolicy(info, EngineConfig(), 3)
    with pytest.raises(ConfigError, match="does not cache prefixes"):
        VllmPpPolicy(info, EngineConfig(prefix_caching=True), 2)


@law(10)
@given(loads(small=True))
def test_replies_are_those_of_an_undisturbed_run(load):
    play_local(load, lambda info, engine: VllmPpPolicy(info, engine, 2))
