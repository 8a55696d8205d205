"""The committed matrix, exactly: a change here is either a bug or is blessed with a reason (bench/golden.py)."""

import json

import pytest

from bench.golden import BASELINE, MATRIX, cells, differences


@pytest.mark.parametrize(("case", "seed"), cells())
def test_unchanged(case: str, seed: int) -> None:
    moved = differences(case, seed, json.loads(BASELINE.read_text()))
    assert not moved, "\n".join([*moved, 'if intended: python -m bench.golden --bless "why"'])


def test_baselines_cover_the_matrix() -> None:
    baseline = json.loads(BASELINE.read_text())
    assert set(baseline["cells"]) == {f"{case}/{seed}" for case, seed in cells()}
    assert baseline["reasons"] and len(MATRIX) >= 8
