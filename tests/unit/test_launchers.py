"""Sweeps whose jobs run elsewhere: outcomes come back from other processes; a missing plugin is one line."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus

import run as cli
from common.sweep import LAUNCHERS, check_launcher

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


def _elsewhere(self: BasicLauncher, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
    """Each job in a process of its own, the last one first, as a cluster might."""
    out = []
    for index, overrides in reversed(list(enumerate(job_overrides, initial_job_idx))):
        process = multiprocessing.get_context("fork").Process(target=LAUNCH, args=(self, [overrides], index))
        process.start()
        process.join()
        out.append(JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=None))
    return out


LAUNCH: Any = BasicLauncher.launch


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
