"""`system=vllm_single`: every request ends, capacity is the cluster's, and what cannot be cut is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.build import cluster_model
from common.config import compose
from common.driver import drive
from common.errors import ConfigError
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.spanning import gpus_per_instance
from common.types import RequestStatus
from run import replay
from systems.baselines.single import SinglePolicy
from tests.fakes import FakeWorkload, cluster
from tests.laws.strategies import law
from workloads.types import plain

BASE = ["experiment=infinite_llm/mixes", "system=vllm_single"]
SIZES = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 400), st.integers(1, 60)), min_size=1, max_size=12)


@law(60)
@given(st.integers(1, 4), st.integers(6, 40), SIZES)
def test_every_request_ends_and_nothing_is_left(stages: int, blocks: int, sizes) -> None:
    model = cluster(stages, blocks, max_model_len=1 << 20)
    arrivals = np.cumsum([gap * 1000 for gap, *_ in sizes]).tolist()
    workload = FakeWorkload(arrivals, [p for _, p, _ in sizes], [o for *_, o in sizes])
    record = RunRecord(RequestColumns.empty(len(sizes)))
    executor = SimExecutor(model, workload, record)
    drive(SinglePolicy(model.info(), EngineConfig(16, 64, 16, max_model_len=1 << 20)), executor, record)
    assert all(s in (RequestStatus.FINISHED, RequestStatus.REJECTED) for s in record.requests.status)
    assert all(memory.used == 0 for memory in executor.state.memory)
    room = min(blocks * 4 // (-(-4 // stages)), 1 << 20) * 16
    for status, (_, prompt, output) in zip(record.requests.status, sizes):
        assert status == RequestStatus.FINISHED or prompt + output + 16 > room


def test_all_gpus_are_one_instance_of_four_stages() -> None:
    config = compose(BASE)
    built = cluster_model(config)
    assert len(built.instances) == 4
    multi = cluster_model(compose(["experiment=infinite_llm/mixes", "system=vllm"]))
    tokens = min(info.kv_cells // 8 for info in built.instances) * 16
    each = multi.instances[0].kv_cells // 32 * 16
    assert tokens > 32 * each, "one copy of the weights instead of 32"
    workload = plain("one", np.zeros(1, np.int64), np.array([100_000]), np.array([4]), 4, "one request")
    assert replay(config, workload).record.requests.status[0] == RequestStatus.FINISHED


@pytest.mark.parametrize(
    ("overrides", "words"),
    (
        (["cluster.gpus_per_node=6", "cluster.num_instances=6"], "do not divide over tp=6"),
        (["cluster.num_instances=33"], "not a whole number of nodes"),
        (["cluster.gpus_per_node=1", "cluster.num_instances=64"], "cannot be cut into 64 stages"),
        (["cluster.lost=[[1,0]]"], "whole or nothing"),
    ),
)
def test_what_cannot_be_cut_is_refused_in_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        cluster_model(compose([*BASE, *overrides]))
    assert "\n" not in str(caught.value)


def test_its_gpus_are_all_paid_for() -> None:
    """One instance, 32 GPUs: GPU-seconds count every one of them, as they do for the same cards under vllm."""
    small = ["cluster.num_instances=8", "cluster.gpus_per_node=8"]
    assert gpus_per_instance(compose([*BASE, *small])) == 8
    assert gpus_per_instance(compose(["experiment=infinite_llm/mixes", "system=vllm", *small])) == 1
