"""The experiments' files follow the rule that they claim, and the bench finds its systems."""

import pytest

from bench.kunserve.rule import POINTS, SHARE, prefill_s
from bench.kunserve.runs import DECLARED, ORACLES, mean_until, systems
from common.config import compose
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


def test_mean_over_time_weighs_by_time() -> None:
    import numpy as np

    assert mean_until(np.array([0.0, 1.0, 3.0]), np.array([2.0, 2.0, 2.0]), 3.0) == pytest.approx(2.0)
