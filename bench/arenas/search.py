"""Each system's own best configuration: one pass over its declared axes, on the tuning seeds."""

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
        summaries = [measure(arena.overrides(system, own, seed)) for seed in arena.tuning_seeds]
        error = next((one["error"] for one in summaries if "error" in one), None)
        value = WORST if error else arena.objective.score(summaries)
        tried.append((own, value, error))
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
