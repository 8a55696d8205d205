"""python -m bench.mell.best_fit     why best fit keeps up with MELL; results/mell/best_fit.{json,md}.

Simulated. The paper has best fit far behind, and does not say what becomes of a request that outgrows its GPU. So: the
same load (rate 1.1) under four rules for it, and where in MELL's and best fit's GPUs the room is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.mell import paper
from bench.mell.figure import cells, mean
from bench.mell.gpus import RATES, Case, measured_at, simulate
from common.sched.fleet import FleetPolicy
from systems.baselines.consolidate import FitPlanner
from systems.mell.policy import MellPlanner

SEEDS = range(5)
EXPERIMENTS = ("13b_x10", "7b_x10")
FITS = ("best_fit", "worst_fit")
OUT = Path("results/mell")
CLASSES = (("L", 1 / 2), ("M", 1 / 3), ("S", 1 / 4), ("T", 1 / 8), ("small", 0.0))


class Opens(FitPlanner):
    """Who outgrows a GPU opens another one, whoever has room."""

    def relieve(self, place: int, moved: dict[int, None]) -> None:
        """The last to come leaves for a GPU of its own."""
        while self.loads[place] > self.capacity and len(self.members[place]) > 1:
            self._next += 1
            self._shift(next(reversed(self.members[place])), self._next, moved)


class Stays(FitPlanner):
    """Who outgrows a GPU is preempted there, and waits there."""

    def relieve(self, place: int, moved: dict[int, None]) -> None:
        """Nobody leaves."""


RULES: dict[str, tuple[str, type[FitPlanner]]] = {  # name -> (prefix of the system, planner)
    "dispatched again": ("", FitPlanner), "opens a GPU": ("", Opens), "waits there": ("", Stays),
    "final size booked": ("oracle_", FitPlanner),
}  # fmt: skip


class Filled:
    """What GPUs of each type hold, noted every few seconds of the steady part: the type is the largest request's."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {name: 0 for name, _ in CLASSES}
        self.fill: dict[str, float] = {name: 0.0 for name, _ in CLASSES}
        self.snapshots = 0

    def note(self, bins: Iterable[list[int]], capacity: int) -> None:
        """One snapshot: sizes of the requests on each GPU, in shares of the room that planning may use."""
        self.snapshots += 1
        for sizes in bins:
            largest = max(sizes) / capacity
            name = next(name for name, least in CLASSES if largest > least)
            self.count[name] += 1
            self.fill[name] += sum(sizes) / capacity

    def rows(self) -> dict[str, Any]:
        """Per snapshot: GPUs, mean fill, and room that is left, in GPUs."""
        return {name: {"gpus": self.count[name] / self.snapshots, "fill": self.fill[name] / max(1, self.count[name]),
                       "left": (self.count[name] - self.fill[name]) / self.snapshots}
                for name, _ in CLASSES if self.snapshots}  # fmt: skip


def watch(policy: FleetPolicy, filled: Filled, from_s: float, until_s: float) -> None:
    """Note the planner's bins every 50th epoch."""
    planner: Any = policy.planner
    plan = planner.epoch

    def epoch(*args: Any) -> Any:
        changed = plan(*args)
        if policy.stats.epochs % 50 == 0 and from_s * 1e9 <= policy.now_ns < until_s * 1e9:
            sizes = planner.groups.sizes if isinstance(planner, MellPlanner) else planner.sizes
            bins: dict[int, list[int]] = {}
            for request_id, blocks in sizes.items():
                bins.setdefault(planner.bin_of(request_id), []).append(blocks)
            capacity = planner.groups.capacity if isinstance(planner, MellPlanner) else planner.capacity
            filled.note(bins.values(), capacity)
        return changed

    planner.epoch = epoch  # of this one


def ruled(planner: type[FitPlanner]) -> Callable[[FleetPolicy], None]:
    """The same planner with another rule."""
    def change(policy: FleetPolicy) -> None:
        old = policy.planner
        assert type(old) is FitPlanner
        policy.planner = planner(old.capacity, old.block_size, old.fit, old.overflow)

    return change


def run() -> dict[str, Any]:
    """All runs: rule and system by experiment, rows of all seeds."""
    rows: dict[str, Any] = {}
    for experiment in EXPERIMENTS:
        fits = [(fit, rule, *way) for rule, way in RULES.items() for fit in FITS]
        for system, rule, prefix, planner in [("mell", "", "", None), *fits]:
            name = f"{experiment}/{system}/{rule}"
            filled = Filled()
            for seed in SEEDS:
                rate = f"workload.rate={RATES['frequent']}"
                case = Case(experiment, "frequent", prefix + system, rule, seed, (rate,))

                def change(policy: FleetPolicy, planner: Any = planner, filled: Filled = filled) -> None:
                    if planner is not None:
                        ruled(planner)(policy)
                    watch(policy, filled, 200, 600)

                row = simulate(case, change)
                del row["timeline"]
                rows.setdefault(name, {"runs": []})["runs"].append(row)
            rows[name]["filled"] = filled.rows()
            print(f"{name}: {mean(rows[name]['runs'], 'plan_mean'):.1f}", flush=True)
    return rows


