"""python -m bench.memserve_shapes: does each panel of Fig. 8 keep the paper's order and crossings, and if not, why?

Reads results/memserve/fig8.json (simulated) and the digitised curves; runs nothing. Labels and reasons follow from
rules that are stated in the report, not from a reading of the figure.
"""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from bench.harness import exit_with, write_report
from bench.memserve import RESULTS
from bench.memserve_fig8 import BEYOND, RATES, SHAPES
from workloads.paths import data_root

METRICS = {"jct_s": ("JCT", 1.0), "ttft_s": ("TTFT", 1.0), "tpot_ms": ("TPOT", 1e3)}
STATISTICS = {"mean": "avg", "p99": "p99"}
TIE = 0.05  # relative: settings closer than this have no order
ENOUGH = 0.8
QUEUES = 0.5  # busy for less: a prompt seldom finds another one before it
LOADED = 0.1  # more of the ordered pairs agree beyond the paper's rates: load is what is missing
CAUSES = {
    "decode_batch": "the decode batch",
    "prefill_busy": "how busy prefill is",
    "computed": "the prompt tokens that are computed",
    "copy_ms_mean": "the time of a transfer",
}
Curves = dict[str, list[float]]  # setting -> value by rate


def sign(one: float, other: float) -> int:
    """-1: `one` is lower by more than a tie; 1: higher; 0: level."""
    if abs(one - other) <= TIE * max(one, other):
        return 0
    return -1 if one < other else 1


def order(curves: Curves, place: int) -> str:
    """Settings from the lowest value up; `=` joins neighbours that are level."""
    names = sorted(curves, key=lambda name: curves[name][place])
    text = names[0]
    for before, name in pairwise(names):
        text += (" < " if sign(curves[before][place], curves[name][place]) else " = ") + name
    return text


def agreement(ours: Curves, theirs: Curves, place: int) -> tuple[int, int, int]:
    """Pairs that the paper orders: (same order here, level here, all)."""
    pairs = [(sign(theirs[a][place], theirs[b][place]), sign(ours[a][place], ours[b][place]))
             for a, b in combinations(sorted(ours), 2)]  # fmt: skip
    ordered = [(paper, here) for paper, here in pairs if paper]
    return sum(p == h for p, h in ordered), sum(h == 0 for _, h in ordered), len(ordered)


def crossings(curves: Curves, rates: tuple[int, ...] = RATES) -> set[str]:
    """Pairs whose order turns round from one rate to the next that orders them."""
    found = set()
    for a, b in combinations(sorted(curves), 2):
        seen = [(rate, s) for rate, x, y in zip(rates, curves[a], curves[b]) if (s := sign(x, y))]
        found |= {f"{a}/{b} {r}-{q}" for (r, s), (q, t) in pairwise(seen) if s != t}
    return found


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, for values without many ties; 0 if one side is level."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    ranks, others = (np.argsort(np.argsort(values)) for values in (one, other))
    return float(np.corrcoef(ranks, others)[0, 1])


def decides(ours: Curves, counted: dict[str, dict[str, float]]) -> tuple[str, float]:
    """The counter that the order of the settings at 5/s follows most, and its rank correlation."""
    found = {}
    for key, words in CAUSES.items():
        values = [counted[name]["computed" if key == "computed" else key] for name in ours]
        found[words] = rank_correlation([curve[-1] for curve in ours.values()], values)
    best = max(found, key=lambda words: found[words])
    return best, found[best]


def reason(ours: Curves, theirs: Curves, beyond: Curves, counted: dict[str, dict[str, float]], metric: str) -> str:
    """Why a panel is not reproduced, from the counters and from runs beyond the paper's rates."""
    growth = [max(curve[-1] / curve[0] for curve in curves.values()) for curves in (theirs, ours)]
    words, rho = decides(ours, counted)
    last = {name: curve[-1:] for name, curve in theirs.items()}
    here, _, pairs = agreement({name: curve[-1:] for name, curve in ours.items()}, last, 0)
    there, _, _ = agreement(beyond, last, 0)
    busy = max(counted[name]["prefill_busy"] for name in ours)
    batch = max(counted[name]["decode_batch"] for name in ours)
    evidence = (f"here the order follows {words} (rank correlation {rho:.2f}); at 5/s prefill is busy {busy:.0%} at "
                f"most, a decode batch is {batch:.0f} at most; growth from 1/s to 5/s {growth[0]:.1f}x, here "
                f"{growth[1]:.1f}x; of {pairs} pairs ordered at 5/s {here} agree, {there} with ours at "
                f"{BEYOND[-1]}/s")  # fmt: skip
    share, where = most_missed(ours, theirs)
    evidence += f"; {share:.0%} of the missed pairs have {where} in them"
    if there - here >= LOADED * pairs:
        return f"LOAD: our instances are faster, and nothing queues as in the paper: {evidence}"
    if metric == "ttft_s" and busy < QUEUES:
        return f"MECHANISM: no queue in front of prefill, here or at more load: {evidence}"
    if metric == "ttft_s":
        return f"MECHANISM: prefill queues as its load says, the paper's 1P2D longer than that: {evidence}"
    mine = counted["PD"]["prefill_busy"]
    return f"MECHANISM: splitting wins little, as PD spends {mine:.0%} of its time on prompts: {evidence}"


