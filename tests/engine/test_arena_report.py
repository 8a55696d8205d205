"""The measuring script, small, and the readings that it stands on."""

import json

import pytest
import torch

import bench.arena
from common.engine import rss


def test_the_report_states_device_and_memory(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    monkeypatch.setattr(bench.arena, "CASES", ((8, 8, (4,)),))
    monkeypatch.setattr("sys.argv", ["bench.arena", "--out", str(tmp_path / "new"), "--repeat", "2"])
    assert bench.arena.main() == 0
    report = json.loads((tmp_path / "new" / "arena.json").read_text())
    assert "no GPU" in report["notes"][0] and torch.__version__ in report["notes"][0]
    [times], [memory] = report["tables"]["Time of remaps"], report["tables"]["Memory held"]
    assert times["moved (MiB)"] == 32 and times["drop (ms)"] > 0
    assert memory["KV cells after"] == memory["KV cells before"] + 32 * 16
    assert memory["before (MiB)"] - memory["dropped (MiB)"] == pytest.approx(32, abs=4)
    assert memory["restored and written (MiB)"] == pytest.approx(memory["before (MiB)"], abs=4)
    assert (tmp_path / "new" / "arena.md").read_text().strip() == capsys.readouterr().out.strip()


def test_without_proc_the_peak_stands_in(tmp_path, monkeypatch):
    peak = rss.peak_rss()
    assert 10 << 20 < rss.current_rss() <= peak
    monkeypatch.setattr(rss, "_STATUS", tmp_path / "none")
    assert rss.current_rss() >= 0.9 * peak and rss.peak_rss() >= 0.9 * peak