def rules_table(rows: dict[str, Any]) -> list[str]:
    """GPUs by what becomes of who outgrows one."""
    titles = ("experiment", "system", "who outgrows its GPU", "GPUs", "±", "L2", "/ L2", "MELL vs it",
              "paper: MELL vs it", "moves/s", "recomputed tokens/s", "stall P50 ms", "TTFT P99 s", "TPOT P99 ms",
              "good")  # fmt: skip
    lines = [cells(titles), "|---|---|---|" + "--:|" * (len(titles) - 3)]
    for name, value in rows.items():
        experiment, system, rule = name.split("/")
        group, mell = value["runs"], rows[f"{experiment}/mell/"]["runs"]
        bars = [paper.at(paper.GPUS, experiment, "frequent", one) for one in ("mell", system)]
        assert bars[0] is not None and bars[1] is not None
        theirs = 100 * (bars[0] / bars[1] - 1)
        ours = 100 * (mean(mell, "plan_mean") / mean(group, "plan_mean") - 1)
        other = system != "mell"
        lines.append(cells([
            experiment, system, rule, f"{mean(group, 'plan_mean'):.1f}",
            f"{np.std([row['plan_mean'] for row in group]):.1f}", f"{mean(group, 'l2_mean'):.1f}",
            f"{mean(group, 'plan_mean') / mean(group, 'l2_mean'):.2f}", f"{ours:+.0f}%" if other else "",
            f"{theirs:+.0f}%" if other else "",
            f"{mean(group, 'kv_moves_per_s') + mean(group, 'token_moves_per_s'):.1f}",
            f"{mean(group, 'recomputed_per_s'):.0f}", f"{mean(group, 'median_stall_ms'):.0f}",
            f"{mean(group, 'steady_ttft_ms_p99') / 1e3:.0f}", f"{mean(group, 'steady_tpot_ms_p99'):.0f}",
            f"{100 * mean(group, 'good_5000_100'):.0f}%",
        ]))  # fmt: skip
    return lines


def room_table(rows: dict[str, Any]) -> list[str]:
    """Where room is left."""
    titles = ("experiment", "system", "who outgrows its GPU", *(f"{name}: GPUs, fill, left" for name, _ in CLASSES),
              "left in all")  # fmt: skip
    lines = [cells(titles), "|---|---|---|" + "--:|" * (len(titles) - 3)]
    for name, value in rows.items():
        experiment, system, rule = name.split("/")
        filled = value["filled"].values()
        lines.append(cells([experiment, system, rule,
                            *(f"{one['gpus']:.1f}, {100 * one['fill']:.0f}%, {one['left']:.2f}" for one in filled),
                            f"{sum(one['left'] for one in filled):.2f}"]))  # fmt: skip
    return lines


def report(rows: dict[str, Any], commit: str) -> list[str]:
    """Both tables."""
    return [
        "Simulated (`python -m bench.mell.best_fit`): why best fit keeps up with MELL. Lengths x10, rate 1.1, means",
        f"over seeds 0 to {max(SEEDS)}. Measured at commit {commit}.",
        "",
        "## What becomes of a request that outgrows its GPU",
        "",
        "The paper does not say. `dispatched again`: by the same fit, computed anew (`overflow=preempt`, of the main",
        "comparison); `opens a GPU`: the same, but always on a new one; `waits there`: preempted where it is, until",
        "there is room; `final size booked`: it cannot happen (`oracle`). good: TTFT <= 5 s and TPOT <= 100 ms.",
        "",
        *rules_table(rows),
        "",
        "## Where room is left",
        "",
        "By the type of a GPU, that is the class of its largest request (`small`: below C/8), per snapshot: GPUs, how",
        "full they are (of what planning may use, the watermark is outside), and the room left in them, in GPUs.",
        "",
        *room_table(rows),
    ]  # fmt: skip


def main() -> None:
    """Run and write."""
    commit = measured_at()
    rows = run()
    text = "\n".join(report(rows, commit))
    (OUT / "best_fit.md").write_text(text + "\n", encoding="utf-8")
    (OUT / "best_fit.json").write_text(json.dumps({"commit": commit, "rows": rows}) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
