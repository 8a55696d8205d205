"""Figures, tables, traces, progress and loggers: drawn for whole and for damaged runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_results_folder import FACTS, write
from test_results_synthetic import random_record, synthetic_record

import report
from common import console, loggers, perfetto
from common.errors import ConfigError
from common.metrics import Slo, summarize
from common.plots import draw_comparison, draw_run, series, style
from common.results import load_run
from common.types import RequestStatus

PNG, PDF = b"\x89PNG\r\n\x1a\n", b"%PDF-"


def test_a_run_is_drawn_as_png_and_pdf(tmp_path: Path) -> None:
    record = synthetic_record(120)
    record.marks.append((10**9, 0, "drop", "layers 0-15"))
    paths = draw_run(write(tmp_path, record))
    assert [p.name for p in paths] == ["overview.png", "overview.pdf", "latency_cdf.png", "latency_cdf.pdf"]
    assert all(p.read_bytes().startswith(PNG if p.suffix == ".png" else PDF) for p in paths)
    before = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in draw_run(tmp_path / "run")] == before  # no timestamps
    assert not [p for p in (tmp_path / "run").iterdir() if p.suffix == ".tmp"]


def test_figures_name_their_runtime(tmp_path: Path) -> None:
    from common.plots import run_figures

    run = load_run(write(tmp_path, synthetic_record(20)))
    with style.styled():
        texts = [text.get_text() for text in run_figures.overview(run).texts]
    assert "run: simulated" in texts
    assert any(text.startswith("simulated  ·  vllm  ·  llama2-7b  ·  a100-80g  ·  burst  ·  seed 0") for text in texts)


@pytest.mark.parametrize("missing", ["requests.parquet", "timeline.parquet", "manifest.json"])
def test_what_there_is_of_a_run_is_drawn(tmp_path: Path, missing: str) -> None:
    runs = [write(tmp_path, synthetic_record(30), name) for name in "ab"]
    (runs[0] / missing).unlink()
    loaded = [load_run(path) for path in runs]
    assert missing in (loaded[0].warning or "")
    assert len(draw_run(loaded[0])) == 4
    assert len(draw_comparison(loaded, tmp_path)) == 6


def test_a_run_where_nothing_finished_is_drawn(tmp_path: Path) -> None:
    record = synthetic_record(10)
    for i in range(10):
        record.requests.status[i], record.requests.finish_ns[i] = RequestStatus.LIVE, -1
    record.partial = True
    assert len(draw_run(write(tmp_path, record))) == 4


def test_series_by_hand() -> None:
    x, y = series.cdf(np.array([3.0, 1.0, 2.0, 2.0]))
    assert (x.tolist(), y.tolist()) == ([1, 2, 2, 3], [0.25, 0.5, 0.75, 1])
    x, y = series.cdf(np.arange(10_000.0))
    assert (len(x) <= 500, x[-1], y[-1], x[-100:].tolist()) == (True, 9999.0, 1.0, list(range(9900, 10_000)))
    centres, (median,), window = series.rolling(np.arange(100.0), np.arange(100.0), (50,), num_windows=9)
    assert (window, median[9]) == (11.0, centres[9])
    at, values = series.thin(np.arange(1000.0), np.arange(1000.0)[:, None], peak=True)
    assert (len(at), values[-1, 0]) == (series.MAX_POINTS, 999.0)


def test_a_trace_is_valid_and_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = synthetic_record(50)
    record.marks.append((1500, 2, "drop", 'a "quoted" text'))
    monkeypatch.setattr(perfetto, "MAX_REQUESTS", 20)
    perfetto.write_trace(record, tmp_path / "trace.json", FACTS)
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = trace["traceEvents"]
    assert trace["otherData"]["label"] == "simulated"
    assert trace["otherData"]["notes"] == ["requests: the first 20 that finished, of 50"]
    assert sum(e["ph"] == "b" for e in events) == sum(e["ph"] == "e" for e in events) == 20
    assert sum(e["ph"] == "X" for e in events) == len(record.segments.start_ns)
    assert [e["ts"] for e in events if e["ph"] == "i"] == [1.5]
    assert {"C", "M", "n"} <= {e["ph"] for e in events}


def test_a_large_trace_stays_below_its_limit(tmp_path: Path) -> None:
    perfetto.write_trace(random_record(20_000, 200_000), tmp_path / "trace.json", FACTS)
    assert (tmp_path / "trace.json").stat().st_size < 22e6
    with (tmp_path / "trace.json").open() as file:
        assert "the first 50,000 of 200,000" in file.readline()


def test_the_summary_table_says_what_it_is(tmp_path: Path) -> None:
    record = synthetic_record(60)
    manifest = {**FACTS, "partial": False, "wall_seconds": 0.1}
    text = console.summary_table(summarize(record, Slo(500, 50)), "burst", "sim", manifest)
    assert text.startswith("burst: simulated  ·  vllm")
    for words in ("60 of 60 finished", "TTFT (ms)", "P99.9", "600 requests/s", "GPU-seconds"):
        assert words in text
    assert "TTFT" in console.summary_table({}, "damaged", "sim")


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    paths = [write(tmp_path, synthetic_record(60, n), name) for n, name in ((2, "two"), (4, "four"))]
    text = console.comparison_table([load_run(p) for p in paths], width=400)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    ttft = {name: rows[name].split()[1] for name in ("two", "four")}
    assert ttft["four"].endswith("*") and not ttft["two"].endswith("*")
    assert (
        max(len(line) for line in console.comparison_table([load_run(p) for p in paths], 80).splitlines()[1:-1]) <= 82
    )


class _Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_progress_is_quiet_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(console, "time", clock)
    record, out = synthetic_record(100), io.StringIO()
    for i in range(50):
        record.requests.status[i] = RequestStatus.LIVE
    progress = console.Progress(record, stream=out)
    progress(0)
    assert out.getvalue() == ""  # a short run says nothing
    clock.now = 102.0
    progress(0)
    progress(0)
    assert out.getvalue() == "simulating: 50% (50 of 100 requests), 25 requests/s, 2 s left\n"
    clock.now = 105.0
    progress(0)
    assert out.getvalue().count("\n") == 1  # no further, and no 10 s yet
    clock.now = 112.0
    progress(0)
    progress.close()
    assert out.getvalue().count("\n") == 2


def test_progress_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr(console.Progress, "BAR_S", 0.0)
    with console.Progress(synthetic_record(20), stream=out) as progress:
        progress(0)
    assert "20/20" in out.getvalue() and "req/s" in out.getvalue()


def test_wandb_offline_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    path = write(tmp_path, synthetic_record(20))
    draw_run(path)
    loggers.log_run("wandb", path, options={"project": "test"})
    assert list(path.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(path.glob("wandb/offline-run-*/files/media/images/figures/*.png"))


def test_a_logger_never_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(write(tmp_path, synthetic_record(5)))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    loggers.log_run("wandb", run)
    assert capsys.readouterr().err.startswith("warning: logger=wandb failed")
    loggers.log_run("none", run)
    with pytest.raises(ConfigError, match="logger=tensorboard"):
        loggers.log_run("tensorboard", run)


def test_report_compares_and_survives_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path, synthetic_record(30), name) for name in "ab")
    (b / "summary.json").write_text("{")
    assert report.main([str(a), str(b), "--out", str(tmp_path / "out")]) == 3  # drawn, with something missing
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and err.count("\n") == 1 and "summary.json is damaged" in err
    assert "TTFT" in out and (tmp_path / "out" / "compare_cdf.pdf").exists()


def test_report_on_an_unknown_folder_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, report.__file__, str(tmp_path / "nowhere")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'nowhere'}: no such results folder\n")


def test_importing_the_results_code_is_light() -> None:
    code = (
        "import sys, common.results, common.console, common.loggers, common.perfetto, common.plots\n"
        "assert not {'pandas', 'pyarrow', 'matplotlib', 'wandb', 'tqdm', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parent)


class BrokenWandb:
    """A wandb of which one part fails; what was logged until then is kept."""

    def __init__(self, broken: str) -> None:
        self.broken, self.logged, self.summary, self.finished = broken, [], {}, 0

    def _may_fail(self, part: str) -> None:
        if part == self.broken:
            raise RuntimeError(f"{part} is broken")

    def Settings(self, **_: object) -> None:
        return None

    def init(self, **given: object) -> BrokenWandb:
        self._may_fail("init")
        self.config = given["config"]
        return self

    def Image(self, path: str) -> str:
        self._may_fail("Image")
        return path

    def Table(self, **content: object) -> object:
        self._may_fail("Table")
        return content

    def log(self, content: dict[str, object]) -> None:
        self._may_fail("log")
        self.logged.append(content)

    def finish(self) -> None:
        self.finished += 1
        self._may_fail("finish")


@pytest.mark.parametrize("part", ["init", "Image", "Table", "log", "finish", "nothing"])
def test_a_broken_wandb_never_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    import run as cli

    wandb = BrokenWandb(part)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    arguments = ["workload=poisson", "workload.num_requests=20", "cluster.num_instances=2", "logger=wandb",
                 "run.trace=false", f"run.figures={part in ('Image', 'nothing')}"]  # fmt: skip
    assert cli.main([*arguments, f"run.results={tmp_path}", "run.name=a"]) == 0
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: logger=wandb")]
    assert len(err) == (part != "nothing") and (tmp_path / "a" / "manifest.json").exists()
    assert wandb.finished == (part != "init")
    if part == "nothing":
        *steps, content = wandb.logged
        assert content["requests"] and "figures/overview" in content and wandb.config["system"]["name"] == "vllm"
        assert [step["time_s"] for step in steps] == sorted(step["time_s"] for step in steps) and len(steps) > 3
        assert max(step["timeline/running"] for step in steps) > 0
