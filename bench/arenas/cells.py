"""One run of an arena, kept by its configuration: a run that was made at this commit is not made again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import run
from common.errors import KVPlaneError
from common.metrics import Slo, summarize
from common.spanning import gpus_per_instance

CACHE = Path(__file__).resolve().parents[2] / "results" / "runs" / "arenas"
KEPT = (
    "num_requests", "completed", "rejected", "live_at_end", "duration_s", "slo_attainment", "goodput",
    "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms", "mean_e2el_ms",
    "p99_e2el_ms", "output_throughput", "gpu_seconds", "mean_num_gpus", "peak_num_gpus", "mean_kv_utilisation",
    "peak_kv_utilisation", "num_preemptions", "num_migrations", "bytes_moved", "cached_token_share", "mean_waiting",
    "swap_gb", "num_layer_drops", "stage_idle_share", "num_moves_made", "remote_served_s", "num_iterations",
)  # fmt: skip
Summary = dict[str, Any]


class Cells:
    """Summaries by configuration. `commit` names the code that made them; another commit's are not read."""

    def __init__(self, arena: str, commit: str, folder: Path = CACHE) -> None:
        self.path = folder / f"{arena}-{commit}.jsonl"
        self.known: dict[str, Summary] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.known[row["key"]] = row["summary"]

    def measure(self, overrides: Sequence[str]) -> Summary:
        """The summary of one configuration; `error` alone where it cannot run."""
        key = " ".join(overrides)
        if key not in self.known:
            self.known[key] = measured(overrides)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "summary": self.known[key]}) + "\n")
        return self.known[key]


def measured(overrides: Sequence[str]) -> Summary:
    """Simulate and summarise. A configuration that does not fit or stalls is a result too: it met no target."""
    try:
        config, record = run(overrides)
    except KVPlaneError as error:
        return {"error": " ".join(str(error).split())[:200]}
    if record.stopped == "interrupted":
        raise KeyboardInterrupt
    gpus = gpus_per_instance(config)
    summary = summarize(record, config.slo, gpus)
    alone = {f"met_{name}": summarize(record, slo, gpus)["slo_attainment"]  # which of the two targets is missed
             for name, slo in (("ttft", Slo(config.slo.ttft_ms)), ("tpot", Slo(None, config.slo.tpot_ms)))}  # fmt: skip
    kept = {key: summary.get(key) for key in KEPT}
    return {**kept, **alone, **({"error": record.stopped} if record.stopped else {})}
