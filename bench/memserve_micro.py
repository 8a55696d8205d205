"""python -m bench.memserve_micro index|cached|modes: MemServe's microbenchmarks, table and figure each.

index: time of hash and radix index over prompt length (measured here). cached: TTFT over the cached ratio, from HBM and
from DRAM (simulated). modes: where by_layer stops to pay and by_request_agg begins (simulated).
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

from bench.harness import exit_with
from bench.memserve import keep, numbers, simulate
from common.errors import ConfigError
from common.kv.hash_index import HashIndex
from common.kv.index import PrefixIndex
from common.plots.style import new_figure
from common.types import Content
from systems.memserve.tree import PoolTree

LENGTHS = (1024, 4096, 16384, 65536, 131072)
SESSIONS = ("experiment=memserve/sharegpt", "system.design=colocated_caching", "cluster.num_instances=1")


def index() -> None:
    """Insert, then match: the best of five."""
    rows: list[dict[str, Any]] = []
    for tokens in LENGTHS:
        content: Content = tuple((f"h{place}", 0, 512) for place in range(tokens // 512))
        row: dict[str, Any] = {"tokens": tokens}
        for name, kind in (("hash", HashIndex), ("radix", PrefixIndex), ("pool_tree", PoolTree)):
            inserts, matches = [], []
            for _ in range(5):
                made: Any = kind(16)
                begin = time.perf_counter()
                lease = made.acquire((), 0)
                (made.insert if kind is PoolTree else made.extend)(lease, content, tokens)
                inserts.append(time.perf_counter() - begin)
                begin = time.perf_counter()
                made.match(content, tokens)
                matches.append(time.perf_counter() - begin)
            row[f"{name}_insert_ms"], row[f"{name}_match_ms"] = min(inserts) * 1e3, min(matches) * 1e3
        rows.append(row)
    figure, axes = new_figure(1, 1, 5.0, 3.6)
    for name in ("hash", "radix", "pool_tree"):
        axes[0][0].loglog(LENGTHS, [row[f"{name}_match_ms"] for row in rows], marker="o", label=name)
    axes[0][0].set_xlabel("tokens")
    axes[0][0].set_title("index: match (ms), measured on a CPU")
    axes[0][0].legend()
    notes = ["Measured on a shared CPU, best of five. Names are pieces of 512 tokens, blocks of 16: the hash index "
             "touches every block, the trees every piece."]  # fmt: skip
    keep("index", "Index time, hash against radix", notes, {"by length": rows}, figure)


def cached() -> None:
    """The second of two requests shares a part of its prompt with the first."""
    rows: list[dict[str, Any]] = []
    figure, axes = new_figure(1, 1, 5.6, 3.8)
    ratios = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    for prompt in (512, 1024, 2048, 4096):
        for place, more in (("hbm", ["system.swap=false"]), ("dram", ["system.swap_low=1.0", "system.swap_high=1.0"])):
            line = []
            for ratio in ratios:
                shared = int(prompt * ratio) // 16 * 16

                def pair(workload: Any, shared: int = shared, prompt: int = prompt) -> Any:
                    parts = (("doc", 0, shared),) if shared else ()
                    rest = prompt - shared
                    content = tuple((*parts, (f"own{who}", 0, rest)) if rest else parts for who in range(2))
                    return replace(workload, arrival_ns=np.array([0, 10**11]), content=content, session=None,
                                   prompt_tokens=np.array([prompt] * 2), output_tokens=np.array([2, 2]),
                                   release_after=None, think_ns=None)  # fmt: skip

                _, record, policy = simulate([*SESSIONS, *more, "workload.num_requests=2"], pair)
                first, arrival = record.requests.first_token_ns[1], record.requests.arrival_ns[1]
                line.append((first - arrival) / 1e6)
                rows.append({"prompt": prompt, "cached_in": place, "ratio": ratio, "ttft_ms": line[-1],
                             "percent_of_uncached": 100 * line[-1] / line[0], "hit": policy.flows[1].hit,
                             "swapped_in": policy.flows[1].swapped})  # fmt: skip
            axes[0][0].plot(ratios, [100 * value / line[0] for value in line], marker="o", ms=3,
                            ls="-" if place == "hbm" else "--", label=f"{prompt} {place}")  # fmt: skip
    axes[0][0].set_xlabel("cached ratio")
    axes[0][0].set_title("TTFT, % of uncached (simulated)")
    axes[0][0].legend(fontsize=7)
    notes = ["Simulated: one instance of Llama-2-13B (H800, TP2). DRAM: the first request's blocks are swapped out at "
             "its end; they are swapped in if that is estimated to be faster than recomputing."]  # fmt: skip
    keep("cached", "TTFT over the cached ratio", notes, {"points": rows}, figure)


def modes() -> None:
    """1024 in, 32 out, 1P1D: JCT of the three transfer modes over the rate."""
    rows: list[dict[str, Any]] = []
    rates = (2, 5, 10, 20, 40)
    figure, axes = new_figure(1, 2, 9.0, 3.6)
    for mode in ("by_layer", "by_request", "by_request_agg"):
        for rate in rates:
            load = ["workload=poisson", "workload.lengths=fixed", "workload.output_tokens=32", f"workload.rate={rate}",
                    "workload.num_requests=150", "model=llama2-13b", "hardware=h800-80g", "cluster.tp=2"]  # fmt: skip
            _, record, _ = simulate(["system=pd", f"system.transfer={mode}", "cluster.num_instances=2", *load])
            found = numbers(record)
            moves = record.moves
            wire = np.array(moves.end_ns) - np.array(moves.start_ns)
            rows.append({"mode": mode, "rate": rate, "jct_s_p50": found["jct_s_p50"], "jct_s_p99": found["jct_s_p99"],
                         "copy_ms_mean": float(wire.mean()) / 1e6})  # fmt: skip
        for axis, key in zip(axes[0], ("jct_s_p50", "jct_s_p99")):
            axis.semilogx(rates, [row[key] for row in rows[-len(rates) :]], marker="o", ms=3, label=mode)
            axis.set_title(f"{key} (simulated)")
            axis.set_xlabel("requests/s")
    axes[0][0].legend()
    notes = ["Simulated: 1P1D of Llama-2-13B (H800, TP2), 150 requests a point, one communicator. A call costs 10 us, "
             "one after another: 2L calls a block by layer and by request, one when aggregated."]  # fmt: skip
    keep("modes", "Transfer modes over the rate", notes, {"points": rows}, figure)


def main() -> int:
    """One of the experiments."""
    jobs = {"index": index, "cached": cached, "modes": modes}
    if len(sys.argv) != 2 or sys.argv[1] not in jobs:
        raise ConfigError(f"which of {', '.join(jobs)}?")
    jobs[sys.argv[1]]()
    return 0


if __name__ == "__main__":
    exit_with(main)
