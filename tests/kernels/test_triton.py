"""Triton kernels: interpreted in a process of their own, on a GPU where there is one, and compiled without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from common.kernels import compile_check
from tests.kernels.triton_checks import CHECKS, compare

ROOT = Path(__file__).resolve().parents[2]


def run_module(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=kept | environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip


def test_kernels_under_the_interpreter():
    done = run_module("tests.kernels.triton_checks", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(CHECKS)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_on_the_gpu(name):
    CHECKS[name]("cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (32, 4)])
def test_larger_rows_on_the_gpu(dtype, heads):
    spec = [(1, 4999, 0, 5000), (1, 700, 0, 701), (300, 200, 0, 500), (130, 900, 0, 800), (1, 10, 16, 40)]
    for splits in (None, 1, 8):
        compare("cuda", spec, 16, heads, 128, dtype=dtype, splits=splits)


def test_compilation_without_a_gpu(tmp_path):
    done = run_module("common.kernels.compile_check", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "compile.json").read_text())["kernels"]
    assert {row["kernel"] for row in rows} == {
        "decode_kernel", "merge_kernel", "prefill_kernel", "write_kernel", "copy_kernel"}  # fmt: skip
    assert all(row["registers"] > 0 and row["spilled_bytes"] == 0 for row in rows)
    assert len((tmp_path / "compile.md").read_text().splitlines()) == len(rows) + 5


def test_compilation_refuses_the_interpreter():
    done = run_module("common.kernels.compile_check", TRITON_INTERPRET="1")
    assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


def test_spills_are_told_and_fail(tmp_path, monkeypatch, capsys):
    row = dict.fromkeys(compile_check.COLUMNS, 1)
    monkeypatch.setattr(compile_check, "cases", lambda quick: [None])
    monkeypatch.setattr(compile_check, "compile_case", lambda case, target: row)
    assert compile_check.main(["--quick", "--out", str(tmp_path / "deep" / "er")]) == 1
    assert "spills 1 bytes" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["compile.json", "compile.md"]


def test_the_committed_table_is_of_these_kernels():
    """Every compilation is listed, and none spills (rerun `python -m common.kernels.compile_check` after a change)."""
    rows = json.loads((ROOT / "results/kernels/compile.json").read_text())["kernels"]
    listed = [tuple(row[column] for column in compile_check.COLUMNS[:6]) for row in rows]
    expected = [(case.kernel, target, *case[1:5]) for case in compile_check.cases(False)
                for target in compile_check.TARGETS]  # fmt: skip
    assert listed == expected
    assert not any(row["spilled_bytes"] for row in rows)
