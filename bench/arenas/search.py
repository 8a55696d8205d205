"""Each system's own best configuration: one pass over its declared axes, on the tuning seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.arenas.declared import Arena

Summary = dict[str, Any]
Measure = Callable[[list[str]], Summary]
WORST = (-1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Found:
    """`best`: keys that differ from the defaults; `tried`: every (keys, score, error) in order."""

    best: dict[str, Any]
    tried: tuple[tuple[dict[str, Any], tuple[float, float, float], str | None], ...]


def search(arena: Arena, system: str, measure: Measure) -> Found:
    """One pass of coordinate search; a value is kept only if it is better than all before it."""
    tried: list[tuple[dict[str, Any], tuple[float, float, float], str | None]] = []

    def score(own: dict[str, Any]) -> tuple[float, float, float]:
        summary = measure(arena.overrides(system, own, arena.tuning_seed))
        value = WORST if "error" in summary else arena.objective.score(summary)
        tried.append((own, value, summary.get("error")))
        return value

    best: dict[str, Any] = {}
    reached = score(best)
    for key, values in arena.axes[system].items():
        base = best
        for value in values:
            trial = {**base, key: value}
            found = score(trial)
            if found > reached:
                best, reached = trial, found
    return Found(best, tuple(tried))
