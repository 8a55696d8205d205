"""The suite for GPU machines at toy size on this CPU: sections run apart, failures are one line, the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_suite
from bench.iterations import Engine, Shape
from bench.suite import TOY, Context, Section, Work, paged
from bench.suite_attention import as_blocks, attention
from bench.suite_kernels import error, kernels, plain, truth
from bench.suite_rivals import flashinfer
from common.engine import runner
from common.kernels import select
from tests.engine.worlds import tiny_spec
from tests.kernels.test_flash import varlen

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["kernels", "attention", "copies", "arena", "engine", "tests"])
def test_a_section_finds_nothing_wrong_on_a_cpu(name):
    with torch.inference_mode():
        section = gpu_suite.section_named(name)(Context(torch.device("cpu"), TOY))
    assert section.failed == []
    assert section.notes or all(section.tables.values())


def test_flash_is_checked_and_timed_in_blocks_that_it_takes(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(select, "_obstacle", lambda name, *_: "not here" if name == "triton" else "")
    context = Context(torch.device("cpu"), TOY)
    found = kernels(context)
    rows = [row for row in found.tables["Attention against fp64"] if row["backend"] == "flash"]
    assert found.failed == [] and len(rows) == len(context.dtypes) * len(TOY.checks)
    timed = attention(context)
    assert timed.failed == []
    for title in ("Decode", "Prefill"):
        [row] = [row for row in timed.tables[title] if row["attention"] == "ours: flash"]
        assert float(row["difference"]) < 1e-5


def test_keys_in_larger_blocks_are_the_same_keys():
    case = paged(Work(3, 2, 37), TOY.heads, torch.float32, torch.device("cpu"))
    larger = as_blocks(case, 32)
    assert larger.block_size == 32 and larger.kvs[0].shape[0] == 3 * 2
    for ours, theirs in zip(larger.dense[0], case.dense[0]):
        assert torch.equal(ours, theirs)


class Wrapper:
    """Stands in for both of FlashInfer's: `plan` as documented, `run` by plain attention over the pages."""

    def __init__(self, workspace, layout):
        assert layout == "NHD"

    def plan(self, *sums, causal=False, q_data_type, kv_data_type, sm_scale):
        *first, self.pages, self.last, _, _, _, self.size = sums
        self.keys, self.queries = first[-1].tolist(), first[0].tolist() if len(first) == 2 else None
        self.causal, self.scale = causal, sm_scale

    def run(self, q, kv):
        out, starts = torch.empty_like(q), self.queries or list(range(len(self.keys)))
        for row in range(len(self.keys) - 1):
            begin, end = starts[row : row + 2]
            length = (self.keys[row + 1] - self.keys[row] - 1) * self.size + int(self.last[row])
            pages = kv[self.pages[self.keys[row] : self.keys[row + 1]].long()]
            k, v = (pages[:, half].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // kv.shape[3], 1)
                    for half in (0, 1))  # fmt: skip
            logits = torch.einsum("qhd,khd->hqk", q[begin:end], k) * self.scale
            later = torch.arange(length) > torch.arange(length - (end - begin), length)[:, None]
            assert self.causal or end - begin == 1
            weights = logits.masked_fill(later, float("-inf")).softmax(-1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v)
        return out


@pytest.mark.parametrize("work", [Work(3, 1, 37), Work(2, 9, 20)])
def test_flashinfer_is_asked_for_decodes_and_for_prompts(work, monkeypatch):
    library = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    case = paged(work, TOY.heads, torch.float32, torch.device("cpu"))
    [call] = flashinfer(case, 0.125)
    assert error(call(), plain(case, 0.125).double()) < 1e-5


STUB = """#!/bin/sh
case "$*" in *is_available*) exit 1 ;; esac
echo "$@" >> "$0.calls"
"""


@pytest.mark.parametrize("options", [["--device", "cpu"], ["--device=cpu"], ["--device=cpu", "--only", "arena"]])
def test_the_script_installs_nothing_for_a_cpu(options, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "gpu_suite.sh").write_text((ROOT / "bench" / "gpu_suite.sh").read_text())
    for python in (tmp_path / ".venv" / "bin" / "python", tmp_path / "path" / "python3"):
        python.parent.mkdir(parents=True)
        python.write_text(STUB)
        python.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(tmp_path / "bench" / "gpu_suite.sh"), *options], env=environment)
    calls = (tmp_path / ".venv" / "bin" / "python.calls").read_text().splitlines()
    assert done.returncode == 0 and calls == ["-c import torch", " ".join(["-m bench.gpu_suite", *options])]


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
