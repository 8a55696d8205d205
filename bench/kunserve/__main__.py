"""python -m bench.kunserve [name …]: KunServe's experiments, simulated; without a name all of them (minutes, one core).

Tables in results/kunserve/, figures in results/figures/kunserve/. Each table says what the paper says beside it.
"""

from __future__ import annotations

import argparse
import time

from bench.kunserve.excess import excess
from bench.kunserve.ladder import cost, ladder, min_tokens
from bench.kunserve.mixes import mixes, testbed_b
from bench.kunserve.rule import rule
from bench.kunserve.timelines import extreme, restore, timeline

JOBS = {job.__name__: job for job in (rule, timeline, excess, mixes, ladder, restore, extreme, testbed_b, cost,
                                      min_tokens)}  # fmt: skip


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(JOBS))
    names = parser.parse_args().names
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        parser.error(f"{unknown[0]}: choose from {', '.join(JOBS)}")
    for name in names or JOBS:
        begin = time.perf_counter()
        JOBS[name]()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
