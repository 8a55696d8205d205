"""The committed matrices, exactly: a change here is either a bug or is blessed with a reason (bench/regress.py)."""

import pytest

from bench.golden import HARNESS, SYSTEMS, Matrix, moved

CELLS = [(matrix, case, seed) for matrix in (HARNESS, SYSTEMS) for case, seed in matrix.cells()]


@pytest.mark.parametrize(("matrix", "case", "seed"), CELLS, ids=[f"{case}/{seed}" for _, case, seed in CELLS])
def test_unchanged(matrix: Matrix, case: str, seed: int) -> None:
    lines = moved(matrix, case, seed, matrix.measure(case, seed), matrix.read())
    assert not lines, "\n".join([*lines, 'if intended: python -m bench.regress --bless --reason "why"'])


@pytest.mark.parametrize("matrix", [HARNESS, SYSTEMS])
def test_baselines_cover_the_matrix(matrix: Matrix) -> None:
    baseline = matrix.read()
    assert set(baseline["cells"]) == {f"{case}/{seed}" for case, seed in matrix.cells()}
    assert baseline["reasons"] and len(matrix.cases) >= 8
