"""python -m bench.mell.studies     tables and figures of results/mell/variants.json; studies.md and figures/mell/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.mell import paper
from bench.mell.figure import Rows, cells, commits, given, grouped, mean
from bench.mell.variants import LINKS
from common.plots.style import PALETTE, new_figure, save, styled

Row = list[dict[str, Any]]  # of one setting, a run per seed
FOUR = ("mell", "load_balance", "worst_fit", "best_fit")
SERVING = (("mell", ""), ("mell", "compute_share=1"), *((system, "") for system in FOUR[1:]))
COLOURS = (0, 4, 1, 2, 3)  # of these, in the palette
MODES = ("hybrid", "kv", "tokens")
RAMP_S = 500  # of the 5,000 s, as the paper leaves them out
SMOOTH = 12  # samples of 5 s: a running mean over a minute
MARKERS = "os^DvP"
TARGETS = (0.9, 0.95, 0.97, 0.98, 0.99)  # shares of good requests
STUDY_TITLES = {"hybrid": "prompts a quarter of the tokens", "hybrid_mid": "prompts 63% of the tokens",
                "hybrid_busy": "prompts 84% of the tokens"}  # fmt: skip


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
VOLUME, L2, FFD = number("volume", "volume_mean"), number("L2", "l2_mean"), number("FFD", "ffd_mean")
L2_PEAK = number("L2 peak", "l2_peak")
OVER = Column("/ L2", lambda rows: f"{mean(rows, 'plan_mean') / mean(rows, 'l2_mean'):.2f}")
USED = share("used", "utilisation")
KV, TOKENS = number("KV moves/s", "kv_moves_per_s"), number("token moves/s", "token_moves_per_s")
PLANNED = [number(f"{kind} moves/s planned", f"{kind}_moves_per_s") for kind in ("group", "request", "net")]
STALLS = [number("stall P50 ms", "median_stall_ms", 0), number("P99 ms", "p99_stall_ms", 0)]
TTFT = [number(f"TTFT P{rank} s", f"steady_ttft_ms_p{rank}", 1, 1e-3) for rank in (50, 90, 99)]
TPOT = [number(f"TPOT P{rank} ms", f"steady_tpot_ms_p{rank}", 0) for rank in (50, 99)]
GOOD = [share("TTFT ≤ 5 s, TPOT ≤ 50 ms", "good_5000_50"), number("good per GPU-hour", "good_per_gpu_hour_5000_50", 0),
        share("TTFT ≤ 5 s, TPOT ≤ 100 ms", "good_5000_100"),
        number("good per GPU-hour", "good_per_gpu_hour_5000_100", 0)]  # fmt: skip
PACKING = [SEEDS, VOLUME, L2, GPUS, SPREAD, FFD, OVER, L2_PEAK, PEAK, USED]
PAID = [number("paid GPUs", "paid_mean"), number("GPU-s, steady", "paid_gpu_hours", 0, 3600.0)]


def of_paper(title: str, figure: Any, text: str = "{:.1f}") -> Column:
    """The paper's value for the same setting."""
    def value(rows: Row) -> str:
        case = rows[0]["case"]
        return given(paper.at(figure, case["experiment"], case["load"], case["system"]), text)

    return Column(title, value)


BARS = [of_paper("paper: GPUs", paper.GPUS), of_paper("paper: used", paper.USED, "{:.0f}%")]


def classes(key: str) -> list[Column]:
    """Shares of the classes."""
    def of(name: str) -> Column:
        return Column(f"{name} %", lambda rows: f"{100 * np.mean([row[key][name] for row in rows]):.0f}")

    return [of(name) for name in ("tiny", "T", "S", "M", "L")]


def recomputed(rows: Row) -> str:
    """Tokens computed anew per second of arrivals."""
    return f"{mean(rows, 'recomputed_per_s'):.0f}"


