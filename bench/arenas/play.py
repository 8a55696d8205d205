"""One arena from end to end: search, then every seed at the default and at the best configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arenas.cells import Cells
from bench.arenas.declared import ORACLES, Arena
from bench.arenas.search import search
from common.config import compose

RESULTS = Path(__file__).resolve().parents[2] / "results" / "arenas"


def play(arena: Arena, git: dict[str, Any], systems: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that the table, the figure and the verdict are made of, as plain values."""
    cells = Cells(arena.name, str(git.get("commit")) + ("-changed" if git.get("dirty") else ""))
    chosen = [system for system in arena.axes if systems is None or system in systems]
    total = sum(arena.num_search(system) + 2 * len(arena.seeds) for system in chosen)
    done = 0

    def measure(overrides: list[str]) -> dict[str, Any]:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {arena.name}: {overrides[-2]}", file=sys.stderr, flush=True)
        return cells.measure(overrides)

    rows = []
    for system in chosen:
        found = search(arena, system, measure)
        tried = [{"own": own, "score": value, "error": error} for own, value, error in found.tried]
        own_limits = {"best": found.best, "tried": tried}
        for kind, own in (("default", {}), ("best", found.best)):
            runs = [measure(arena.overrides(system, own, seed)) for seed in arena.seeds]
            rows.append({"system": system, "kind": kind, "own": own, "oracle": system in ORACLES, "runs": runs,
                         **({"search": own_limits} if kind == "best" else {})})  # fmt: skip
    return {
        "arena": arena.name, "question": arena.question, "common": list(arena.common), "runtime": "sim",
        "objective": {"metric": arena.objective.metric, "floor": arena.objective.floor},
        "seeds": list(arena.seeds), "tuning_seed": arena.tuning_seed, "windows": arena.window_s, "git": git,
        "not_for": {system: _not_for(system) for system in chosen}, "rows": rows,
    }  # fmt: skip


def _not_for(system: str) -> str:
    import yaml

    tree = yaml.safe_load(compose([f"system={system}"]).yaml)["system"]
    return str(tree.get("not_for", ""))
