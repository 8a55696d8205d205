"""python -m bench.mell.studies     tables and figures of results/mell/variants.json; studies.md and figures/mell/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.mell.figure import Rows, grouped, mean
from common.plots.style import PALETTE, new_figure, save, styled

Row = list[dict[str, Any]]  # of one setting, a run per seed
FOUR = ("mell", "load_balance", "worst_fit", "best_fit")
MODES = ("hybrid", "kv", "tokens")
RAMP_S = 500  # of the 5,000 s, as the paper leaves them out


class Column(NamedTuple):
    """Title and what stands below it."""

    title: str
    text: Callable[[Row], str]


def number(title: str, key: str, digits: int = 1, scale: float = 1.0) -> Column:
    """The mean over seeds."""
    return Column(title, lambda rows: "" if np.isnan(value := mean(rows, key)) else f"{value * scale:.{digits}f}")


def share(title: str, key: str) -> Column:
    """In percent."""
    return number(title + ", %", key, 0, 100.0)


SEEDS = Column("seeds", lambda rows: str(len(rows)))
GPUS = number("GPUs", "plan_mean")
SPREAD = Column("±", lambda rows: f"{np.std([row['plan_mean'] for row in rows]):.1f}")
PEAK = number("peak", "plan_peak")
L2 = number("L2", "l2_mean")
OVER = Column("/ L2", lambda rows: f"{mean(rows, 'plan_mean') / mean(rows, 'l2_mean'):.2f}")
FFD = Column("FFD / L2", lambda rows: f"{mean(rows, 'ffd_mean') / mean(rows, 'l2_mean'):.2f}")
USED = share("used", "utilisation")
KV, TOKENS = number("KV moves/s", "kv_moves_per_s"), number("token moves/s", "token_moves_per_s")
PLANNED = [number(f"{kind} moves/s planned", f"{kind}_moves_per_s") for kind in ("group", "request", "net")]
STALLS = [number("stall P50 ms", "median_stall_ms", 0), number("P99 ms", "p99_stall_ms", 0)]
TTFT = [number(f"TTFT P{rank} s", f"steady_ttft_ms_p{rank}", 1, 1e-3) for rank in (50, 90, 99)]
TPOT = [number(f"TPOT P{rank} ms", f"steady_tpot_ms_p{rank}", 0) for rank in (50, 99)]
GOOD = [share("TTFT ≤ 5 s, TPOT ≤ 50 ms", "good_5000_50"), number("good per GPU-hour", "good_per_gpu_hour_5000_50", 0),
        share("TTFT ≤ 5 s, TPOT ≤ 100 ms", "good_5000_100"),
        number("good per GPU-hour", "good_per_gpu_hour_5000_100", 0)]  # fmt: skip
PACKING = [SEEDS, GPUS, SPREAD, PEAK, L2, OVER, FFD, USED]


def classes(key: str) -> list[Column]:
    """Shares of the classes."""
    def of(name: str) -> Column:
        return Column(f"{name} %", lambda rows: f"{100 * np.mean([row[key][name] for row in rows]):.0f}")

    return [of(name) for name in ("tiny", "T", "S", "M", "L")]


def recomputed(rows: Row) -> str:
    """Tokens computed anew per second of arrivals."""
    return f"{np.mean([row['recomputed_tokens'] for row in rows]) / 600:.0f}"


def table(rows: Rows, studies: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Markdown: a line for each setting of these studies."""
    lines = ["| study | load | system | " + " | ".join(column.title for column in columns) + " |",
             "|---|---|---|" + "--:|" * len(columns)]  # fmt: skip
    for (study, load, system, variant), group in sorted(rows.items(), key=lambda item: _order(item[0], studies)):
        if study in studies:
            cells = [study, load, f"{system} {variant}".strip(), *(column.text(group) for column in columns)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _order(key: tuple[str, str, str, str], studies: Sequence[str]) -> tuple[Any, ...]:
    study, load, system, variant = key
    try:
        size = float(load.strip("x"))
    except ValueError:
        size = {"infrequent": 0.0, "middle": 1.0, "frequent": 2.0}.get(load, 3.0)
    at = studies.index(study) if study in studies else 99
    return at, size, FOUR.index(system) if system in FOUR else 9, system, variant


def timeline(rows: Rows) -> list[str]:
    """Means and peaks after the ramp, beside the paper's Figure 15."""
    paper = {"best_fit": "75.6, 85.7", "worst_fit": "73.8, 83.7", "load_balance": "67.3, 82.7", "mell": "57.4, 68.4"}
    lines = ["| system | seeds | GPUs mean | max | L2 mean | max | / L2 | paper: mean, max |", "|---|" + "--:|" * 7]
    for system in FOUR:
        group = rows.get(("timeline", "frequent", system, ""), [])
        if not group:
            continue
        parts = [after(row["timeline"]) for row in group]
        plan, low = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        cells = [system, str(len(group)), f"{plan.mean():.1f}", f"{plan.max():.0f}", f"{low.mean():.1f}",
                 f"{low.max():.0f}", f"{plan.mean() / low.mean():.2f}", paper[system]]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def after(line: dict[str, Any]) -> tuple[Any, Any]:
    """(GPUs of the plan, L2) from the ramp's end on. (Rows hold the steady part only: from a third of the run on.)"""
    late = np.array(line["at_s"]) >= RAMP_S
    return np.array(line["plan"])[late], np.array(line["l2"])[late]


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Hybrid over links; watermark against service; 5,000 s."""
    with styled():
        figure, axes = new_figure(2, 2, 10.5, 7.0)
        _links(axes[0][0], rows, "hybrid", "short prompts")
        _links(axes[0][1], rows, "hybrid_busy", "long prompts")
        _service(axes[1][0], rows)
        for index, system in enumerate(FOUR):
            group = rows.get(("timeline", "frequent", system, ""), [])
            if group:
                line = group[0]["timeline"]
                axes[1][1].plot(line["at_s"], line["plan"], color=PALETTE[index], lw=0.9, label=system)
                if system == "mell":
                    axes[1][1].plot(line["at_s"], line["l2"], color="#222222", lw=0.8, ls=":", label="L2 (mell's load)")
        axes[1][1].set_title("13B, 1.1 requests/s, 5,000 s, after a third; simulated")
        axes[1][1].set_xlabel("s")
        axes[1][1].set_ylabel("GPUs of the plan")
        axes[1][1].legend(ncols=2)
        figure.tight_layout()
        return save(figure, folder, "studies")


def _links(axis: Any, rows: Rows, study: str, title: str) -> None:
    for index, mode in enumerate(MODES):
        found = sorted((float(load), mean(group, "p99_stall_ms") / 1e3)
                       for (name, load, _, variant), group in rows.items()
                       if name == study and variant == f"migration={mode}")  # fmt: skip
        if found:
            axis.plot([x / 1e9 for x, _ in found], [y for _, y in found], "o-", color=PALETTE[index], label=mode)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("link, GB/s")
    axis.set_ylabel("P99 stall of a migration, s")
    axis.set_title(f"How requests migrate, {title}; simulated")
    axis.legend()


def _service(axis: Any, rows: Rows) -> None:
    for index, system in enumerate(FOUR):
        found = sorted((mean(group, "plan_mean"), 100 * mean(group, "good_5000_100"), load)
                       for (name, load, one, _), group in rows.items()
                       if name == "watermark" and one == system)  # fmt: skip
        if found:
            axis.plot([x for x, _, _ in found], [y for _, y, _ in found], "o-", color=PALETTE[index], label=system)
            for x, y, mark in found:
                axis.annotate(mark, (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
    axis.set_xlabel("GPUs of the plan")
    axis.set_ylabel("requests with TTFT ≤ 5 s, TPOT ≤ 100 ms, %")
    axis.set_title("GPUs against service, by watermark (labels); simulated")
    axis.legend()


def report(rows: Rows, main_rows: Rows) -> list[str]:
    """All tables."""
    frequent = {key: group for key, group in main_rows.items() if key[1] == "frequent" and not key[3]}
    fits = {(study, load, system, variant or ("oracle" if system.startswith("oracle") else "preempt")): group
            for (study, load, system, variant), group in frequent.items()
            if study == "13b_x10" and system != "mell"}  # fmt: skip
    rules = {**{("overflow", *key[1:]): group for key, group in fits.items()},
             **{key: group for key, group in rows.items() if key[0] == "overflow"}}  # fmt: skip
    moved = [*PACKING, KV, TOKENS, Column("recomputed tokens/s", recomputed), *STALLS]
    lengths = ("lengths", "watermark")
    served = [*PACKING, *PLANNED, *TTFT[1:], *TPOT]
    azure = ("13b_azure", "13b_azure_x10", "7b_azure", "7b_azure_x10")
    how = [SEEDS, GPUS, OVER, KV, TOKENS, *STALLS, *TTFT[1:], *TPOT]
    parts: list[tuple[str, list[str]]] = [
        ("Why best fit keeps up: what moves at rate 1.1 (`best_fit` migrates as tokens)",
         table(frequent, ("13b_x10", "7b_x10"), moved)),
        ("Overflow rules of the baselines (13B, rate 1.1)",
         table(rules, ("overflow",), [*PACKING, KV, TOKENS, *STALLS])),
        ("Equal service: watermark, latency, goodput of what arrives in the steady part (13B, rate 1.1)",
         table(rows, ("watermark",), [*PACKING, *TTFT, *TPOT, *GOOD])),
        ("Hybrid, KV only, tokens only over link bandwidth in bytes/s; every GPU a machine of its own (13B, rate 1.1; "
         "`hybrid_busy`: prompts eight times as long, replies half)", table(rows, ("hybrid", "hybrid_busy"), how)),
        ("How long requests are: native LMSYS-like lengths (30 requests/s), and x20 (0.36/s)",
         table(rows, ("lengths",), [*PACKING, *PLANNED])),
        ("Share of live requests in each class (`watermark`: lengths x10)",
         table(rows, lengths, classes("class_requests"))),
        ("Share of KV blocks in each class (`watermark`: lengths x10)", table(rows, lengths, classes("class_blocks"))),
        ("Native lengths at three loads (240 s)", table(rows, ("13b_native", "7b_native"), served)),
        ("Azure conversations 2023: windows of the trace as seeds", table(rows, azure, served)),
        ("Batching: moves per second that the scheduler asks for",
         table(rows, ("batching",), [SEEDS, GPUS, *PLANNED, KV, TOKENS])),
        ("Other switches of MELL (13B, rate 1.1)",
         table(rows, ("13b_x10",), [*PACKING, *PLANNED, KV, TOKENS, *STALLS])),
        ("5,000 s at rate 1.1 (13B), from a third on", timeline(rows)),
    ]  # fmt: skip
    lines = ["Simulated (`python -m bench.mell.variants`, then `python -m bench.mell.studies`); conf/experiment/mell/.",
             "GPUs: of the plan, mean over the last two thirds of arrivals, then over seeds (±: standard deviation).",
             "L2: Martello-Toth on the same snapshots, below any policy's; FFD: first-fit-decreasing, above it.",
             "Empty: not measured."]  # fmt: skip
    for title, body in parts:
        if len(body) > 2:
            lines += ["", f"## {title}", "", *body]
    return lines


def main() -> None:
    """Write both."""
    rows, main_rows = grouped(Path("results/mell/variants.json")), grouped(Path("results/mell/gpus.json"))
    text = "\n".join(report(rows, main_rows))
    Path("results/mell/studies.md").write_text(text + "\n", encoding="utf-8")
    folder = Path("results/figures/mell")
    folder.mkdir(parents=True, exist_ok=True)
    print(text, *draw(rows, folder), sep="\n")


if __name__ == "__main__":
    main()