def table(rows: Rows, studies: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """Markdown: a line for each setting of these studies."""
    lines = ["| study | load | system | " + " | ".join(column.title for column in columns) + " |",
             "|---|---|---|" + "--:|" * len(columns)]  # fmt: skip
    for (study, load, system, variant), group in sorted(rows.items(), key=lambda item: _order(item[0], studies)):
        if study in studies:
            named = [study, load, f"{system} {variant}".strip()]
            lines.append(cells(named + [column.text(group) for column in columns]))
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
    titles = ("model", "system", "seeds", "L2 mean", "GPUs mean", "/ L2", "L2 max", "GPUs max", "MELL vs it: mean",
              "max", "paper: mean", "max", "MELL vs it: mean", "max")  # fmt: skip
    lines = [cells(titles), "|---|---|" + "--:|" * (len(titles) - 2)]
    for study, model in (("timeline", "13b"), ("timeline_7b", "7b")):
        mell = rows.get((study, "frequent", "mell", ""), [])
        for system in FOUR:
            group = rows.get((study, "frequent", system, ""), [])
            if not group:
                continue
            theirs, best = paper.TIMELINE[model][system], paper.TIMELINE[model]["mell"]
            ours = [100 * (mean(mell, key) / mean(group, key) - 1) for key in ("plan_mean", "plan_peak")]
            lines.append(cells([
                model, system, str(len(group)), f"{mean(group, 'l2_mean'):.1f}", f"{mean(group, 'plan_mean'):.1f}",
                f"{mean(group, 'plan_mean') / mean(group, 'l2_mean'):.2f}", f"{mean(group, 'l2_peak'):.1f}",
                f"{mean(group, 'plan_peak'):.1f}", *(f"{one:+.0f}%" if system != "mell" else "" for one in ours),
                *(f"{one:.1f}" for one in theirs),
                *(f"{100 * (top / one - 1):+.0f}%" if system != "mell" else "" for top, one in zip(best, theirs)),
            ]))  # fmt: skip
    return lines


def equal_service(rows: Rows) -> list[str]:
    """The fewest GPU-hours with which each system serves a share of the requests within the targets."""
    titles = [f"{system} {variant}".strip() for system, variant in SERVING]
    lines = [cells(("good requests, at least", *titles)), "|--:|" + "---|" * len(titles)]
    for target in TARGETS:
        found = []
        for one in SERVING:
            ways = sorted((mean(group, "paid_mean"), mean(group, "good_5000_100"), load)
                          for (name, load, *way), group in rows.items() if name == "watermark" and tuple(way) == one
                          if mean(group, "good_5000_100") >= target)  # fmt: skip
            found.append(f"{ways[0][0]:.1f} (watermark {ways[0][2]}: {100 * ways[0][1]:.1f}%)" if ways else "none")
        lines.append(cells((f"{100 * target:.0f}%", *found)))
    return lines


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Hybrid over links and compute loads; watermark against service; and, apart, 5,000 s."""
    with styled():
        figure, axes = new_figure(2, 2, 10.5, 7.2)
        for axis, study in zip(axes.flat, STUDY_TITLES):
            _links(axis, rows, study)
        _service(axes[1][1], rows)
        figure.tight_layout()
        drawn = save(figure, folder, "studies")
        figure, axes = new_figure(2, 1, 10.5, 7.2)
        _timeline(axes[0][0], rows, "timeline", "13B on A100 40 GB")
        _timeline(axes[1][0], rows, "timeline_7b", "7B on RTX 4090")
        figure.tight_layout()
        return drawn + save(figure, folder, "timeline")


def _links(axis: Any, rows: Rows, study: str) -> None:
    """P99 stall (lines) of each way to migrate."""
    for index, mode in enumerate(MODES):
        found = sorted((float(load), mean(group, "p99_stall_ms") / 1e3)
                       for (name, load, _, variant), group in rows.items()
                       if name == study and variant == f"migration={mode}")  # fmt: skip
        if found:
            axis.plot([x / 1e9 for x, _ in found], [y for _, y in found], "-" + MARKERS[index], color=PALETTE[index],
                      label=mode)  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([link / 1e9 for link in LINKS], [f"{link / 1e9:.3g}" for link in LINKS])
    axis.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"])
    axis.minorticks_off()
    axis.set_xlabel("link between machines, GB/s")
    axis.set_ylabel("P99 stall of a migration, s")
    axis.set_title(f"How requests migrate, {STUDY_TITLES[study]}; simulated")
    axis.legend()


def _service(axis: Any, rows: Rows) -> None:
    """Each line is a system, each marker a watermark."""
    marks = sorted({load for name, load, _, _ in rows if name == "watermark"}, key=float)
    for index, (system, variant) in zip(COLOURS, SERVING):
        found = [(mean(group, "paid_mean"), 100 * mean(group, "good_5000_100"), mark)
                 for mark in marks if (group := rows.get(("watermark", mark, system, variant), []))]  # fmt: skip
        axis.plot([x for x, _, _ in found], [y for _, y, _ in found], color=PALETTE[index], lw=1.1,
                  label=f"{system} {variant}".strip())  # fmt: skip
        for x, y, mark in found:
            axis.plot([x], [y], MARKERS[marks.index(mark)], color=PALETTE[index], ms=6)
    for mark, shape in zip(marks, MARKERS):
        axis.plot([], [], shape, color="#666666", label=f"watermark {mark}")
    axis.set_ylim(bottom=86)  # room for the legend
    axis.set_xlabel("paid GPUs")
    axis.set_ylabel("requests with TTFT ≤ 5 s, TPOT ≤ 100 ms, %")
    axis.set_title("GPUs against service (13B, rate 1.1); simulated")
    axis.legend(ncols=2, loc="lower right")


def _timeline(axis: Any, rows: Rows, study: str, title: str) -> None:
    """A running mean over a minute of each system's plan, faint the samples; dotted the bound on MELL's load."""
    kernel = np.ones(SMOOTH) / SMOOTH
    for index, system in enumerate(FOUR):
        group = [row for row in rows.get((study, "frequent", system, ""), []) if row["case"]["seed"] == 0]
        if not group:
            continue
        line = group[0]["timeline"]
        late = np.array(line["at_s"]) <= 5000
        at, plan, low = (np.array(line[name], dtype=np.float64)[late] for name in ("at_s", "plan", "l2"))
        middle = at[SMOOTH // 2 : SMOOTH // 2 + len(at) - SMOOTH + 1]
        axis.plot(at, plan, color=PALETTE[index], lw=0.5, alpha=0.25)
        axis.plot(middle, np.convolve(plan, kernel, "valid"), color=PALETTE[index], lw=1.3, label=system)
        if system == "mell":
            axis.plot(middle, np.convolve(low, kernel, "valid"), color="#222222", lw=1.2, ls=":",
                      label="L2 (mell's load)")  # fmt: skip
    axis.axvline(RAMP_S, color="#9A9A9A", lw=0.8, ls="--")
    axis.set_xlim(0, 5000)
    axis.set_ylim(bottom=0)
    axis.set_title(f"{title}, 1.1 requests/s, seed 0: mean over a minute (faint: every 5 s); simulated")
    axis.set_xlabel("s (the tables leave out what is before the dashed line)")
    axis.set_ylabel("GPUs of the plan")
    axis.legend(ncols=5, loc="lower right")


def report(rows: Rows, main_rows: Rows) -> list[str]:
    """All tables."""
    frequent = {key: group for key, group in main_rows.items() if key[1] == "frequent" and not key[3]}
    fits = {(study, load, system, variant or ("oracle" if system.startswith("oracle") else "preempt")): group
            for (study, load, system, variant), group in frequent.items()
            if study == "13b_x10" and system != "mell"}  # fmt: skip
    rules = {**{("overflow", *key[1:]): group for key, group in fits.items()},
             **{key: group for key, group in rows.items() if key[0] == "overflow"}}  # fmt: skip
    lengths = ("lengths", "watermark")
    plain = {key: group for key, group in rows.items() if not key[3]}
    served = [*PACKING, *PAID, *TTFT, *TPOT, *GOOD[2:], *PLANNED]
    azure = ("13b_azure", "13b_azure_x10", "7b_azure", "7b_azure_x10")
    native = ("13b_native", "7b_native")
    how = [SEEDS, GPUS, OVER, KV, TOKENS, *STALLS, *TTFT[1:], *TPOT, *GOOD[2:]]
    parts: list[tuple[str, list[str]]] = [
        ("As many GPUs as in the paper: rates at which the KV is that of its bars (13B)",
         table(rows, ("scale",), [*PACKING, *(of_paper(f"paper: {name}", of, text) for name, of, text in (
             ("GPUs", paper.GPUS, "{:.1f}"), ("used", paper.USED, "{:.0f}%"), ("moves/s", paper.MOVES, "{:.1f}"))),
             *PLANNED, KV, TOKENS])),
        ("Overflow rules of the baselines (13B, rate 1.1)",
         table(rules, ("overflow",), [*PACKING, *PAID, KV, TOKENS, Column("recomputed tokens/s", recomputed), *STALLS,
                                      *TTFT[:1], *TTFT[2:], *TPOT, *GOOD[2:]])),
        ("Watermark: latency and goodput of what arrives in the steady part (13B, rate 1.1)",
         table(rows, ("watermark",), [*PACKING, *PAID, *TTFT, *TPOT, *GOOD])),
        ("Equal service: fewest paid GPUs, over these watermarks, with which a share of requests has TTFT <= 5 s and "
         "TPOT <= 100 ms", equal_service(rows)),
        ("Hybrid, KV only, tokens only over link bandwidth in bytes/s; every GPU a machine of its own (13B, rate 1.1; "
         "prompts: `hybrid` a quarter of the tokens, `hybrid_mid` 63%, `hybrid_busy` 84%)",
         table(rows, tuple(STUDY_TITLES), how)),
        ("How long requests are: native LMSYS-like lengths (30 requests/s), and x20 (0.36/s)",
         table(rows, ("lengths",), [*PACKING, *PLANNED])),
        ("Share of live requests in each class (`watermark`: lengths x10)",
         table(plain, lengths, classes("class_requests"))),
        ("Share of KV blocks in each class (`watermark`: lengths x10)", table(plain, lengths, classes("class_blocks"))),
        ("Native lengths at three loads: 13.6, 21.8, 30 requests/s for 240 s", table(rows, native, served)),
        ("Azure conversations 2023: windows of the trace as seeds", table(rows, azure, [*BARS, *served])),
        ("Batching: moves per second that the scheduler asks for (paper, Fig. 13, 13B: 5.3 to 4.4, 12.0 to 9.0, 22.0 "
         "to 15.4)", table(rows, ("batching",), [SEEDS, GPUS, *PLANNED, KV, TOKENS])),
        ("Other switches of MELL (13B, rate 1.1)",
         table(rows, ("13b_x10",), [*PACKING, *PLANNED, KV, TOKENS, *STALLS])),
        ("5,000 s at rate 1.1, after 500 s", timeline(rows)),
    ]  # fmt: skip
    lines = ["Simulated (`python -m bench.mell.variants`, then `python -m bench.mell.studies`); conf/experiment/mell/.",
             f"Measured at commit {commits(rows)}.",
             "GPUs: of the plan, mean over the last two thirds of arrivals, then over seeds (±: standard deviation).",
             "volume <= L2 (Martello-Toth) <= optimum <= FFD (first-fit-decreasing), on the same snapshots of a run.",
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