def most_missed(ours: Curves, theirs: Curves) -> tuple[float, str]:
    """The setting in most of the pairs that have another order here, over all rates, and its share of them."""
    missed = [pair for place in range(len(RATES)) for pair in combinations(sorted(ours), 2)
              if (paper := sign(*(theirs[name][place] for name in pair)))
              and paper != sign(*(ours[name][place] for name in pair))]  # fmt: skip
    counts = {name: sum(name in pair for pair in missed) for name in sorted(ours)}
    worst = max(counts, key=lambda name: counts[name])
    return counts[worst] / max(1, len(missed)), worst


def verdict(ours: Curves, theirs: Curves, rates: tuple[int, ...]) -> tuple[bool, int, int, int]:
    """The rule, at these rates: (reproduced, pairs in the paper's order, level here, all that the paper orders)."""
    places = [RATES.index(rate) for rate in rates]
    mine, paper = ({name: [curve[place] for place in places] for name, curve in curves.items()}
                   for curves in (ours, theirs))  # fmt: skip
    counts = [agreement(mine, paper, place) for place in range(len(rates))]
    same, level, every = (sum(column) for column in zip(*counts))
    # the crossing's place is not asked for, only which curves cross
    here, there = ({text.split()[0] for text in crossings(curves, rates)} for curves in (mine, paper))
    return same >= ENOUGH * every and there <= here, same, level, every


def panel(rows: list[dict[str, Any]], paper: Curves, workload: str, metric: str, statistic: str,
          rates: tuple[int, ...]) -> Curves:  # fmt: skip
    """Our curves of the settings that the paper has, in the paper's unit."""
    scale, key = METRICS[metric][1], f"{metric}_{statistic}"
    mine = {(row["setting"], row["rate"]): row[key] / scale for row in rows if row["workload"] == workload}
    return {name: [mine[name, rate] for rate in rates] for name in paper if (name, rates[0]) in mine}


def busy(rows: list[dict[str, Any]], workload: str) -> dict[str, dict[str, float]]:
    """Counters by setting at 5/s. `computed`: share of prompt tokens that no cache had."""
    return {row["setting"]: {**row, "computed": 1 - row["hit_ratio"]} for row in rows
            if row["workload"] == workload and row["rate"] == RATES[-1]}  # fmt: skip


def labelled(tables: dict[str, Any], paper: Curves, workload: str, metric: str,
             statistic: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """A panel's row and its orders."""
    ours = panel(tables["points"], paper, workload, metric, statistic, RATES)
    theirs = {name: paper[name] for name in ours}
    done, same, level, every = verdict(ours, theirs, RATES)
    crossed, expected = crossings(ours), crossings(theirs)
    here, there = ({text.split()[0] for text in texts} for texts in (crossed, expected))
    name = f"{workload} {METRICS[metric][0]} {statistic}"
    beyond = panel(tables["beyond the paper's rates"], paper, workload, metric, statistic, BEYOND[-1:])
    why = "" if done else reason(ours, theirs, beyond, busy(tables["counters"], workload), metric)
    row = {"panel": name, "ordered_pairs": every, "same": same, "level_here": level, "reversed": every - same - level,
           "paper_crossings": len(there), "crossings_here": len(here), "kept": len(there & here),
           "label": "reproduced" if done else "not reproduced",
           "at_1_3_5": "reproduced" if verdict(ours, theirs, RATES[::2])[0] else "not reproduced",
           "reason": why}  # fmt: skip
    orders = [{"panel": name, "rate": rate, "paper": order(theirs, place), "simulated": order(ours, place)}
              for place, rate in enumerate(RATES)]  # fmt: skip
    orders.append({"panel": name, "rate": "crossings", "paper": ", ".join(sorted(expected)) or "none",
                   "simulated": ", ".join(sorted(crossed)) or "none"})  # fmt: skip
    return row, orders


def main() -> int:
    """Both tables."""
    tables = json.loads((RESULTS / "fig8.json").read_text())["tables"]
    paper = json.loads((data_root() / "memserve_fig8.json").read_text())
    orders: list[dict[str, Any]] = []
    panels: list[dict[str, Any]] = []
    for workload in SHAPES.values():
        for metric, (label, _) in METRICS.items():
            for statistic, suffix in STATISTICS.items():
                row, more = labelled(tables, paper[f"{workload} {label}{suffix}"], workload, metric, statistic)
                panels.append(row)
                orders += more
    notes = [
        "Simulated (fig8.json) against the paper's digitised curves, at 1 to 5 req/s per instance. Two settings within "
        f"{TIE:.0%} are level (=). A panel is `reproduced` if at least {ENOUGH:.0%} of the pairs that the paper orders "
        "have that order here and every pair of curves that crosses there crosses here. The paper has no P50; ours is "
        "in fig8.md. `1P1D/PD 3-5`: the order turns between the rates 3 and 5. PD-CC is in every panel. Settings "
        "without a curve on either side are left out.",
        "at_1_3_5: the same rule at those three rates alone, as an earlier version of this table had it.",
        f"Reasons: LOAD if at {BEYOND[-1]}/s, beyond the paper's rates, at least {LOADED:.0%} more of the pairs that "
        "the paper orders at 5/s have its order, else MECHANISM: more load does not bring it. The counter that our "
        "order follows is the one with the highest rank correlation over the settings at 5/s, of: decode batch, share "
        "of time with prefill, share of prompt tokens computed, mean time of a transfer (a low correlation: none of "
        "them). The paper's engine cannot be run, so what decides there is not known.",
    ]  # fmt: skip
    write_report("shapes", "Fig. 8 by panel: reproduced or not", notes, {"panels": panels, "orders": orders}, RESULTS)
    print(f"{sum(row['label'] == 'reproduced' for row in panels)} of {len(panels)} panels reproduced")
    return 0


if __name__ == "__main__":
    exit_with(main)
