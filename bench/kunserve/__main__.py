"""python -m bench.kunserve [name …]: KunServe's experiments, simulated; without a name all of them (minutes, one core).

Tables in results/kunserve/, figures in results/figures/kunserve/. Each table says what the paper says beside it.
"""

from __future__ import annotations

import time

from bench.harness import run_named
from bench.kunserve.excess import excess
from bench.kunserve.ladder import cost, ladder, min_tokens
from bench.kunserve.mixes import mixes, testbed_b
from bench.kunserve.rule import rule
from bench.kunserve.timelines import extreme, restore, timeline

JOBS = {job.__name__: job for job in (rule, timeline, excess, mixes, ladder, restore, extreme, testbed_b, cost,
                                      min_tokens)}  # fmt: skip


if __name__ == "__main__":
    run_named(__doc__, JOBS, time.perf_counter, "s")
