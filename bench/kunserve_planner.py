"""python -m bench.kunserve_planner     microseconds of the drop planner for clusters of 8 to 1024 instances."""

from __future__ import annotations

import time

from systems.kunserve.planner import Candidate, plan_drop


def main() -> None:
    """Plans that merge half of all instances; the median of many."""
    for num in (8, 16, 32, 64, 128, 256, 512, 1024):
        candidates = [Candidate(index, 1, index // 8, index % 3 == 0) for index in range(num)]
        times = []
        for _ in range(50):
            begin = time.perf_counter()
            plan_drop(candidates, num // 2, 1, 48)
            times.append(time.perf_counter() - begin)
        print(f"N = {num:5,}   {sorted(times)[25] * 1e6:8.1f} us   {num // 2} merges")


if __name__ == "__main__":
    main()
