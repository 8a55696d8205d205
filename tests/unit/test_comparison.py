"""Several systems side by side: one sweep, one table, differences with intervals, a fair arena or a word about it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import run as cli
from common.comparison import compared, interval
from common.comparison_text import BLOCKS, WIDTH, as_json, markdown, text
from common.runs import LoadedRun, load_run
from common.sweep import ALL, expanded, plan

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["workload=poisson", "workload.num_requests=60", "workload.rate=20", "cluster.num_instances=2",
         "run.trace=false"]  # fmt: skip


def fake(name: str, seed: int, ttft: float, **summary: float) -> LoadedRun:
    numbers = {"mean_ttft_ms": ttft, "num_requests": 3, "completed": 3, "rejected": 0, "live_at_end": 0, **summary}
    return LoadedRun(Path(name), config={"slo": {"ttft_ms": 5}, "system": {"name": name, "not_for": "rain"}},
                     manifest={"seed": seed, "runtime": "sim", "system": name}, summary=numbers,
                     requests={"prompt_tokens": np.array([1, 2, seed])})  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The whole sweep over two seeds."""
    folder = tmp_path_factory.mktemp("swept")
    command = [sys.executable, "run.py", "-m", "system=all", "seed=0,1", *SMALL, f"run.results={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "compare-poisson", done.stdout, done.stderr


def test_all_means_the_baseline_and_the_four_systems() -> None:
    assert expanded(["system=all"]) == ["system=vllm,kunserve,infinite_llm,memserve,mell"]
    sweep = plan(["-m", "system=all", "seed=0,1", "workload.rate=choice(1,2,3)", "engine.kv_blocks=9"])
    assert sweep.systems == ALL and sweep.num_jobs == 5 * 2 * 3
    overrides = ["system=mell", "seed=1", "workload.rate=2", "engine.kv_blocks=9"]
    assert sweep.row(overrides, "mell") == "mell workload.rate=2"


def test_a_failing_system_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-m", "system=vllm,kunserve,memserve", "engine.prefix_caching=true", *SMALL, "run.figures=false"]
    assert cli.main([*arguments, f"run.results={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: kunserve: system=kunserve does not cache")]
    assert len(errors) == 1 and "Traceback" not in err and "failed: kunserve" in out
    found = json.loads((tmp_path / "compare-poisson" / "comparison.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["vllm", "memserve"]


def test_the_table_is_one_and_fits_a_terminal(swept: tuple[Path, str, str]) -> None:
    _, out, err = swept
    assert max(len(line) for line in out.splitlines() if not line.startswith(("comparison:", "note:"))) <= WIDTH
    for word in ("TTFT", "TPOT", "ITL", "JCT", "P99.9", "goodput", "GPUs", "KV mean", "preemp-", "migra-", "moved",
                 "against vllm", "not designed for", "simulated"):  # fmt: skip
        assert word in out
    assert out.count("TTFT  ") and "[" in out.split("against vllm")[1]
    assert "[1/10] vllm, seed 0" in err and "[10/10] mell, seed 1" in err


def test_files_and_figures_lie_beside_the_runs(swept: tuple[Path, str, str]) -> None:
    folder = swept[0]
    names = {path.name for path in folder.iterdir()}
    assert {"comparison.json", "comparison.md", "compare_differences.pdf", "compare_cdf.png", "vllm-s0"} <= names
    found = json.loads((folder / "comparison.json").read_text())
    [row] = [row for row in found["rows"] if row["name"] == "mell"]
    runs = [load_run(folder / name).summary["mean_ttft_ms"] for name in row["runs"]]
    assert row["per_seed"]["mean_ttft_ms"] == runs and row["mean"]["mean_ttft_ms"] == np.mean(runs)
    assert all(d["interval"][0] <= d["change"] <= d["interval"][1] for d in found["differences"])


def test_a_key_that_fits_some_systems_only_drops_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", "system=vllm,infinite_llm,mell", "system.dispatch=round_robin", *SMALL, "run.figures=false"]
    assert cli.main([*arguments, f"run.results={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert len([line for line in err.splitlines() if line.startswith("error: mell: system.dispatch")]) == 1
    assert (tmp_path / "compare-poisson" / "infinite_llm").is_dir() and "infinite_llm" in out


def test_a_bug_in_one_system_is_one_line_and_a_traceback_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from systems import registry

    monkeypatch.setitem(registry.FACTORIES, "mell", lambda cluster, engine, options: 1 / 0)
    arguments = ["-m", "system=vllm,mell,infinite_llm", *SMALL, "run.figures=false", f"run.results={tmp_path}"]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert "error: mell: ZeroDivisionError" in err and "Traceback" not in err and "infinite_llm" in out
    assert "ZeroDivisionError" in (tmp_path / "compare-poisson" / "mell" / "traceback.txt").read_text()


def test_system_all_without_a_sweep_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["system=all"]) == 2
    assert "-m system=all" in capsys.readouterr().err


def test_an_unfair_arena_is_named() -> None:
    a, b = fake("vllm", 0, 10.0), fake("mell", 0, 20.0)
    assert not any("arena" in note for note in compared([("vllm", a), ("mell", b)]).notes)
    other = replace(b, config={**b.config, "engine": {"kv_blocks": 7}}, requests={"prompt_tokens": np.array([9, 9, 9])},
                    summary={**b.summary, "rejected": 2})  # fmt: skip
    notes = " ".join(compared([("vllm", a), ("mell", other)]).notes)
    assert "engine.kv_blocks" in notes and "other prompts" in notes and "did not finish 2" in notes


def test_best_baseline_and_missing_seeds_by_hand() -> None:
    runs = [("x", fake("x", 0, 20.0)), ("vllm", fake("vllm", 0, 10.0)), ("vllm", fake("vllm", 1, 30.0))]
    found = compared(runs)
    assert found.baseline == "vllm" and "x has 1 of 2 seeds" in found.notes
    [difference] = [d for d in found.differences if d.metric == "mean_ttft_ms"]
    assert (difference.change, difference.interval, difference.num_seeds) == (1.0, None, 1)  # seed 0 only
    assert as_json(found)["rows"][1]["mean"]["mean_ttft_ms"] == 20.0
    assert "rain" in text(found) and "| x |" in markdown(found)


def test_intervals_by_hand() -> None:
    assert interval(np.array([[1.0, 2.0]])) is None
    low, high = interval(np.array([[1.0, 2.0], [1.0, 2.0]])) or (0, 0)
    assert low == high == -0.5
    low, high = interval(np.array([[1.0, 1.0], [3.0, 1.0]])) or (0, 0)  # resamples: 1, 2, 2, 3 of 1
    assert (round(low, 9), round(high, 9)) == (0.075, 1.925)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=2, max_size=5))
def test_intervals_hold_the_extremes_and_scale(pairs: list[tuple[float, float]]) -> None:
    """No interval leaves the range of single seeds' ratios, and units do not matter."""
    both = np.array(pairs)
    low, high = interval(both) or (0, 0)
    ratios = both[:, 0] / both[:, 1] - 1
    assert ratios.min() - 1e-9 * (1 + abs(ratios.min())) <= low <= high <= ratios.max() + 1e-9 * (1 + abs(ratios.max()))
    scaled = interval(both * 1000.0) or (0, 0)
    assert np.allclose(scaled, (low, high))


def test_every_promised_column_is_in_the_table() -> None:
    keys = {key for block in BLOCKS.values() for key, *_ in block}
    latencies = {f"{stat}_{name}_ms" for stat in ("mean", "median", "p90", "p99", "p999")
                 for name in ("ttft", "tpot", "itl", "e2el")}  # fmt: skip
    others = {"output_throughput", "goodput", "slo_attainment", "mean_num_gpus", "peak_num_gpus", "gpu_seconds",
              "mean_kv_utilisation", "num_preemptions", "num_migrations", "bytes_moved"}  # fmt: skip
    assert latencies | others <= keys


def test_each_system_that_is_no_oracle_says_what_it_was_not_designed_for() -> None:
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / "system").glob("*.yaml")}
    silent = {name for name, tree in found.items() if not tree.get("not_for") and "ORACLE" not in tree["description"]}
    assert silent == set(), "conf/system/NAME.yaml: not_for"
