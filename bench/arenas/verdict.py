"""Who wins an arena, by how much, at what cost and where it loses: sentences made of the numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.comparison import interval

BASELINE = "vllm"
PRICES = (  # key, name, which way is better
    ("mean_ttft_ms", "mean TTFT", -1), ("p99_ttft_ms", "P99 TTFT", -1), ("mean_tpot_ms", "mean TPOT", -1),
    ("p99_tpot_ms", "P99 TPOT", -1), ("output_throughput", "output tokens/s", 1), ("gpu_seconds", "GPU-seconds", -1),
    ("slo_attainment", "targets met", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """mean(mine) / mean(theirs) - 1 over paired seeds, with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    @property
    def tells(self) -> bool:
        """Whether it is sure, and large enough to be seen in the digits that are printed."""
        return self.sure and round(abs(self.value), 3) > 0

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f}% [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def row_of(result: dict[str, Any], system: str, kind: str) -> dict[str, Any]:
    """A system's row, `default` or `best`."""
    found: dict[str, Any] = next(r for r in result["rows"] if r["system"] == system and r["kind"] == kind)
    return found


def complete(row: dict[str, Any]) -> bool:
    """Whether every seed ran to its end."""
    return not any("error" in run for run in row["runs"])


def values(row: dict[str, Any], key: str) -> list[float]:
    """A metric of every seed; NaN where there is none."""
    return [float("nan") if run.get(key) is None else float(run[key]) for run in row["runs"]]


def mean(row: dict[str, Any], key: str) -> float:
    """Over seeds."""
    return float(np.mean(values(row, key)))


def change(mine: dict[str, Any], theirs: dict[str, Any], key: str) -> Change | None:
    """None where either has nothing to compare."""
    pairs = np.array([values(mine, key), values(theirs, key)]).T
    if not np.isfinite(pairs).all() or not (pairs[:, 1] > 0).all():
        return None
    found = interval(pairs)
    assert found is not None, "arenas have several seeds"
    return Change(float(pairs[:, 0].mean() / pairs[:, 1].mean() - 1), *found)


def ranked(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Best rows of systems that are no oracle, the best first, by the arena's objective over the evaluated seeds."""
    rows = [row for row in result["rows"] if row["kind"] == "best" and not row["oracle"] and complete(row)]
    metric, floor = result["objective"]["metric"], result["objective"]["floor"]

    def score(row: dict[str, Any]) -> tuple[float, float, float]:
        met = mean(row, "slo_attainment")
        if metric == "slo_attainment":
            return round(met, 3), -mean(row, "mean_e2el_ms"), 0.0
        return (1.0, -mean(row, metric), 0.0) if met >= floor else (0.0, met, 0.0)

    return sorted(rows, key=score, reverse=True)


def sentences(result: dict[str, Any]) -> list[str]:
    """Who wins, by how much, at what cost, where it loses."""
    order = ranked(result)
    winner, second = order[0], order[1]
    metric, floor = result["objective"]["metric"], result["objective"]["floor"]
    base = row_of(result, BASELINE, "best")
    out = []
    met = 100 * mean(winner, "slo_attainment")
    reached = (f"meets the targets for {met:.1f}% of requests" if metric == "slo_attainment" else
               f"takes {mean(winner, metric):,.0f} GPU-seconds and meets the targets for {met:.1f}% of requests")
    if metric != "slo_attainment" and mean(winner, "slo_attainment") < floor:
        reached += f" (nobody meets them for {100 * floor:.0f}%: ranked by targets met)"
    out.append(f"**{winner['system']}** ({own_text(winner)}) {reached}: first of {len(order)} systems.")
    gap = change(winner, second, metric)
    jct = change(winner, second, "mean_e2el_ms")
    if gap is not None:
        tie = "" if gap.sure else ": the interval holds zero, so this is no lead"
        out.append(f"Against the second, {second['system']} ({own_text(second)}), that is {gap}{tie}"
                   + (f"; mean JCT {jct}." if jct else "."))  # fmt: skip
    if winner["system"] == BASELINE:
        base = second
    others = [(name, found, way) for key, name, way in PRICES if (found := change(winner, base, key)) is not None]
    better = [f"{name} {found}" for name, found, way in others if found.tells and found.value * way > 0]
    worse = [f"{name} {found}" for name, found, way in others if found.tells and found.value * way < 0]
    out.append(f"Against {base['system']} at its best it is better in {', '.join(better) or 'nothing that is sure'}.")
    out.append(f"It loses to it in {', '.join(worse) or 'nothing that is sure'}.")
    ahead = [text for key, name, way in PRICES if (text := _ahead(winner, order[1:], key, name, way))]
    out.append(f"The best of the others is ahead of it in {', '.join(ahead) or 'nothing that is sure'}.")
    refused = {row["system"]: mean(row, "rejected") for row in order}
    if any(refused.values()):
        none = ", ".join(name for name, number in refused.items() if not number) or "nobody"
        out.append(f"It refused {refused[winner['system']]:.1f} requests a run; {none} refused none. Refused requests "
                   "miss their targets; latencies, throughput and JCT are of finished requests only, so rows that "
                   "refuse the hard requests look faster than those that serve them.")  # fmt: skip
    out.append(f"A run moved {_moved(winner)}; {base['system']} {_moved(base)}.")
    return out


def _ahead(winner: dict[str, Any], others: list[dict[str, Any]], key: str, name: str, way: int) -> str | None:
    """By whom and how much the winner is beaten in one metric, and what that system meets of the targets."""
    found = [(gap.value * way, row, gap) for row in others if (gap := change(row, winner, key)) is not None
             and gap.tells and gap.value * way > 0]  # fmt: skip
    if not found:
        return None
    _, row, gap = max(found, key=lambda one: one[0])
    return f"{name} ({row['system']} {gap}, targets met for {100 * mean(row, 'slo_attainment'):.1f}%)"


def _moved(row: dict[str, Any]) -> str:
    return (f"{mean(row, 'bytes_moved') / 1e9:,.1f} GB, with {mean(row, 'num_migrations'):,.0f} migrations and "
            f"{mean(row, 'num_preemptions'):,.0f} preemptions")  # fmt: skip


def own_text(row: dict[str, Any]) -> str:
    """What differs from the system's defaults."""
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in row["own"].items()) or "its defaults"
