"""python -m bench.mell.figure     table and figure of results/mell/gpus.json; results/mell/gpus.md, figures/mell/."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.mell import paper
from common.plots.style import FAINT, PALETTE, new_figure, save, styled

SYSTEMS = ("mell", "load_balance", "worst_fit", "best_fit", "oracle_worst_fit", "oracle_best_fit")
# USD per GPU-hour, an assumption within what providers list on demand, which differs twofold: systems are compared by
# GPU-hours
PRICE = {"13b": 1.25, "7b": 0.60}
TITLES = {"13b_x10": "Llama-2-13B, A100 40 GB", "7b_x10": "Llama-2-7B, RTX 4090"}
Rows = dict[tuple[str, str, str, str], list[dict[str, Any]]]


def grouped(path: Path) -> Rows:
    """Rows of all seeds by (experiment, load, system, variant)."""
    rows: Rows = defaultdict(list)
    for row in json.loads(path.read_text(encoding="utf-8")).values():
        case = row["case"]
        rows[case["experiment"], case["load"], case["system"], case["variant"]].append(row)
    return rows


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Over the seeds; NaN where there is nothing."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")


def cells(values: Sequence[str]) -> str:
    """One line of a table; what was not measured is empty."""
    return "| " + " | ".join(value if "nan" not in value else "" for value in values) + " |"


def given(value: float | None, text: str = "{:.1f}") -> str:
    """A number of the paper's, if it has one."""
    return "" if value is None else text.format(value)


def against(mell: list[dict[str, Any]], group: list[dict[str, Any]], key: str) -> tuple[float, int]:
    """MELL's number over the other's, in percent of it and by the means; and with how many seeds it is lower."""
    pairs = [(ours[key], theirs[key]) for ours in mell for theirs in group
             if ours["case"]["seed"] == theirs["case"]["seed"]]  # fmt: skip
    if not pairs:
        return float("nan"), 0
    ours, theirs = np.array(pairs, dtype=np.float64).T
    return 100 * float(ours.mean() / theirs.mean() - 1), int((ours < theirs).sum())


def table(rows: Rows) -> list[str]:
    """GPU counts between their bounds, beside the paper's."""
    titles = ("experiment", "load", "system", "seeds", "volume", "L2", "GPUs mean", "±", "FFD", "/ L2", "L2 peak",
              "GPUs peak", "MELL vs it: mean", "lower", "peak", "paper: mean", "peak", "MELL vs it: mean",
              "peak")  # fmt: skip
    lines = [cells(titles), "|---|---|---|" + "--:|" * (len(titles) - 3)]
    for (experiment, load, system, variant), group in rows.items():
        mell = rows.get((experiment, load, "mell", ""), [])
        ours, lower = against(mell, group, "plan_mean")
        bar, top = paper.at(paper.GPUS, experiment, load, system), paper.peak(experiment, load, system)
        mell_bar, mell_top = paper.at(paper.GPUS, experiment, load, "mell"), paper.peak(experiment, load, "mell")
        other = system != "mell"
        lines.append(cells([
            experiment, load, system + (f" {variant}" if variant else ""), str(len(group)),
            f"{mean(group, 'volume_mean'):.1f}", f"{mean(group, 'l2_mean'):.1f}", f"{mean(group, 'plan_mean'):.1f}",
            f"{np.std([row['plan_mean'] for row in group]):.1f}", f"{mean(group, 'ffd_mean'):.1f}",
            f"{mean(group, 'plan_mean') / mean(group, 'l2_mean'):.2f}", f"{mean(group, 'l2_peak'):.1f}",
            f"{mean(group, 'plan_peak'):.1f}",
            f"{ours:+.1f}%" if other else "", f"{lower}/{len(group)}" if other else "",
            f"{against(mell, group, 'plan_peak')[0]:+.1f}%" if other else "", given(bar), given(top),
            f"{100 * (mell_bar / bar - 1):+.0f}%" if other and bar and mell_bar else "",
            f"{100 * (mell_top / top - 1):+.0f}%" if other and top and mell_top else "",
        ]))  # fmt: skip
    return lines


