"""The regression check itself: it is quiet when nothing moved, and names what was broken on purpose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import regress
from bench.golden import KEYS, SYSTEMS, Matrix
from common.cost.model import InstanceCost
from common.executors.memory import InstanceMemory

MATRIX = ["--only", "matrix"]


def pick(tmp_path: Path, *names: str) -> Matrix:
    cases = {name: SYSTEMS.cases[name] for name in names}
    return replace(SYSTEMS, baseline=tmp_path / "some.json", cases=cases, seeds=(0,))


@pytest.fixture
def blessed(tmp_path: Path) -> Matrix:
    matrix = pick(tmp_path, "kunserve: poisson", "mell: burst, little memory")
    assert regress.main([*MATRIX, "--bless", "--reason", "first"], [matrix]) == 0
    return matrix


def test_three_clean_runs_in_a_row_pass(blessed: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for _ in range(3):
        assert regress.main(MATRIX, [blessed]) == 0
        assert capsys.readouterr().out == "2 cells of some.json unchanged\n"


def test_five_percent_in_one_cost_constant_is_caught_and_named(
    blessed: Matrix, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = InstanceCost._dense_table

    def slower(self: InstanceCost, upto: int) -> list[int]:
        return [time_ns * 105 // 100 for time_ns in dense(self, upto)]

    monkeypatch.setattr(InstanceCost, "_dense_table", slower)
    assert regress.main(MATRIX, [blessed]) == 1
    out = capsys.readouterr().out
    assert "kunserve: poisson, seed 0: mean_tpot_ms was " in out and "(+" in out and "mell: burst" in out


@pytest.mark.parametrize("case", ["kunserve: poisson", "infinite_llm: burst, little memory", "memserve: sessions"])
def test_a_block_dropped_in_a_pool_is_caught_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """Once, on one instance. In a pool that never fills nobody notices until the run is over; then the law does."""
    matrix = pick(tmp_path, case)
    assert regress.main([*MATRIX, "--bless", "--reason", "first"], [matrix]) == 0
    give = InstanceMemory.give
    dropped: list[InstanceMemory] = []

    def leaky(self: InstanceMemory, cells: int) -> None:
        lost = 0 if dropped or cells < self.info.num_layers else self.info.num_layers
        dropped.extend([self] * bool(lost))
        give(self, cells - lost)

    monkeypatch.setattr(InstanceMemory, "give", leaky)
    capsys.readouterr()
    assert regress.main(MATRIX, [matrix]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(case)]
    assert f"{case}, seed 0: raised ContractError: instance {dropped[0].info.instance}" in line, line


def test_blessing_needs_a_reason_and_keeps_the_old_ones(blessed: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    assert regress.main(["--bless"], [blessed]) == 2
    assert regress.main(["--reason", "x"], [blessed]) == 2
    assert "--reason" in capsys.readouterr().err
    tree = json.loads(blessed.baseline.read_text())
    tree["cells"]["kunserve: poisson/0"]["mean_ttft_ms"] = 1.0
    blessed.baseline.write_text(json.dumps(tree))
    assert regress.main([*MATRIX, "--bless", "--reason", "second"], [blessed]) == 0
    assert "kunserve: poisson, seed 0: mean_ttft_ms was 1.0" in capsys.readouterr().out
    assert blessed.read()["reasons"] == ["first", "second"]
    assert regress.main(MATRIX, [blessed]) == 0


def test_json_is_what_github_action_benchmark_reads(blessed: Matrix, tmp_path: Path) -> None:
    assert regress.main([*MATRIX, "--quick", "--json", str(tmp_path / "rows.json")], [blessed]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == {"name", "unit", "value"} and isinstance(row["value"], int | float) for row in rows)
    units = {row["name"]: row["unit"] for row in rows}
    assert units["kunserve: poisson/0: mean_ttft_ms"] == "ms" and len(units) == len(rows) >= 2 * len(KEYS) - 2
