"""What the terminal says of workers that are lost, and of a configuration whose workers could never work."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import run as cli
from common import build_dist
from common.comm.hub import Hub
from common.console import lost_workers
from tests.dist.pool import after_orders, own_hub_closed

ONE = ["system=vllm", "workload=poisson", "workload.num_requests=12", "workload.rate=40", "workload.length_scale=0.25",
       "workload.max_prompt_tokens=800", "workload.overlong=clip", "engine.max_model_len=1024", "model=tiny_llama",
       "hardware=cpu", "cluster.num_instances=2", "runtime=dist", "run.figures=false", "run.trace=false",
       "run.name=r"]  # fmt: skip


def kill_in(monkeypatch: pytest.MonkeyPatch, *instances: int) -> None:
    """The next run's workers of these instances get a SIGKILL in the middle of it."""
    own_hub_closed()

    class Doomed(Hub):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            after_orders(self, {60: self.doom})

        def doom(self) -> None:
            for instance in instances:
                os.kill(self.processes[1 + instance].pid or 0, signal.SIGKILL)

    monkeypatch.setattr(build_dist, "Hub", Doomed)


@pytest.mark.parametrize("clock", ["modelled", "measured"])
def test_a_lost_worker_is_told_below_the_table(
    tmp_path: Path, clock: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_in(monkeypatch, 1)
    assert cli.main([*ONE, f"runtime.clock={clock}", f"run.results={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [at] = [at for at, line in enumerate(lines) if line.startswith("worker of instance 1 was lost: ")]
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    num = summary["num_lost_stalls"]
    assert lines[at + 1] == (f"{num} running requests lost their KV by that and were computed anew" if num else
                             "no running request lost its KV by that")  # fmt: skip
    assert summary["completed"] == 12


@pytest.mark.parametrize("clock", ["modelled", "measured"])
def test_a_run_without_workers_names_them_in_the_line_that_it_ends_with(
    tmp_path: Path, clock: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_in(monkeypatch, 0, 1)
    assert cli.main([*ONE, f"runtime.clock={clock}", f"run.results={tmp_path}"]) == 1
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "requests live but" in line and "; lost workers, by instance: " in line and "0 (" in line and "1 (" in line
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["stopped"] in line and sorted(manifest["engine"]["lost_workers"]) == ["0", "1"]
    live = json.loads((tmp_path / "r" / "summary.json").read_text())["live_at_end"]
    assert live > 0 and f"{live} requests were left unfinished" in out


def test_nothing_is_said_of_workers_where_none_is_lost() -> None:
    assert lost_workers({}, {"num_lost_stalls": 3, "live_at_end": 1}) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_nccl_without_a_gpu_is_one_line_before_any_worker(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_dist, "Hub", None)
    assert cli.main([*ONE, "runtime.backend=nccl", f"runtime.device={device}", f"run.results={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "runtime.backend=nccl needs a GPU per worker, and this run's device is cpu; use runtime.backend=gloo" in err
    assert len(err.splitlines()) == 1
