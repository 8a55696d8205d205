"""The experiments' files follow the rule that they claim, and the bench finds its systems."""

import numpy as np
import pytest

from bench.kunserve.rule import POINTS, SHARE, prefill_s
from bench.kunserve.runs import DECLARED, ORACLES, Found, mean_until, systems
from bench.kunserve.timelines import BIN_S, tokens_over_time, ttft_over_time
from common.build import cluster_model
from common.config import compose
from common.metrics import summarize
from tests.kunserve.worlds import Burst as Small
from tests.kunserve.worlds import Run
from workloads.config import Burst, Diurnal


@pytest.mark.parametrize("name", POINTS)
def test_rates_follow_the_rule(name: str) -> None:
    config = compose([f"experiment=kunserve/{name}"])
    levels = getattr(config.workload, "levels", (1.0,))
    by_rule = SHARE * config.cluster.num_instances / prefill_s(config) * sum(levels) / len(levels)
    assert isinstance(config.workload, Burst | Diurnal)
    assert config.workload.rate == pytest.approx(by_rule, rel=0.01)


def test_systems_are_declared_ones_in_order() -> None:
    found = systems()
    assert found == [name for name in DECLARED if name in found] and found[0] == "vllm" and "kunserve" in found
    assert not set(systems(oracles=False)) & set(ORACLES)


def test_a_remap_costs_what_the_cluster_says() -> None:
    model = cluster_model(compose(["system=kunserve", "cluster.remap_ms=7.5"]))
    assert model.remap_ns == 7_500_000
    burst, waits = Small(((0, 100, 60),) * 16, 2, 24), []
    for remap_ns in (model.remap_ns, 1_000):
        rows = Run(burst, model=burst.model(remap_ns=remap_ns)).drive().record.remaps
        waits.append([end - start for start, end, kind in zip(rows.start_ns, rows.end_ns, rows.kind) if kind == "drop"])
    assert len(waits[0]) == 2 and min(waits[0]) >= 7_500_000 > 1_000_000 > max(waits[1])


def test_mean_over_time_weighs_by_time() -> None:
    assert mean_until(np.array([0.0, 1.0, 3.0]), np.array([2.0, 2.0, 2.0]), 3.0) == pytest.approx(2.0)


def test_tokens_over_time_are_all_of_them_and_where_they_were_made() -> None:
    """Two instances, three requests; nobody arrives in the second bin, and the last bin has the last request alone."""
    late_us = round(2.5 * BIN_S * 1e6)
    run = Run(Small(((0, 100, 40), (0, 64, 30), (late_us, 100, 20)), 2, 40)).drive()
    config = compose(["workload=poisson"])
    found = Found(config, run.record, summarize(run.record, config.slo, 1))
    seconds, rate = tokens_over_time(found)
    assert list(seconds) == [0.0, BIN_S, 2 * BIN_S]
    assert rate * BIN_S == pytest.approx([70, 0, 20])
    seconds, mean = ttft_over_time(found)
    assert list(np.isnan(mean)) == [False, True, False], "where nobody arrives there is no mean"
