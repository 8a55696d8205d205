"""The nine long-context mixes on 32 instances: vllm_multi, vllm_single (also with 1 GbE between nodes), dcp, ours."""

from __future__ import annotations

import json

import numpy as np

from bench.infinite_llm.runs import (
    RESULTS,
    SEEDS,
    SYSTEMS,
    Row,
    against,
    band,
    draw,
    keep,
    line,
    measure,
    only,
    serving,
    span,
)
from common.plots.style import DASHES, PALETTE, new_figure, styled

MIXES = tuple(range(9))
RATES = (48.0, 48.0, 48.0, 40.0, 30.0, 25.0, 20.0, 15.0, 12.0)
SLOW = ("hardware.nic_bandwidth=1.25e8", "hardware.nic_latency_ns=50000")
RUN = {**SYSTEMS, "vllm_single, 1 GbE": (*SYSTEMS["vllm_single"], *SLOW)}
ORDER = ("vllm_multi", "proactive", "vllm_single", "vllm_single, 1 GbE", "dcp")
DCP = tuple((mix, seed) for seed in SEEDS for mix in MIXES)  # (mix, seed): whole seeds, should a run be cut short


def mixes() -> None:
    """Seed by seed, so that a run cut short leaves whole seeds."""
    rows: list[Row] = []
    for seed in SEEDS:
        for mix, rate in zip(MIXES, RATES):
            for name in ORDER:
                if name != "dcp":
                    rows.append(_run(mix, rate, name, seed))
        _report(rows)


def mixes_dcp() -> None:
    """dcp's rows, added to the table that `mixes` has written (by themselves, because they take as long as it)."""
    rows: list[Row] = json.loads((RESULTS / "mixes.json").read_text(encoding="utf-8"))["tables"]["runs"]
    rows = [row for row in rows if row["system"] != "dcp"]
    for mix, seed in DCP:
        rows.append(_run(mix, RATES[mix], "dcp", seed))
        _report(rows)


def _run(mix: int, rate: float, name: str, seed: int) -> Row:
    found = measure("mixes", *RUN[name], f"workload.trace={mix}", f"workload.rate={rate}", f"seed={seed}")
    return {"mix": mix, "rate": rate, "system": name, "seed": seed, **found}


def _report(rows: list[Row]) -> None:
    table, paid = [], []
    for mix, rate in zip(MIXES, RATES):
        for name in ORDER:
            mine = only(rows, mix=mix, system=name)
            if not mine:
                continue
            single = only(rows, mix=mix, system="vllm_single")
            table.append({"mix": mix, "requests/s": rate, "system": name, "seeds": len(mine),
                          **line(mine, only(rows, mix=mix, system="vllm_multi")),
                          "tokens served": span([row["served_tokens"] / 1e6 for row in mine], ".1f"),
                          "against vllm_single, %": against(mine, single)})  # fmt: skip
            if any(row["remote_served_s"] for row in mine):
                paid.append({"mix": mix, "system": name, **serving(mine)})
    notes = ["Llama-2-7B, 4 nodes of 8 A100-80GB: 32 instances of one GPU, dcp in groups of a node, vllm_single as TP8 "
             "x PP4. 400 requests; mixes 0-2 prompts of mean 6K by spread, 3-8 with 5% log-uniform up to 200K .. 2000K "
             "(ranges of 4-7 and all distributions are ours). Median (least..most) over seeds; tokens served in "
             "millions, prompts and replies.",
             "Latency per output token is of requests that one instance could hold alone, so of the same ones under "
             "every system; a system that refuses giants does less work, and its tokens/s are not of the same "
             "requests. `1 GbE`: nodes linked at 0.125 GB/s and 50 us, as printed in the paper."]  # fmt: skip
    keep("mixes", "Nine long-context mixes", notes, {"mixes": table, "creditors": paid, "runs": rows})
    _plot(rows)


def _plot(rows: list[Row]) -> None:
    with styled():
        figure, axes = new_figure(1, 3, 11.0, 3.3)
        for index, name in enumerate(ORDER):
            groups = [only(rows, mix=mix, system=name) for mix in MIXES]
            style = {"color": PALETTE[index], "ls": DASHES[index % 4], "label": name}
            for axis, key, scale in ((axes[0][0], "window_tps", 1.0), (axes[0][1], "normal_ms", 1.0),
                                     (axes[0][2], "rejected", 1.0)):  # fmt: skip
                band(axis, MIXES, [[row[key] * scale for row in group] for group in groups], **style)
        for axis, label in zip(axes[0], ("output tokens/s while requests arrive",
                                         "latency per output token, ms", "requests refused, of 400")):  # fmt: skip
            axis.set_xlabel("mix")
            axis.set_ylabel(label)
            axis.set_xticks(np.array(MIXES))
        axes[0][1].set_yscale("log")
        axes[0][0].legend(fontsize=6.5)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "mixes")
