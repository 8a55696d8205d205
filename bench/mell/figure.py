"""python -m bench.mell.figure     table and figure of results/mell/gpus.json; results/mell/gpus.md, figures/mell/."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from common.plots.style import PALETTE, new_figure, save, styled

LOADS = ("infrequent", "middle", "frequent")
SYSTEMS = ("mell", "load_balance", "worst_fit", "best_fit", "oracle_worst_fit", "oracle_best_fit")
PAPER = {  # Figure 11, bars digitised, +-0.3
    "13b_x10": {"mell": (29.4, 43.0, 56.8), "load_balance": (32.5, 48.7, 66.8), "worst_fit": (34.1, 53.0, 73.2),
                "best_fit": (33.6, 53.2, 74.9)},
    "7b_x10": {"mell": (24.6, 29.8, 35.3), "load_balance": (27.7, 34.1, 41.2), "worst_fit": (29.6, 36.9, 45.5),
               "best_fit": (32.4, 41.1, 51.4)},
}  # fmt: skip
PAPER_AZURE = {"mell": 44.5, "load_balance": 50.0, "worst_fit": 53.8, "best_fit": 54.4}
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


def _same_seeds(rows: list[dict[str, Any]], group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with the seeds of `group`: what is compared served the same requests."""
    seeds = {row["case"]["seed"] for row in group}
    return [row for row in rows if row["case"]["seed"] in seeds]


def paper_bar(experiment: str, load: str, system: str) -> float | None:
    """The paper's mean number of GPUs."""
    if experiment in PAPER and system in PAPER[experiment]:
        return PAPER[experiment][system][LOADS.index(load)]
    return PAPER_AZURE.get(system) if experiment.startswith("13b_azure") else None


def table(rows: Rows) -> list[str]:
    """Markdown, a line per group."""
    lines = ["| experiment | load | system | seeds | GPUs mean | peak | paid mean | / L2 | MELL vs it | paper: bar | "
             "paper: MELL vs it | used | moves/s group, request | done KV, tokens | TTFT P50 s | TTFT P99 s | "
             "TPOT P50 ms | TPOT P99 ms | stall P50 ms |", "|---|---|---|--:" + "|--:" * 15 + "|"]  # fmt: skip
    for (experiment, load, system, variant), group in rows.items():
        mell = _same_seeds(rows.get((experiment, load, "mell", ""), []), group)
        bar, mell_bar = paper_bar(experiment, load, system), paper_bar(experiment, load, "mell")
        ours = 100 * (mean(mell, "plan_mean") / mean(group, "plan_mean") - 1) if mell else float("nan")
        cells = [
            experiment, load, system + (f" {variant}" if variant else ""), str(len(group)),
            f"{mean(group, 'plan_mean'):.1f}", f"{mean(group, 'plan_peak'):.1f}", f"{mean(group, 'paid_mean'):.1f}",
            f"{mean(group, 'plan_mean') / mean(group, 'l2_mean'):.2f}", f"{ours:+.0f}%",
            f"{bar:.1f}" if bar else "", f"{100 * (mell_bar / bar - 1):+.0f}%" if bar and mell_bar else "",
            f"{100 * mean(group, 'utilisation'):.0f}%",
            f"{mean(group, 'group_moves_per_s'):.1f}, {mean(group, 'request_moves_per_s'):.1f}",
            f"{mean(group, 'kv_moves_per_s'):.1f}, {mean(group, 'token_moves_per_s'):.1f}",
            f"{mean(group, 'median_ttft_ms') / 1e3:.1f}", f"{mean(group, 'p99_ttft_ms') / 1e3:.1f}",
            f"{mean(group, 'median_tpot_ms'):.0f}", f"{mean(group, 'p99_tpot_ms'):.0f}",
            f"{mean(group, 'median_stall_ms'):.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells).replace("nan%", "").replace("nan, nan", "").replace("nan", "") + " |")
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
        for place, load in enumerate(LOADS):
            group = rows.get((experiment, load, system, ""), [])
            if not group:
                continue
            x = place - 0.4 + (index + 0.5) * width
            values = [row["plan_mean"] for row in group]
            axis.bar(x, np.mean(values), width, color=PALETTE[index], label=system if place == 2 else None,
                     yerr=np.std(values), error_kw={"lw": 0.8})  # fmt: skip
            axis.plot([x], [mean(group, "plan_peak")], "_", color="#222222", ms=6)
            axis.plot([x - width / 2, x + width / 2], [mean(group, "l2_mean")] * 2, color="white", lw=1.6)
    axis.set_xticks(range(3), LOADS)
    axis.set_ylabel("GPUs of the plan")
    axis.set_title(f"{TITLES[experiment]}: mean (bar), peak (tick), L2 (white line)")
    axis.legend(ncols=2, loc="upper left")


def _relative(axis: Any, rows: Rows) -> None:
    """MELL against each baseline, in percent: ours and the paper's."""
    x, ticks = 0.0, []
    for experiment in TITLES:
        for load in LOADS:
            mell = rows.get((experiment, load, "mell", ""), [])
            for index, system in enumerate(SYSTEMS[1:4], 1):
                group = rows.get((experiment, load, system, ""), [])
                ours, theirs = paper_bar(experiment, load, "mell"), paper_bar(experiment, load, system)
                if group and mell and ours and theirs:
                    saving = 100 * (mean(mell, "plan_mean") / mean(group, "plan_mean") - 1)
                    axis.bar(x, saving, 0.8, color=PALETTE[index])
                    axis.plot([x - 0.4, x + 0.4], [100 * (ours / theirs - 1)] * 2, color="#222222", lw=1.6)
                x += 1
            ticks.append((x - 2, f"{experiment[:-4]}\n{load[:6]}."))
            x += 1
    axis.axhline(0, color="#9A9A9A", lw=0.8)
    axis.set_xticks([tick for tick, _ in ticks], [text for _, text in ticks])
    axis.set_ylabel("GPUs of MELL against it, %")
    axis.set_title("Saving over load_balance, worst_fit, best_fit; line: the paper's")


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
    axis.set_title("13B, frequent, seed 0, from a third of the arrivals on")
    axis.legend(ncols=2)


def main() -> None:
    """Write both."""
    rows = grouped(Path("results/mell/gpus.json"))
    lines = [
        "Simulated (`python -m bench.mell.gpus`, then `python -m bench.mell.figure`); settings: conf/experiment/mell/.",
        "GPUs: of the plan, as the paper counts them (a GPU is there at once and gone at once); paid: with start-up",
        "and cooldown. / L2: mean GPUs over the mean Martello-Toth bound on the same snapshots (what each plan",
        "charges: true final sizes for the oracles). Means over the last two thirds of arrivals, then over seeds.",
        "",
        *table(rows),
    ]
    Path("results/mell/gpus.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    folder = Path("results/figures/mell")
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(lines), *draw(rows, folder), sep="\n")


if __name__ == "__main__":
    main()
