"""Measured profiles: from tables to a grid and a hardware file that the simulator takes, by path and by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bench.profile import measure
from common.config import compose
from common.cost.model import InstanceCost
from common.cost.profile import fit_profile, nonnegative
from common.cost.profiles import with_profile
from common.cost.specs import load_hardware
from common.errors import ConfigError
from common.sweep import plan, run_sweep

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """A toy profile of this CPU."""
    folder = tmp_path_factory.mktemp("profiles")
    tables = folder / "tables" / "here"
    measure(["tiny_llama"], torch.device("cpu"), torch.float32, "toy", tables, quiet=True)
    return fit_profile(tables, "here", folder / "hardware")


def test_the_simulator_takes_it_by_path_and_by_name(profile, monkeypatch):
    options = ["model=tiny_llama", "model.dtype_bytes=4", "cost.traits=profile"]
    by_path = compose([f"hardware={profile}", *options])
    monkeypatch.setenv("KVPLANE_PROFILES", str(profile.parent.parent))
    by_name = compose(["hardware=here", *options])
    assert by_path.hardware == by_name.hardware and by_name.hardware.dtype_bytes == 4
    traits = by_name.traits
    assert not traits.async_scheduling and traits.host_ns == by_name.hardware.host_ns and traits.padded(3) == 3
    cost = InstanceCost(by_name.model, by_name.hardware, engine=traits)
    assert cost.decode_ns(8, 64) > cost.decode_ns(1, 64) > traits.host_ns
    assert cost.iteration_ns([(32, 0)], 1, 64, 2) > cost.min_iteration_ns([(32, 0)], 1, 64, 2) > 0


@pytest.mark.parametrize("by_path", [True, False])
def test_a_sweep_takes_it_beside_a_card(profile, monkeypatch, tmp_path, by_path):
    monkeypatch.setenv("KVPLANE_PROFILES", "" if by_path else str(profile.parent.parent))
    seen = []

    def execute(config, _):
        seen.append(config.hardware)
        raise ConfigError("no run")

    own = profile if by_path else "here"
    options = ["model=tiny_llama", "model.dtype_bytes=4", f"run.results={tmp_path}"]
    jobs = run_sweep(plan(["-m", f"hardware={own},cpu", *options]), execute, lambda _: None)
    assert len(jobs) == 2 and all(job.error == "no run" for job in jobs)
    assert seen == [compose([f"hardware={name}", *options]).hardware for name in (own, "cpu")]
    assert seen[0].grid == str(profile.with_suffix(".npz")) and seen[1].grid != seen[0].grid


def test_what_was_measured_is_what_is_said(profile):
    """An operator at a measured shape costs what it cost, to the rounding of the grid."""
    config = compose([f"hardware={profile}", "model=tiny_llama", "model.dtype_bytes=4"])
    cost = InstanceCost(config.model, config.hardware)
    tables = profile.parent.parent / "tables" / "here" / "tiny_llama"
    rows = np.genfromtxt(tables / "dense.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    found = {(row["layer"], int(row["tokens"])): float(row["time_us"]) for row in rows}
    times = cost.operators.linear(2 * 176, 64, np.array([1.0, 8.0, 64.0]))
    assert times / 1e3 == pytest.approx([found["gate_up_proj", m] for m in (1, 8, 64)], rel=2e-3)
    rows = np.genfromtxt(tables / "attention.csv", delimiter=",", names=True)
    measured = {tuple(int(row[i]) for i in range(4)): row[4] for row in rows}
    assert cost.attention.decode_ns(8, 128) / 1e3 == pytest.approx(measured[0, 0, 8, 128], rel=2e-3)
    assert cost.attention.chunk_ns(32, 64) / 1e3 == pytest.approx(measured[32, 64, 0, 0], rel=2e-3)


def test_a_model_of_another_type_is_refused(profile):
    config = compose([f"hardware={profile}", "model=tiny_llama"])
    with pytest.raises(ConfigError, match=r"model\.dtype_bytes=4"):
        InstanceCost(config.model, config.hardware)


def test_traits_of_a_profile_need_a_profile():
    with pytest.raises(ConfigError, match=r"cost\.traits=profile"):
        compose(["cost.traits=profile"])


def test_names_of_conf_hardware_stay_what_they_are(monkeypatch, tmp_path):
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "cpu.yaml").write_text("name: other")
    monkeypatch.setenv("KVPLANE_PROFILES", str(tmp_path))
    assert with_profile(["hardware=cpu", "seed=1"]) == ["hardware=cpu", "seed=1"]
    with pytest.raises(ConfigError, match="unknown hardware"):
        compose(["hardware=nowhere/cpu.yaml"])


def test_the_file_says_what_was_not_measured(profile):
    text = yaml.safe_load(profile.read_text())
    assert "not measured: nic_latency_ns, disk_bandwidth, startup_ns" in text["provenance"]
    facts = json.loads((profile.parent.parent / "tables" / "here" / "device.json").read_text())
    hardware = load_hardware(text)
    assert hardware.peak_flops >= facts["matmul_flops"] and hardware.mem_bandwidth >= facts["copy_bandwidth"]


@pytest.mark.parametrize("host", [(3.0, 2.0), (0.0, 2.0), (3.0, 0.0)])
def test_host_time_is_never_negative(host):
    rows = np.array([[1.0, n] for n in (1, 4, 16, 64)])
    assert nonnegative(rows, rows @ host, np.ones(4)) == pytest.approx(host)
    assert (nonnegative(rows, np.array([5.0, 4, 2, -9]), np.ones(4)) >= 0).all()
