"""The oracle without a limit of memory: nobody is ever preempted; where memory suffices it is vllm."""

from __future__ import annotations

import pytest
from hypothesis import given

from bench.harness import run
from common.config import compose
from common.errors import ConfigError
from systems.registry import make_policy
from tests.baselines.worlds import Load, Run, loads, play_local, same_times
from tests.laws.strategies import law

SMALL = ["cluster.num_instances=2", "workload=burst", "workload.rate=10", "workload.duration_s=60", "seed=0"]


def unlimited(load: Load, longest: int = 512) -> Load:
    """As `common.build` sizes it."""
    return Load(**{**load.__dict__, "blocks": load.max_num_seqs * (longest // 16 + 1)})


@law(60)
@given(loads())
def test_nobody_is_ever_preempted_or_refused(load):
    load = unlimited(load)
    engine = load.engine(max_model_len=512)
    made = Run(load, make_policy("infinite_kv", load.model().info(), engine, {})).drive()
    assert sum(made.record.requests.num_preemptions) == 0 or load.losses
    assert made.finished() == len(load.requests)


def test_in_a_burst_it_preempts_nobody_and_its_tail_is_shorter():
    """The same burst overflows vllm. Compute costs the same: the longest batches are slower."""
    little = [*SMALL, "engine.max_num_seqs=256"]
    _, oracle = run([*little, "system=infinite_kv"])
    _, vllm = run([*little, "system=vllm", "engine.kv_blocks=900"])
    assert sum(oracle.requests.num_preemptions) == 0 < sum(vllm.requests.num_preemptions)
    worst = [max(b - a for a, b in zip(one.requests.arrival_ns, one.requests.first_token_ns))
             for one in (oracle, vllm)]  # fmt: skip
    assert worst[0] < worst[1]


def test_where_memory_suffices_it_is_vllm():
    calm = [*SMALL, "workload.rate=2", "workload.duration_s=40"]
    assert same_times(run([*calm, "system=infinite_kv"])[1], run([*calm, "system=vllm"])[1])


def test_a_limit_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="has KV without limit; use null"):
        run([*SMALL, "system=infinite_kv", "engine.kv_blocks=900"])
    config = compose(["system=infinite_kv"])
    with pytest.raises(ConfigError, match="which is a limit"):
        make_policy("infinite_kv", Load(()).model().info(), config.engine, config.system_options)


@law(4)
@given(loads(small=True))
def test_replies_are_those_of_an_undisturbed_run(load):
    load = Load(**{**load.__dict__, "blocks": 16 * 17, "max_num_seqs": 16})
    play_local(load, lambda info, engine: make_policy("infinite_kv", info, load.engine(max_model_len=256), {}))
