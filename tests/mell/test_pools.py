"""Several models in one cluster: a pool each over a shared stock of GPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, ContractError
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import Entry, InstanceUp, RunStep, Stage, StartInstance, Status, StopInstance
from systems.registry import make_policy
from tests.fakes import US, FakeWorkload
from tests.laws.strategies import law
from tests.mell.pools import PoolsRun, pools, stock


@law(60)
@given(st.integers(0, 1 << 30))
def test_gpus_are_conserved_and_nobody_is_served_by_another_model(seed):
    PoolsRun(seed).run()


@law(6)
@given(st.integers(0, 1 << 30))
def test_a_run_is_the_same_every_time(seed):
    assert PoolsRun(seed).run().trace == PoolsRun(seed).run().trace


def test_the_mechanisms_really_happen():
    """Else the laws above hold vacuously."""
    handed = full = moved = 0
    for seed in range(40):
        run = PoolsRun(seed).run()
        owners: dict[int, set[int]] = {}
        for _, event, _ in run.trace:
            if isinstance(event, InstanceUp) and event.status is Status.OK:
                info = run.cluster.instances[event.instance]
                owners.setdefault(info.gpu, set()).add(info.model)
        handed += sum(len(models) > 1 for models in owners.values())
        full += run.most == run.gpus
        moved += sum(pool.mover.stats.kv_done + pool.mover.stats.token_done for pool in run.policy.pools)
    assert handed > 10 and full > 5 and moved > 20


def test_a_gpu_goes_to_the_other_model_after_that_models_weights_are_loaded():
    """Of three GPUs model 0 has two, and nothing to do when model 1 needs more than its own."""
    model = stock(3, (24, 24), 3, (500, 3_000))
    work = FakeWorkload([0] * 4 + [50_000 * US] * 6, [300] * 10, [20] * 4 + [60] * 6, model=[0] * 4 + [1] * 6)
    policy = pools(model.info(), cooldown_us=10**9)  # by itself nobody would give a GPU back
    record = RunRecord(RequestColumns.empty(10))
    executor = SimExecutor(model, work, record)
    asked: dict[int, int] = {}
    stopped: dict[int, int] = {}
    waits = []
    while (item := executor.poll()) is not None:
        now, event = item
        if isinstance(event, InstanceUp) and event.command_id in asked:
            waits.append((event.instance, now - asked[event.command_id]))
        for command in policy.on_event(now, event):
            if isinstance(command, StartInstance):
                asked[command.command_id] = now
                assert command.instance >= 3 and stopped[command.instance - 3] < now
            if isinstance(command, StopInstance):
                stopped[command.instance] = now
            executor.submit(command)
    assert waits and all(instance >= 3 and wait == 3_000 * US for instance, wait in waits)
    assert all(status == 2 for status in record.requests.status)


def bare(model=(0, 1)):
    cluster = stock(2, (24, 24), 2)
    executor = SimExecutor(cluster, FakeWorkload([0, 0], [16, 16], [4, 4], model=list(model)),
                           RunRecord(RequestColumns.empty(2)))  # fmt: skip
    for _ in range(4):
        executor.poll()
    return executor


def test_the_executor_refuses_a_gpu_that_is_in_use():
    with pytest.raises(ContractError, match="instance 2 started on a GPU where instance 0 is up or starting"):
        bare().submit(StartInstance(1, 2))


def test_the_executor_refuses_a_request_of_another_model():
    with pytest.raises(ContractError, match="request 1 asks for model 1; instance 0 runs model 0"):
        bare().submit(RunStep(1, 0, add=(Entry(1, 0, 16),), stages=(Stage(0, (0, 4)),), token_budget=64))


def test_the_executor_refuses_a_route_through_two_models():
    with pytest.raises(ContractError, match="run different models"):
        bare().submit(RunStep(1, 0, stages=(Stage(0, (0, 2)), Stage(3, (2, 4))), token_budget=64))


@pytest.mark.parametrize("name", ["vllm", "kunserve", "infinite_llm", "memserve", "llumnix"])
def test_systems_of_one_model_say_so(name):
    with pytest.raises(ConfigError, match=f"system={name} serves one model: with cluster.models use one of: mell"):
        make_policy(name, stock(2, (24, 24), 2).info(), EngineConfig(), {})


def test_every_model_needs_its_minimum():
    with pytest.raises(ConfigError, match=r"2 of each of 2 models need 4 GPUs; cluster.num_instances=3"):
        make_policy("mell", stock(3, (24, 24), 2).info(), EngineConfig(), {"min_instances": 2})