def work_table(rows: Rows) -> list[str]:
    """Utilisation and migrations, beside the paper's."""
    titles = ("experiment", "load", "system", "used", "paper: used", "planned moves/s: group", "request", "pruned",
              "done/s: KV", "tokens", "paper: moves/s", "recomputed tokens/s", "stall P50 ms", "P99 ms", "preempted/s",
              "recomputed tokens/s", "wait P50 s", "P99 s")  # fmt: skip
    lines = [cells(titles), "|---|---|---|" + "--:|" * (len(titles) - 3)]
    for (experiment, load, system, variant), group in rows.items():
        if system.startswith("oracle"):
            continue
        lines.append(cells([
            experiment, load, f"{system} {variant}".strip(), f"{100 * mean(group, 'utilisation'):.0f}%",
            given(paper.at(paper.USED, experiment, load, system), "{:.0f}%"),
            f"{mean(group, 'group_moves_per_s'):.1f}", f"{mean(group, 'request_moves_per_s'):.1f}",
            f"{mean(group, 'net_moves_per_s'):.1f}", f"{mean(group, 'kv_moves_per_s'):.1f}",
            f"{mean(group, 'token_moves_per_s'):.1f}", given(paper.at(paper.MOVES, experiment, load, system)),
            f"{mean(group, 'recomputed_per_s'):.0f}", f"{mean(group, 'median_stall_ms'):.0f}",
            f"{mean(group, 'p99_stall_ms'):.0f}", f"{mean(group, 'preempted_per_s'):.1f}",
            f"{mean(group, 'preempted_recomputed_per_s'):.0f}",
            *(f"{mean(group, f'{rank}_preempted_ms') / 1e3:.1f}" for rank in ("median", "p99")),
        ]))  # fmt: skip
    return lines


def service_table(rows: Rows) -> list[str]:
    """What the GPUs cost and what requests get for it, at one pair of targets."""
    titles = ("experiment", "load", "system", "paid GPUs", "paid peak", "GPU-seconds", "USD/h", "TTFT P50 s", "P90",
              "P99", "TPOT P50 ms", "P99", "good", "good per GPU-hour", "USD per 1,000 good", "MELL vs it")  # fmt: skip
    lines = [cells(titles), "|---|---|---|" + "--:|" * (len(titles) - 3)]
    for (experiment, load, system, variant), group in rows.items():
        mell = rows.get((experiment, load, "mell", ""), [])
        rate = mean(group, "good_per_gpu_hour_5000_100")
        price = PRICE[experiment.partition("_")[0]]
        ours = 100 * (rate / mean(mell, "good_per_gpu_hour_5000_100") - 1) if mell else float("nan")
        lines.append(cells([
            experiment, load, system + (f" {variant}" if variant else ""), f"{mean(group, 'paid_mean'):.1f}",
            f"{mean(group, 'paid_peak'):.1f}", f"{3600 * mean(group, 'paid_gpu_hours'):,.0f}",
            f"{price * mean(group, 'paid_mean'):.1f}",
            *(f"{mean(group, f'steady_ttft_ms_p{rank}') / 1e3:.1f}" for rank in (50, 90, 99)),
            *(f"{mean(group, f'steady_tpot_ms_p{rank}'):.0f}" for rank in (50, 99)),
            f"{100 * mean(group, 'good_5000_100'):.0f}%", f"{rate:.0f}", f"{1000 * price / rate:.2f}",
            f"{ours:+.0f}%" if system != "mell" else "",
        ]))  # fmt: skip
    return lines


def draw(rows: Rows, folder: Path) -> list[Path]:
    """GPU counts by load beside L2 and the paper's bars; and one run over time."""
    with styled():
        figure, axes = new_figure(2, 2, 10.5, 7.0)
        for axis, experiment in zip(axes[0], TITLES):
            _bars(axis, rows, experiment)
        _relative(axes[1][0], rows)
        _timeline(axes[1][1], rows)
        figure.tight_layout()
        return save(figure, folder, "gpus")


def _bars(axis: Any, rows: Rows, experiment: str) -> None:
    width = 0.8 / len(SYSTEMS)
    for index, system in enumerate(SYSTEMS):
        for place, load in enumerate(paper.LOADS):
            group = rows.get((experiment, load, system, ""), [])
            if not group:
                continue
            x = place - 0.4 + (index + 0.5) * width
            values = [row["plan_mean"] for row in group]
            axis.bar(x, np.mean(values), width, color=PALETTE[index], label=system if place == 2 else None,
                     yerr=np.std(values), error_kw={"lw": 0.8})  # fmt: skip
            axis.plot([x], [mean(group, "plan_peak")], "_", color="#222222", ms=6)
            axis.plot([x - width / 2, x + width / 2], [mean(group, "l2_mean")] * 2, color="white", lw=1.6)
    axis.set_xticks(range(3), paper.LOADS)
    axis.set_ylabel("GPUs of the plan")
    axis.set_title(f"{TITLES[experiment]}: mean (bar), peak (tick), L2 (white); simulated")
    axis.legend(ncols=2, loc="upper left")


