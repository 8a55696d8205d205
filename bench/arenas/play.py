"""One arena from end to end: search, then every seed at the default and at the best configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.arenas.cells import Cells, measured
from bench.arenas.declared import ORACLES, Arena
from bench.arenas.search import search
from common.config import compose

RESULTS = Path(__file__).resolve().parents[2] / "results" / "arenas"


def play(arena: Arena, git: dict[str, Any], systems: Sequence[str] | None = None, jobs: int = 1) -> dict[str, Any]:
    """Everything that the table, the figure and the verdict are made of, as plain values; `jobs` systems at once."""
    chosen = [system for system in arena.axes if systems is None or system in systems]
    one = partial(rows_of, arena, str(git.get("commit")) + ("-changed" if git.get("dirty") else ""))
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            rows = _flat(pool.map(one, chosen))
    else:
        rows = _flat(map(one, chosen))
    return {
        "arena": arena.name, "question": arena.question, "common": list(arena.common), "runtime": "sim",
        "objective": {"metric": arena.objective.metric, "floor": arena.objective.floor},
        "seeds": list(arena.seeds), "tuning_seeds": list(arena.tuning_seeds), "windows": arena.window_s, "git": git,
        "not_for": {system: not_for(system) for system in chosen}, "rows": rows,
    }  # fmt: skip


def rows_of(arena: Arena, code: str, system: str) -> list[dict[str, Any]]:
    """The two rows of one system. `code`: the commit, by which runs are kept."""
    cells = Cells(arena.name, code)
    total, done = arena.num_search(system) + 2 * len(arena.seeds), 0

    def measure(overrides: list[str]) -> dict[str, Any]:
        nonlocal done
        done += 1
        print(f"{arena.name}, {system}: {done}/{total}", file=sys.stderr, flush=True)
        return cells.measure(overrides)

    found = search(arena, system, measure)
    tried = [{"own": own, "score": value, "error": error} for own, value, error in found.tried]
    rows: list[dict[str, Any]] = []
    for kind, own in (("default", {}), ("best", found.best)):
        runs = [measure(arena.overrides(system, own, seed)) for seed in arena.seeds]
        rows.append({"system": system, "kind": kind, "own": own, "oracle": system in ORACLES, "runs": runs})
    rows[1]["search"] = {"best": found.best, "tried": tried}
    return rows


def moved(arena: Arena, result: dict[str, Any]) -> list[str]:
    """Rows of committed results that today's code plays otherwise on their first seed, a line each."""
    out = []
    for row in result["rows"]:
        was, now = row["runs"][0], measured(arena.overrides(row["system"], row["own"], arena.seeds[0]))
        keys = [key for key in was if was[key] != now.get(key)]
        if keys:
            met = [round(100 * float(one.get("slo_attainment") or 0), 1) for one in (was, now)]
            out.append(f"{arena.name}: {row['system']} ({row['kind']}) has moved in {len(keys)} numbers; "
                       f"targets met {met[0]}%, now {met[1]}%")  # fmt: skip
    return out


def _flat(found: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for rows in found for row in rows]


def not_for(system: str) -> str:
    import yaml

    tree = yaml.safe_load(compose([f"system={system}"]).yaml)["system"]
    return str(tree.get("not_for", ""))
