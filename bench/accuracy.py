"""The accuracy gate: how far the simulator is from what was measured must not grow.

A *part* is one metric of one measurement: its absolute relative error, and from how many requests or points it comes.
Against results/baselines/accuracy.json, the mean over parts may not worsen by 5%, a part not by 10%, and no part may
rest on less. Where the measured data is not at hand, that is said and nothing is checked.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.results import replacing
from workloads.paths import data_root

BASELINE = Path(__file__).resolve().parent.parent / "results" / "baselines" / "accuracy.json"
TOTAL, PART = 1.05, 1.10
Parts = dict[str, dict[str, float]]  # name -> {error, coverage}
SERVER, CLOSED = "vLLM server, RTX 4090", "closed loop, H100"


def server() -> Parts:
    """Mean, P50, P90 and P99 of TTFT, TPOT and latency of the one real server run."""
    from bench.harness import compare, latencies, run
    from bench.validate_server import RUN, measured, overrides

    folder = data_root() / RUN
    reference = measured(folder)
    _, record = run(overrides(folder, "sharegpt_300", "llama3.1-8b", "rtx4090"))
    ours = latencies(record)
    return {f"{SERVER}: {row['metric']}": {"error": abs(row["difference"]), "coverage": len(ours.ttft)}
            for row in compare(ours, reference)}  # fmt: skip


def closed_loop(most: int | None = None) -> Parts:
    """Mean absolute errors of TTFT and TPOT over the closed-loop points, by TP. `most`: points of few clients only."""
    from bench.validate_closed_loop import POINTS, point

    with (data_root() / POINTS).open() as file:
        given = [row for row in csv.DictReader(file) if most is None or float(row["concurrency"]) <= most]
    found: dict[str, list[float]] = {}
    for row in given:
        done = point(row, "qwen3-32b", "h100-80g")
        for metric in ("ttft", "tpot"):
            found.setdefault(f"{CLOSED}, TP{done['tp']}: {metric}", []).append(abs(done[f"{metric}_difference"]))
    return {name: {"error": float(np.mean(values)), "coverage": len(values)} for name, values in found.items()}


def parts(quick: bool = False) -> tuple[Parts, list[str]]:
    """All parts that the data at hand allows, and a line for each measurement that is not there.

    `quick`: the server's only.
    """
    from bench.validate_closed_loop import POINTS
    from bench.validate_server import RUN

    found: Parts = {}
    absent = []
    for name, path, measure in ((SERVER, f"{RUN}/requests.jsonl", server), (CLOSED, POINTS, closed_loop)):
        if not (data_root() / path).is_file():
            absent.append(f"accuracy: {name} is not in the data folder ($KVPLANE_DATA), not checked")
        elif not (quick and measure is closed_loop):
            found |= measure()
    return found, absent


def worse(found: Parts, known: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What got worse than allowed, a line each. Only measurements that are in `found` are judged."""
    groups = {name.split(":")[0] for name in found}
    known = {name: part for name, part in known.items() if name.split(":")[0] in groups}
    lines = [f"accuracy: {name} is not measured any more" for name in known if name not in found]
    lines += [f"accuracy: {name} has no baseline (bless one)" for name in found if name not in known]
    both = [name for name in known if name in found]
    for name in both:
        new, old = found[name], known[name]
        if new["coverage"] < old["coverage"]:
            lines.append(f"accuracy: {name} rests on {new['coverage']:g} of {old['coverage']:g} measurements")
        if new["error"] > PART * old["error"]:
            lines.append(f"accuracy: error of {name} was {_percent(old['error'])}, is {_percent(new['error'])}")
    if both:
        before, now = (float(np.mean([by[name]["error"] for name in both])) for by in (known, found))
        if now > TOTAL * before:
            lines.append(f"accuracy: mean error of {len(both)} parts was {_percent(before)}, is {_percent(now)}")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def read(path: Path = BASELINE) -> dict[str, Any]:
    """Reasons and parts."""
    known: dict[str, Any] = {"reasons": [], "parts": {}}
    return {**known, **json.loads(path.read_text(encoding="utf-8"))} if path.exists() else known


def bless(found: Parts, reason: str, path: Path = BASELINE) -> None:
    """These errors are the baseline now; parts whose data is not at hand stay as they were."""
    known = read(path)
    with replacing(path) as temporary:
        tree = {"reasons": [*known["reasons"], reason], "parts": {**known["parts"], **found}}
        temporary.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
