"""The depth of a static pipeline, chosen with the trace in hand."""

from __future__ import annotations

import pytest
from hypothesis import given

from bench.harness import run
from bench.static_pp import best, depths, main, search
from common.config import compose
from common.errors import ConfigError
from systems.registry import make_policy
from tests.baselines.test_vllm_pp import check
from tests.baselines.worlds import Load, Run, loads, play_local
from tests.laws.strategies import law

SMALL = ["cluster.num_instances=4", "workload=poisson", "workload.num_requests=60", "workload.rate=8"]


@law(40)
@given(loads(instances=(2, 3, 4)))
def test_by_default_all_instances_make_one_pipeline(load):
    made = make_policy("static_pp", load.model().info(), load.engine(), {"stages": None})
    Run(load, made, check=check).drive()
    assert all(len(pipeline.set.stages) == load.instances for pipeline in made.pipelines)


def test_the_search_is_the_divisors():
    config = compose(["cluster.num_instances=12", "model=tiny_llama", "hardware=cpu"])
    assert config.model.num_layers < 12
    assert depths(config) == [depth for depth in (1, 2, 3, 4, 6, 12) if depth <= config.model.num_layers]


def test_every_depth_is_run_over_the_same_requests_and_the_best_is_named(capsys):
    rows = search(SMALL)
    assert [row["stages"] for row in rows] == [1, 2, 4] and {row["completed"] for row in rows} == {60}
    chosen = best(rows, "p99_ttft_ms")
    assert chosen["p99_ttft_ms"] == min(row["p99_ttft_ms"] for row in rows)
    assert main([*SMALL, "--by", "mean_tpot_ms"]) == 0
    assert f"system.stages={best(rows, 'mean_tpot_ms')['stages']}" in capsys.readouterr().out


def test_who_finishes_more_is_better_whatever_its_latency():
    rows = [{"stages": 1, "completed": 9, "p99_ttft_ms": 1.0}, {"stages": 2, "completed": 10, "p99_ttft_ms": 5.0},
            {"stages": 4, "completed": 10, "p99_ttft_ms": 5.0}]  # fmt: skip
    assert best(rows, "p99_ttft_ms")["stages"] == 2


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match="chooses system and"):
        search([*SMALL, "system=vllm"])
    with pytest.raises(ConfigError, match="must divide the 4 instances"):
        run([*SMALL, "system=static_pp", "system.stages=3"])
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        run([*SMALL, "system=static_pp", "system.stages=best"])


@law(6)
@given(loads(small=True, instances=(4,)))
def test_replies_are_those_of_an_undisturbed_run(load):
    play_local(load, lambda info, engine: make_policy("static_pp", info, engine, {}))


def test_a_load_fits_every_depth():
    """What a pipeline of all instances can hold grows with its depth."""
    load = Load(((0, 30, 5),) * 4, instances=4)
    held = []
    for stages in (1, 2, 4):
        made = make_policy("static_pp", load.model().info(), load.engine(), {"stages": stages})
        Run(load, made).drive()
        held.append(sum(made.ledger.capacity_blocks(one.set.stages) for one in made.pipelines))
    assert held == [4 * 24, 2 * (2 * 24 + 8), 4 * 24 + 24]
