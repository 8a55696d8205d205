"""python -m bench.infinite_llm [name …]: Infinite-LLM's experiments, simulated; without a name all of them.

Tables in results/infinite_llm/, figures in results/figures/infinite_llm/. Nothing here is tuned to a paper's number.
(With real tensors: `python -m bench.infinite_llm_local`; ship queries or KV: `python -m bench.infinite_llm_ring`.)
"""

from __future__ import annotations

import time

from bench.harness import run_named
from bench.infinite_llm.ablations import ablations
from bench.infinite_llm.contexts import capacity, contexts
from bench.infinite_llm.curves import instances, rates, spread_curves, tight
from bench.infinite_llm.links import links
from bench.infinite_llm.mixes import mixes, mixes_dcp
from bench.infinite_llm.moves import planner, predictions

JOBS = {job.__name__: job for job in (planner, ablations, predictions, instances, spread_curves, tight, rates, links,
                                      contexts, mixes, mixes_dcp, capacity)}  # fmt: skip


if __name__ == "__main__":
    run_named(__doc__, JOBS, time.process_time, "s of CPU")
