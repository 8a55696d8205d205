"""Without overload KunServe is vllm: to the nanosecond on drawn loads, and within 1% on every metric of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given

from bench.golden import digest
from bench.harness import run as run_config
from common.metrics import summarize
from systems.baselines.vllm import VllmPolicy
from tests.fakes import run as run_fake
from tests.kunserve.strategies import bursts, law
from tests.kunserve.worlds import Run

ROOMY = ["cluster.num_instances=4", "model=llama2-7b", "hardware=a100-80g", "run.sample_ms=1000"]
LOADS = {
    "poisson": ["workload=poisson", "workload.rate=6", "workload.num_requests=150"],
    "burst that fits": ["workload=burst", "workload.rate=8", "workload.duration_s=30", "workload.first_burst_s=8"],
    "long prompts": ["workload=burst_longbench", "workload.rate=1", "workload.duration_s=40"],
}


@pytest.mark.parametrize("mode", ["pipeline", "remote_attention"])
@pytest.mark.parametrize("name", LOADS)
def test_every_metric_is_within_one_percent_of_vllm(name, mode):
    found, digests = {}, set()
    for system in (["system=vllm"], ["system=kunserve", f"system.mode={mode}"]):
        config, record = run_config([*ROOMY, *LOADS[name], *system])
        assert not record.marks, "no overload"
        digests.add(digest(record))
        found[system[0]] = summarize(record, config.slo, config.cluster.tp)
    mine, theirs = found["system=kunserve"], found["system=vllm"]
    assert mine.keys() == theirs.keys() and mine["completed"] > 10
    assert len(digests) == 1, "every request alike, to the nanosecond"
    for key, want in theirs.items():
        if isinstance(want, int | float):
            assert mine[key] == pytest.approx(want, rel=0.01, nan_ok=True), key


@law(100, 1000)
@given(bursts())
def test_drawn_loads_that_fit_take_the_same_time_to_the_nanosecond(burst):
    burst = replace(burst, blocks=400, losses=(), kill=None)
    assume(burst.requests)
    mine = Run(burst).drive().record
    policy = VllmPolicy(burst.model().info(), burst.engine(), "least_outstanding")
    theirs, _ = run_fake(policy, burst.model(), burst.workload())
    assert not mine.marks
    for name in ("first_token_ns", "finish_ns", "instance", "num_preemptions"):
        assert list(getattr(mine.requests, name)) == list(getattr(theirs.requests, name))
