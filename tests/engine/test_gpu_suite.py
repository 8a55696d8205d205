"""The suite for GPU machines at toy size on this CPU: sections run apart, failures are one line, the rest goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_suite
from bench.suite import TOY, Context, Section, Work, paged
from bench.suite_kernels import error, plain, truth

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["kernels", "attention", "copies", "arena", "engine", "tests"])
def test_a_section_finds_nothing_wrong_on_a_cpu(name):
    with torch.inference_mode():
        section = gpu_suite.section_named(name)(Context(torch.device("cpu"), TOY))
    assert section.failed == []
    assert section.notes or all(section.tables.values())


def test_plain_attention_is_near_the_truth_and_wrong_answers_are_not():
    case = paged(Work(2, 5, 40), TOY.heads, torch.float32, torch.device("cpu"))
    true_o, _ = truth(case, 0.125)
    o = plain(case, 0.125)
    assert error(o, true_o) < 1e-5 < error(o.roll(1, 0), true_o)


def test_the_suite_writes_its_report_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    asked = []

    def apart(name, device, sizes, limit_s):
        asked.append(name)
        failed = ["kernel x: error 1"] if name == "kernels" else []
        return {"tables": {f"T {name}": [{"a": 1.0}]}, "failed": failed, "notes": [], "seconds": 0.1}

    monkeypatch.setattr(gpu_suite, "run_apart", apart)
    assert gpu_suite.main(["--device", "cpu", "--out", str(tmp_path), "--name", "cpu_suite"]) == 1
    assert asked == list(gpu_suite.LIMIT_S)
    found = json.loads((tmp_path / "cpu_suite.json").read_text())
    assert found["sections"]["kernels"]["failed"] == ["kernel x: error 1"] and "torch" in found["versions"]
    assert "kernel x: error 1" in (tmp_path / "cpu_suite.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"


def test_a_section_that_dies_or_hangs_ends_alone(monkeypatch):
    monkeypatch.setattr(gpu_suite.sys, "executable", "/bin/false")
    assert gpu_suite.run_apart("kernels", "cpu", "toy", 5)["failed"] == ["exited with 1: "]
    assert gpu_suite.supervised(["sleep", "30"], {"PATH": "/bin:/usr/bin"}, 0.2) == "stopped after 0 s"


def test_an_exception_becomes_one_line(tmp_path, monkeypatch):
    def broken(name):
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr(gpu_suite, "section_named", broken)
    gpu_suite.run_here("kernels", "cpu", "toy", tmp_path / "x")
    assert json.loads((tmp_path / "x").read_text())["failed"] == ["RuntimeError: one"]
    assert Section().failed == []


def test_the_suite_needs_neither_hydra_nor_pyarrow():
    """What a bare GPU machine may not have."""
    script = (
        "import sys\nfrom importlib.abc import MetaPathFinder\n"
        "class Refuse(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('hydra', 'omegaconf', 'pyarrow', 'wandb'):\n"
        "            raise ImportError(f'{name} is not to be imported here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import bench.gpu_suite, bench.suite_kernels, bench.suite_attention, bench.suite_engine, bench.profile\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_the_suite_says_so(capsys):
    if not torch.cuda.is_available():
        assert gpu_suite.main([]) == 2
        assert "--device cpu" in capsys.readouterr().err
