"""The run's folder: columns, determinism, atomic writes, and reading whatever is left of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_results_synthetic import synthetic_record

from common.errors import ConfigError
from common.metrics import Slo, summarize
from common.record import MoveColumns, RunRecord
from common.results import RunFolder, load_run, moved_bytes, replacing
from common.types import RequestStatus

CONFIG = "seed: 0\n"
FACTS = {
    "system": "vllm",
    "workload": "burst",
    "model": "llama2-7b",
    "hardware": "a100-80g",
    "runtime": "sim",
    "seed": 0,
}


def write(root: Path, record: RunRecord, name: str = "run", **options: Any) -> Path:
    folder = RunFolder.create(root, name, CONFIG)
    summary = summarize(record, Slo(500, 50))
    folder.write(record, summary=summary, facts=FACTS, simulate_s=0.1, **options)
    return folder.path


def test_a_run_leaves_what_the_contract_says(tmp_path: Path) -> None:
    record = synthetic_record(60)
    record.requests.status[3] = RequestStatus.REJECTED
    record.requests.first_token_ns[3] = record.requests.finish_ns[3] = -1
    record.requests.reasons[3] = "longer than max_model_len"
    path = write(tmp_path, record)
    assert sorted(p.name for p in path.iterdir()) == [
        "config.yaml", "manifest.json", "requests.parquet", "summary.json", "timeline.parquet",
    ]  # fmt: skip
    table = pq.read_table(path / "requests.parquet").to_pylist()
    assert table[0]["request_id"] == 0
    assert table[0]["arrival_s"] == record.requests.arrival_ns[0] / 1e9
    assert table[0]["status"] == "finished"
    assert table[0]["tpot_ms"] == pytest.approx(
        (record.requests.finish_ns[0] - record.requests.first_token_ns[0])
        / 1e6
        / (record.requests.output_tokens[0] - 1)
    )
    assert (table[3]["status"], table[3]["finish_s"], table[3]["finish_ns"]) == ("rejected", None, -1)
    assert (table[3]["reject_reason"], table[0]["reject_reason"]) == ("longer than max_model_len", None)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["wall_seconds"] == manifest["simulate_s"] + manifest["write_s"]
    assert (manifest["label"], manifest["seed"], manifest["partial"]) == ("simulated", 0, False)
    assert "numpy" in manifest["packages"]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = (write(tmp_path, synthetic_record(60), name) for name in "ab")
    for table in ("requests.parquet", "timeline.parquet", "summary.json"):
        assert (a / table).read_bytes() == (b / table).read_bytes()


def test_writing_and_reading_import_no_pandas(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from test_results_folder import *\n"
        "for name in [m for m in sys.modules if m.split('.')[0] == 'pandas']: del sys.modules[name]\n"
        f"load_run(write(Path({str(tmp_path)!r}), synthetic_record(10)))\n"
        "assert 'pandas' not in sys.modules"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


def test_a_folder_is_replaced_and_never_complete_while_unfinished(tmp_path: Path) -> None:
    path = write(tmp_path, synthetic_record(20), log_segments=True)
    assert (path / "segments.parquet").exists()
    (path / "mine.txt").write_text("kept")
    for name in ("events.jsonl", "events.jsonl.partial"):
        (path / name).write_text("")
    RunFolder.create(tmp_path, "run", "seed: 1\n")  # a new run begins, and dies
    assert {file.name: file.read_text() for file in path.iterdir()} == {"config.yaml": "seed: 1\n", "mine.txt": "kept"}
    with pytest.raises(ConfigError, match="run: the run did not complete"):
        load_run(path)
    write(tmp_path, synthetic_record(20))
    assert not (path / "segments.parquet").exists()
    assert (path / "mine.txt").exists()
    assert load_run(path).warning is None
    with pytest.raises(ConfigError, match="holds a finished run"):
        RunFolder.create(tmp_path, "run", CONFIG, overwrite=False)


@pytest.mark.parametrize("name", ["", "..", "/abs", "a/../../b", "."])
def test_a_run_name_stays_inside_the_results_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain folder name"):
        RunFolder.create(tmp_path, name, CONFIG)


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"results folder .*file/run cannot be written \(.*\): choose") as caught:
        RunFolder.create(tmp_path / "file", "run", CONFIG)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = RunFolder.create(tmp_path, "run", CONFIG)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        folder.write(synthetic_record(5), summary={}, facts=FACTS, simulate_s=0.0)
    assert [file.name for file in folder.path.iterdir()] == ["config.yaml"]
    with pytest.raises(ConfigError, match="No space left on device"):
        RunFolder.create(tmp_path, "run", "seed: 1\n")
    assert list(folder.path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_partial_run_is_readable_and_says_so(tmp_path: Path) -> None:
    record = synthetic_record(30)
    record.requests.status[29], record.requests.finish_ns[29], record.partial = RequestStatus.LIVE, -1, True
    run = load_run(write(tmp_path, record))
    assert run.label == "simulated, partial"
    assert "partial" in (run.warning or "")
    assert (run.requests["status"] == "live").sum() == 1
    stalled = json.loads((run.path / "manifest.json").read_text()) | {"stopped": "1 request lives"}
    (run.path / "manifest.json").write_text(json.dumps(stalled))
    (run.path / "events.jsonl.partial").touch()
    warning = load_run(run.path).warning or ""
    assert "the run stopped early (1 request lives), its results are partial; events.jsonl.partial has" in warning


def test_damage_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, synthetic_record(30))
    (path / "summary.json").write_text("{")
    (path / "requests.parquet").write_bytes(b"PAR1 not really")
    (path / "timeline.parquet").unlink()
    run = load_run(path)
    assert run.manifest["system"] == "vllm"
    for words in ("summary.json is damaged", "requests.parquet is damaged", "timeline.parquet is missing"):
        assert words in (run.warning or "")
    assert "\n" not in (run.warning or "")
    with pytest.raises(ConfigError, match="no such results folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a run"):
        load_run(tmp_path / "empty")


def test_files_that_can_be_read_and_say_nonsense_are_damage(tmp_path: Path) -> None:
    path = write(tmp_path, synthetic_record(30))
    summary = json.loads((path / "summary.json").read_text())
    broken = {**summary, "goodput": "much", "completed": float("nan"), "mean_ttft_ms": {}}
    (path / "summary.json").write_text(json.dumps(broken))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "git": "abc"}))
    (path / "config.yaml").write_text("slo: 3\nsystem: {name: vllm}\nseed: 0\n")
    table = pq.read_table(path / "requests.parquet")
    pq.write_table(table.drop_columns(["status", "ttft_ms"]), path / "requests.parquet")
    run = load_run(path)
    assert run.summary == {key: value for key, value in summary.items() if broken[key] is value or broken[key] == value}
    assert "git" not in run.manifest and run.config == {"system": {"name": "vllm"}, "seed": 0}
    for words in ("no number at completed, mean_ttft_ms, goodput", "git is no mapping", "slo is no mapping",
                  "requests.parquet has no column status, ttft_ms"):  # fmt: skip
        assert words in (run.warning or ""), run.warning


def test_marks_and_bytes_moved(tmp_path: Path) -> None:
    record = synthetic_record(30)
    record.marks.append((5, 1, "drop", "layers 0-15"))
    second, moves = 1_000_000_000, record.moves
    for start, end, src, dst, size in ((0, 1, 0, 1, 100), (1, 3, 1, 1, 7), (2, 4, 0, 2, 50)):
        row = (start * second, end * second, src, dst, size, -1)
        for name, value in zip(MoveColumns.__slots__, row):
            getattr(moves, name).append(value)
        moves.kind.append("CopySpan")
    import numpy as np

    at = np.array([0, 1, 3, 4, 4], np.int64) * second
    assert moved_bytes(moves, np.array([0, 0, 1, 0, 3]), at).tolist() == [0, 100, 107, 150, 0]
    path = write(tmp_path, record, log_segments=True)
    assert load_run(path).marks["text"].tolist() == ["layers 0-15"]
    assert pq.read_table(path / "moves.parquet").num_rows == 3
