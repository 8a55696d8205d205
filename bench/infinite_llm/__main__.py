"""python -m bench.infinite_llm [name …]: Infinite-LLM's experiments, simulated; without a name all of them.

Tables in results/infinite_llm/, figures in results/figures/infinite_llm/. Nothing here is tuned to a paper's number.
(With real tensors: `python -m bench.infinite_llm_local`; ship queries or KV: `python -m bench.infinite_llm_ring`.)
"""

from __future__ import annotations

import argparse
import time

from bench.infinite_llm.ablations import ablations
from bench.infinite_llm.contexts import capacity, contexts
from bench.infinite_llm.curves import instances, rates, spread_curves, tight
from bench.infinite_llm.links import links
from bench.infinite_llm.mixes import mixes, mixes_dcp
from bench.infinite_llm.moves import planner, predictions

JOBS = {job.__name__: job for job in (planner, ablations, predictions, instances, spread_curves, tight, rates, links,
                                      contexts, mixes, mixes_dcp, capacity)}  # fmt: skip


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(JOBS))
    names = parser.parse_args().names
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        parser.error(f"{unknown[0]}: choose from {', '.join(JOBS)}")
    for name in names or JOBS:
        begin = time.process_time()
        JOBS[name]()
        print(f"{name}: {time.process_time() - begin:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
