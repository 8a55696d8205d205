"""Sweeps whose jobs run elsewhere: outcomes come back from other processes; a missing plugin is one line."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus

import run as cli
from common.config import RunConfig
from common.errors import ConfigError
from common.sweep import BEGUN, LAUNCHERS, Job, check_launcher, watched

SMALL = ["workload=poisson", "workload.num_requests=30", "workload.rate=20", "cluster.num_instances=2",
         "run.trace=false", "run.figures=false"]  # fmt: skip


@pytest.mark.parametrize("name", [name for name, plugin in LAUNCHERS.items() if plugin])
def test_a_launcher_whose_plugin_is_missing_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        check_launcher([f"hydra/launcher={name}"])
    except Exception:
        assert cli.main(["-m", "system=vllm,mell", f"hydra/launcher={name}", *SMALL]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "which is not installed: pip install hydra-" in err
    else:
        pytest.skip(f"hydra-{LAUNCHERS[name]}-launcher is installed here")


def test_an_unknown_launcher_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", "system=vllm,mell", "hydra/launcher=cloud", *SMALL]) == 2
    assert capsys.readouterr().err.startswith("error: hydra/launcher=cloud is unknown; choose one of: basic, joblib")


Plugins.instance()  # Hydra's scan makes the plugins' classes anew, so they are taken only now
BasicLauncher: Any = importlib.import_module("hydra._internal.core_plugins.basic_launcher").BasicLauncher
LAUNCH = BasicLauncher.launch
OWN = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": ["hydra.launcher.timeout_min=5"],
       "ray": ["hydra.launcher.ray.init.address=local", "+hydra.launcher.ray.init.num_cpus=2"]}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", list(OWN))
def test_the_real_launcher_runs_a_comparison(name: str, tmp_path: Path) -> None:
    """In a process of its own: what a user would type, from its first line of progress to the table."""
    try:
        check_launcher([f"hydra/launcher={name}"])
    except ConfigError as error:
        pytest.skip(str(error))
    arguments = ["-m", f"hydra/launcher={name}", *OWN[name], "system=vllm,infinite_llm,mell", *SMALL]
    done = subprocess.run([sys.executable, "run.py", *arguments, f"run.results={tmp_path}"], cwd=ROOT, timeout=300,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compare-poisson" / "comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["vllm", "infinite_llm", "mell"]
    assert "against vllm:" in done.stdout
    assert all(f"[{number}/3] {system}" in done.stderr + done.stdout
               for number, system in enumerate(("vllm", "infinite_llm", "mell"), 1))  # fmt: skip
    assert cli.main(["-m", "system=vllm,infinite_llm,mell", *SMALL, f"run.results={tmp_path / 'here'}"]) == 0
    here = json.loads((tmp_path / "here" / "compare-poisson" / "comparison.json").read_text())
    assert [row["per_seed"] for row in here["rows"]] == [row["per_seed"] for row in found["rows"]]


def test_jobs_that_write_elsewhere_are_told_as_they_begin_and_end(tmp_path: Path) -> None:
    lines: list[str] = []

    def leave(number: int, job: Job) -> None:
        (tmp_path / f"{number:06d}.json").write_text(json.dumps(vars(job)))

    with watched(tmp_path, 2, lines.append, every_s=0.01):
        leave(0, Job("vllm", "", None, BEGUN))
        while not lines:
            pass
        leave(0, Job("vllm", "", None))
        leave(1, Job("mell", "", None, "no room"))
    assert lines == ["[1/2] vllm ...", "[1/2] vllm: finished", "[2/2] mell: failed (no room)"]


def test_a_job_that_is_killed_is_named_and_the_others_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = cli.execute

    def deadly(config: RunConfig, quiet: bool = False) -> Any:
        if config.system == "kunserve":
            os._exit(9)
        return execute(config, quiet)

    def launch(self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        _elsewhere(self, job_overrides, initial_job_idx)
        raise RuntimeError("a worker died")

    monkeypatch.setattr(cli, "execute", deadly)
    monkeypatch.setattr(BasicLauncher, "launch", launch)
    assert cli.main(["-m", "system=vllm,kunserve,mell", *SMALL, f"run.results={tmp_path}"]) == 2
    found = json.loads((tmp_path / "compare-poisson" / "comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["vllm", "mell"]
    assert f"failed: kunserve: {BEGUN}" in " ".join(capsys.readouterr().out.split())


def _elsewhere(self: Any, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
    """Each job in a process of its own, the last one first, as a cluster might."""
    out = []
    for index, overrides in reversed(list(enumerate(job_overrides, initial_job_idx))):
        process = multiprocessing.get_context("fork").Process(target=LAUNCH, args=(self, [overrides], index))
        process.start()
        process.join()
        out.append(JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=None))
    return out


def test_outcomes_come_back_from_other_processes_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BasicLauncher, "launch", _elsewhere)
    arguments = ["-m", "system=vllm,kunserve,mell", "engine.prefix_caching=true,false", *SMALL]
    assert cli.main([*arguments, f"run.results={tmp_path}"]) == 2, "kunserve and mell refuse prefix caching"
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "compare-poisson" / "comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == [
        "vllm engine.prefix_caching=True", "vllm engine.prefix_caching=False",
        "kunserve engine.prefix_caching=False", "mell engine.prefix_caching=False",
    ]  # fmt: skip
    assert "failed: kunserve engine.prefix_caching=True" in out
    assert not list(tmp_path.glob(".sweep-*"))