def _relative(axis: Any, rows: Rows) -> None:
    """MELL against each baseline, in percent: ours and the paper's."""
    x, ticks = 0.0, []
    for experiment in TITLES:
        for load in paper.LOADS:
            mell = rows.get((experiment, load, "mell", ""), [])
            for index, system in enumerate(SYSTEMS[1:4], 1):
                group = rows.get((experiment, load, system, ""), [])
                ours = paper.at(paper.GPUS, experiment, load, "mell")
                theirs = paper.at(paper.GPUS, experiment, load, system)
                if group and mell and ours and theirs:
                    saving = 100 * (mean(mell, "plan_mean") / mean(group, "plan_mean") - 1)
                    axis.bar(x, saving, 0.8, color=PALETTE[index])
                    axis.plot([x - 0.4, x + 0.4], [100 * (ours / theirs - 1)] * 2, color="#222222", lw=1.6)
                x += 1
            ticks.append((x - 2, f"{experiment.partition('_')[0]}\n{load}"))
            x += 1
    axis.axhline(0, color="#9A9A9A", lw=0.8)
    axis.set_xticks([tick for tick, _ in ticks], [text for _, text in ticks], fontsize=7)
    axis.set_ylabel("GPUs of MELL against it, %")
    axis.set_title("MELL against load_balance, worst_fit, best_fit (bar) and in the paper (line)")


def _timeline(axis: Any, rows: Rows) -> None:
    for index, system in enumerate(SYSTEMS[:4]):
        group = rows.get(("13b_x10", "frequent", system, ""), [])
        if group:
            line = group[0]["timeline"]
            axis.plot(line["at_s"], line["plan"], color=PALETTE[index], label=system)
            if system == "mell":
                axis.plot(line["at_s"], line["l2"], color="#222222", ls=":", label="L2 (mell's load)")
    axis.set_xlabel("s")
    axis.set_ylabel("GPUs of the plan")
    axis.axvline(200, color=FAINT, lw=0.8, ls="--")
    axis.set_title("13B, frequent, seed 0; means are taken from the dashed line on")
    axis.legend(loc="upper right")


def commits(rows: Rows) -> str:
    """Where the runs come from."""
    return ", ".join(sorted({row.get("commit", "unknown") for group in rows.values() for row in group}))


def report(rows: Rows) -> list[str]:
    """All tables."""
    return [
        "Simulated (`python -m bench.mell.gpus`, then `python -m bench.mell.figure`); settings: conf/experiment/mell/.",
        f"Measured at commit {commits(rows)}.",
        "Means over the last two thirds of arrivals, then over seeds (±: standard deviation over seeds).",
        "",
        "## GPUs",
        "",
        "Of the plan, as the paper counts them (a GPU is there at once and gone at once). volume <= L2 (Martello-Toth)",
        "<= optimum <= FFD (first-fit-decreasing): bounds for the same snapshots of the same run, in whole GPUs (what",
        "each plan charges: true final sizes for the oracles). lower: seeds with which MELL needs fewer. The paper's",
        "peaks are those of its 5,000 s.",
        "",
        *table(rows),
        "",
        "## Utilisation and migrations",
        "",
        "used: KV held over the KV of the plan's GPUs. Moves of MELL's scheduler by group (a multi-item is one) and by",
        "request, before and after pruning; those that the cluster carried out; tokens computed anew for them; their",
        "stalls. preempted: a GPU ran out of blocks, and its last request was queued again. That is no migration:",
        "the tokens computed anew for it come on top, and so does the wait until its next token.",
        "",
        *work_table(rows),
        "",
        "## Service and cost",
        "",
        "Paid GPUs: with start-up and cooldown. Latencies of requests that arrive in the steady part. good: TTFT <= 5",
        f"s, TPOT <= 100 ms. USD: GPU-hours at an assumed {PRICE['13b']:.2f} (A100 40 GB, 13B) or {PRICE['7b']:.2f}",
        "(RTX 4090, 7B) an hour. The last column compares by good requests per GPU-hour, which no price touches: above",
        "0, a baseline gives more for its GPU-hours than MELL. The paper reports no latency and no cost.",
        "",
        *service_table(rows),
    ]  # fmt: skip


def main() -> None:
    """Write tables and figure."""
    rows = grouped(Path("results/mell/gpus.json"))
    lines = report(rows)
    Path("results/mell/gpus.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = Path("results/figures/mell")
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(lines), *draw(rows, folder), sep="\n")


if __name__ == "__main__":
    main()
