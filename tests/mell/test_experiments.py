"""The experiments' files compose, and the benches name only what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.mell import gpus, variants
from common.config import compose

CONF = Path(__file__).resolve().parents[2] / "conf" / "experiment" / "mell"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
CASES = [*gpus.cases(5), *variants.cases()]


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_composes(name):
    config = compose([f"experiment=mell/{name}"])
    assert config.system == "mell" and config.run_name == f"mell_{name}"
    assert not config.engine.prefix_caching


def test_every_case_has_a_key_of_its_own_and_every_experiment_is_run():
    assert len({case.key for case in CASES}) == len(CASES)
    assert {case.experiment for case in CASES} | {"two_models"} == set(NAMES)
    assert len({case.seed for case in gpus.cases(5)}) == 5


def test_cases_of_one_experiment_differ_in_what_their_names_say():
    by_setting = {}
    for case in CASES:
        by_setting.setdefault((case.experiment, case.system, case.seed, case.overrides), []).append(case.key)
    twice = [keys for keys in by_setting.values() if len(keys) > 1]
    assert twice == []


def test_composed_settings_reach_the_run():
    case = next(case for case in variants.cases() if case.key.startswith("hybrid/1.25e+08/mell/migration=tokens"))
    config = compose([f"experiment=mell/{case.experiment}", f"system={case.system}", *case.overrides])
    assert config.hardware.nic_bandwidth == 1.25e8 and config.system_options["migration"] == "tokens"
    assert config.cluster.gpus_per_node == 1
