"""The suite for GPU machines at toy size on this CPU: sections run apart, failures are one line, the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_suite
from bench.iterations import Engine, Shape
from bench.suite import TOY, Context, Section, Work, paged
from bench.suite_kernels import error, plain, truth
from common.engine import runner
from tests.engine.worlds import tiny_spec

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["kernels", "attention", "copies", "arena", "engine", "tests"])
def test_a_section_finds_nothing_wrong_on_a_cpu(name):
    with torch.inference_mode():
        section = gpu_suite.section_named(name)(Context(torch.device("cpu"), TOY))
    assert section.failed == []
    assert section.notes or all(section.tables.values())


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hypothesis", "transformers", "safetensors", "hydra", "pandas", "matplotlib"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
"""


def test_tests_for_the_gpu_need_torch_and_pytest_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # fmt: skip
    files = gpu_suite.gpu_test_files()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--collect-only", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {Path(file).name for file in files} >= {"test_triton.py", "test_arena_cuda.py", "test_graphs.py",
                                                   "test_pretended_cuda.py"}  # fmt: skip


def test_each_timed_iteration_is_planned_anew(monkeypatch):
    shape, planned = Shape(0, 0, 0, 2, 20), []
    world = Engine(tiny_spec(), torch.device("cpu"), shape.kv_blocks)
    make = runner.plan_band
    monkeypatch.setattr(runner, "plan_band", lambda *args: planned.append(1) or make(*args))
    assert world.seconds(shape, 3, 0.0) > 0 and len(planned) == 2 + 3
    world.close()


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
