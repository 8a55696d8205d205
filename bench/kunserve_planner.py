"""python -m bench.kunserve_planner     microseconds of the drop planner for clusters of 8 to 1024 instances.

Measured on this machine's CPU. `half`: half of all instances have to merge, in pairs; `most`: three of four, into
groups of four; `mixed`: a third of the groups are pairs already. Writes results/kunserve/planner.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from common.results import replacing
from systems.kunserve.planner import Candidate, plan_drop

REPORT = Path(__file__).resolve().parent.parent / "results" / "kunserve" / "planner.md"
HEAD = """# KunServe: time of the drop planner

Measured (one CPU core, Python, median and fastest of 200 plans); `python -m bench.kunserve_planner`. A node has 8
instances, a third of them are overloaded; the machine had other work.

| groups | half merge: median us | fastest us | three of four: median us | pairs and singles, half: median us |
|---|---|---|---|---|
"""


def times_us(candidates: Sequence[Candidate], merges: int) -> list[float]:
    """Of 200 plans."""
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        plan_drop(candidates, merges, 1, 80)
        times.append((time.perf_counter() - begin) * 1e6)
    return times


def main() -> None:
    """Print and write the table."""
    lines = []
    for num in (8, 16, 32, 64, 128, 256, 512, 1024):
        singles = [Candidate(index, 1, index // 8, index % 3 == 0) for index in range(num)]
        mixed = [one._replace(size=1 + (one.group % 3 == 1)) for one in singles]
        half, most, both = (times_us(singles, num // 2), times_us(singles, 3 * num // 4), times_us(mixed, num // 2))
        lines.append(f"| {num} | {median(half):.0f} | {min(half):.0f} | {median(most):.0f} | {median(both):.0f} |")
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    with replacing(REPORT) as path:
        path.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(HEAD + "\n".join(lines))


if __name__ == "__main__":
    main()
