"""python -m bench.arenas [ARENA …]: every system in the common arenas, at its defaults and at its own best.

Writes results/arenas/ and results/figures/arenas/. The search is what conf/arena declares,
nothing else. Runs of this commit that were made before are not made again. `--draw`: tables and figures only.
`--check`: which rows of the committed results today's code plays otherwise (one seed of each; exit code 1 if any).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.arenas.declared import Arena, load, names
from bench.arenas.play import RESULTS, moved, not_for, play
from bench.arenas.table import markdown
from bench.harness import exit_with
from common.errors import ConfigError
from common.provenance import git_state
from common.results import replacing


def present(result: dict[str, Any], arena: Arena) -> None:
    """The table and the figure of what was measured."""
    from bench.arenas.figure import draw

    with replacing(RESULTS / f"{arena.name}.md") as path:
        path.write_text(markdown(result), encoding="utf-8")
    for drawn in draw(result):
        print(f"wrote {drawn.name}")


def check(arenas: Sequence[str]) -> int:
    """1 and a line per row where something has moved."""
    lines = []
    for name in arenas:
        kept, arena = RESULTS / f"{name}.json", load(name)
        if kept.exists() and arena.present:
            lines += moved(arena, json.loads(kept.read_text(encoding="utf-8")))
    print("\n".join(lines) or "no row has moved")
    return 1 if lines else 0


def main() -> int:
    """Everything, or the named arenas."""
    parser = argparse.ArgumentParser(prog="bench.arenas", description=__doc__)
    parser.add_argument("arenas", nargs="*", help=f"of {', '.join(names())} (default: all)")
    parser.add_argument("--systems", help="only these, comma separated")
    parser.add_argument("--jobs", type=int, default=1, help="systems at a time, each in a process (%(default)s)")
    parser.add_argument("--check", action="store_true", help="name rows of the committed results that have moved")
    parser.add_argument("--draw", action="store_true", help="tables and figures from the committed results")
    options = parser.parse_args()
    if options.check:
        return check(options.arenas or names())
    git = git_state()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.arenas or names():
        arena = load(name)
        kept = RESULTS / f"{name}.json"
        if options.draw:
            if not kept.exists():
                raise ConfigError(f"{kept.name} is not there: run bench.arenas {name} first")
            result = json.loads(kept.read_text(encoding="utf-8"))
            result["not_for"] = {system: not_for(system) for system in result["not_for"]}  # words, not measurements
            present(result, arena)
            continue
        if not arena.present:
            print(f"{name}: skipped, {arena.needs} is not in the data folder", file=sys.stderr)
            continue
        begin = time.perf_counter()
        result = play(arena, git, options.systems.split(",") if options.systems else None, options.jobs)
        with replacing(kept) as path:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        present(result, arena)
    return 0


if __name__ == "__main__":
    exit_with(main)
