"""`python -m workloads.describe`: numbers, a figure, and one line for a mistake."""

import json
from pathlib import Path

import pytest

from workloads.describe import load, main


def test_figure_and_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workload=sessions", "workload.num_requests=200", "seed=3", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["statistics.json", "workload.pdf", "workload.png"]
    stats = json.loads((tmp_path / "statistics.json").read_text())
    assert stats["requests"] == 200 and 0.7 < stats["prefix_share_of_tokens"] < 0.95
    printed = capsys.readouterr().out
    assert "turns_mean" in printed and "provenance: sessions" in printed


def test_overrides_are_yaml(tmp_path: Path) -> None:
    name, seed, mapping = load(
        [
            "workload=burst",
            "lengths.prompt.kind=fixed",
            "lengths.prompt.tokens=5",
            "seed=9",
            "window_s=[1, 2]",
            "rate=null",
            "cv=1e-1",
        ]
    )
    assert (name, seed) == ("burst", 9)
    assert mapping["lengths"] == {"prompt": {"kind": "fixed", "tokens": 5}}
    assert mapping["window_s"] == [1, 2] and mapping["rate"] is None and mapping["cv"] == 0.1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["workload=brust"], "workload=brust is unknown; choose one of: agents, burst"),
        ([], "workload=None is unknown"),
        (["workload=burst", "rte=3"], "workload.rte is not a key of 'burst'"),
        (["workload=burst", "rate"], "'rate' is not key=value"),
        (["workload=burst", "rate=[1"], "not a YAML value"),
        (["workload=burst", "seed=x"], "seed must be a whole number"),
        (["workload=burst", "seed=-1"], "seed must be a whole number"),
        (["workload=file", "path=none.csv"], "workload.path=none.csv: no such file"),
    ],
)
def test_mistakes(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*args, "--no-figure"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert main(["workload=closed_loop", "--out", str(tmp_path / "taken")]) == 2
    assert "cannot be written" in capsys.readouterr().err
