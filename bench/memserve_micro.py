"""python -m bench.memserve_micro index|cached|modes|calls|pool: MemServe's microbenchmarks, table and figure each.

index: time of hash and radix index over prompt length (measured here). cached: TTFT over the cached ratio, from HBM and
from DRAM (simulated). modes: where by_layer stops to pay and by_request_agg begins (simulated). calls: time of one
prompt's transfer over the number of communicators (simulated). pool: time of alloc_mem and free_mem (measured here).
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count, product
from typing import Any

import numpy as np

from bench.harness import asked, exit_with, write_report
from bench.memserve import RESULTS, keep, numbers, simulate
from common.kv.hash_index import HashIndex
from common.kv.index import PrefixIndex
from common.types import Content, InstanceInfo
from systems.memserve.config import MODES, num_calls
from systems.memserve.mempool import MemPool
from systems.memserve.tree import PoolTree

LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
INDICES: dict[str, Any] = {"hash": HashIndex, "radix": PrefixIndex, "pool_tree": PoolTree}


def index() -> None:
    """Insert, then match, over length; a line through the logarithms says how time grows."""
    rows: list[dict[str, Any]] = []
    for piece in (512, 16):
        for tokens in LENGTHS:
            content: Content = tuple((f"h{place}", 0, piece) for place in range(tokens // piece))
            rows.append({"piece": piece, "tokens": tokens, **_index_ms(content, tokens)})
    fits = [_fit([row for row in rows if row["piece"] == piece], piece, f"{name}_{call}_ms")
            for piece in (512, 16) for name in INDICES for call in ("insert", "match")]  # fmt: skip
    notes = ["Measured on a shared CPU: CPU time of this process, best of seven. Blocks of 16 tokens; names are pieces "
             "of 512 tokens (as in the Mooncake trace) or of 16: the hash index touches every block, the trees every "
             "piece.",
             "Exponent: slope of log time over log tokens from 4,096 tokens on; 1 is O(length)."]  # fmt: skip
    keep("index", "Index time, hash against radix", notes, {"by length": rows, "fit": fits})


def _index_ms(content: Content, tokens: int) -> dict[str, float]:
    row: dict[str, float] = {}
    for name, kind in INDICES.items():
        inserts, matches = [], []
        for _ in range(7):
            made: Any = kind(16)
            begin = time.process_time()
            lease = made.acquire((), 0)
            (made.insert if kind is PoolTree else made.extend)(lease, content, tokens)
            inserts.append(time.process_time() - begin)
            begin = time.process_time()
            made.match(content, tokens)
            matches.append(time.process_time() - begin)
        row[f"{name}_insert_ms"], row[f"{name}_match_ms"] = min(inserts) * 1e3, min(matches) * 1e3
    return row


def _fit(rows: list[dict[str, Any]], piece: int, key: str) -> dict[str, Any]:
    """Exponent of time over length, its largest residual, and the cost of a token at the longest."""
    long = [row for row in rows if row["tokens"] >= 4096]
    lengths, times = (np.log([row[name] for row in long]) for name in ("tokens", key))
    exponent, offset = np.polyfit(lengths, times, 1)
    residual = np.abs(np.exp(times - exponent * lengths - offset) - 1).max()
    return {"piece": piece, "call": key.removesuffix("_ms"), "exponent": float(exponent),
            "largest_residual": float(residual), "ns_a_token": rows[-1][key] * 1e6 / rows[-1]["tokens"]}  # fmt: skip


def pool() -> None:
    """alloc_mem and free_mem over the number of blocks: from free blocks, and where every block must be evicted."""
    rows: list[dict[str, Any]] = []
    for num, full in product((1, 16, 64, 256, 1024), (False, True)):
        allocs, frees = [], []
        for _ in range(7):
            made = _pool(2048, filled=full)
            begin = time.process_time()
            addresses = made.alloc_mem(num, [])
            allocs.append(time.process_time() - begin)
            assert addresses is not None
            begin = time.process_time()
            made.free_mem(addresses)
            frees.append(time.process_time() - begin)
        rows.append({"blocks": num, "evicted": made.counters["evicted"], "alloc_us": min(allocs) * 1e6,
                     "free_us": min(frees) * 1e6, "alloc_ns_a_block": min(allocs) * 1e9 / num,
                     "free_ns_a_block": min(frees) * 1e9 / num})  # fmt: skip
    notes = ["Measured on a shared CPU: CPU time of this process, best of seven. The planner's side of the pool: it "
             "keeps counts, ids are the executor's; a call for many blocks costs what one for a block does, unless it "
             "evicts (leaves of four blocks here). Paper, Fig. 9: 570 ns a block to allocate and 410 ns to free "
             "256 of them; its text says some 800 ns."]  # fmt: skip
    write_report("pool", "Time of alloc_mem and free_mem", notes, {"by blocks": rows}, RESULTS)


def _pool(num_blocks: int, filled: bool) -> MemPool:
    """A pool of one instance, empty or full of cached prompts of four blocks."""
    numbers_of = count()
    made = MemPool(InstanceInfo(0, 40, num_blocks * 40, 4096, 0), num_blocks, 16, lambda: next(numbers_of))
    for prompt in range(num_blocks // 4 if filled else 0):
        content: Content = ((f"p{prompt}", 0, 64),)
        lease = made.pin(content, 0)
        assert made.take(4, [])
        made.retire(prompt, content, (0, 64), 4, lease, [])
        made.unpin(lease)
    return made


def cached() -> None:
    """The second of two requests shares a part of its prompt with the first."""
    rows: list[dict[str, Any]] = []
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

                _, record, policy = simulate(["experiment=memserve/cached", *more, "workload.num_requests=2"], pair)
                first, arrival = record.requests.first_token_ns[1], record.requests.arrival_ns[1]
                line.append((first - arrival) / 1e6)
                rows.append({"prompt": prompt, "cached_in": place, "ratio": ratio, "ttft_ms": line[-1],
                             "percent_of_uncached": 100 * line[-1] / line[0], "hit": policy.flows[1].hit,
                             "swapped_in": policy.flows[1].swapped})  # fmt: skip
    notes = ["Simulated: one instance of Llama-2-13B (H800, TP2). DRAM: the first request's blocks are swapped out at "
             "its end; they are swapped in if that is estimated to be faster than recomputing."]  # fmt: skip
    keep("cached", "TTFT over the cached ratio", notes, {"points": rows})


def modes() -> None:
    """1024 in, 32 out, 1P1D: JCT of the three transfer modes over the rate."""
    rows: list[dict[str, Any]] = []
    ways = [(1, True), (4, True), (16, True), (1, False)]
    for (communicators, ordered), mode, rate in product(ways, MODES, (2, 5, 10, 15, 20, 40)):
        load = ["experiment=memserve/modes", f"workload.rate={rate}", f"system.transfer={mode}",
                f"system.ordered={ordered}", f"system.communicators={communicators}"]  # fmt: skip
        _, record, _ = simulate(load)
        found, moves = numbers(record), record.moves
        wire = np.array(moves.end_ns) - np.array(moves.start_ns)
        rows.append({"communicators": communicators, "ordered": ordered, "mode": mode, "rate": rate,
                     "jct_s_p50": found["jct_s_p50"], "jct_s_p99": found["jct_s_p99"],
                     "ttft_s_p50": found["ttft_s_p50"], "copy_ms_mean": float(wire.mean()) / 1e6})  # fmt: skip
    notes = ["Simulated: 1P1D of Llama-2-13B (H800, TP2), 150 requests a point. A call costs 10 us, those of a "
             "communicator one after another: 2L calls a block by layer and by request, one when aggregated; a prompt "
             "of 1,024 tokens is 5,120 calls, or 64. By layer they begin with the prefill's first layer. `ordered`: a "
             "prefill instance sends one prompt after another; without, two prompts' calls do not wait."]  # fmt: skip
    keep("modes", "Transfer modes over the rate", notes, {"points": rows})


FIG11_MS = {1: 102.0, 2: 69.0, 4: 38.5, 8: 29.6, 16: 24.2}  # 2,048 tokens, by request; aggregated 19.3 ms everywhere


def calls() -> None:
    """One prompt of 2,048 tokens goes from P to D: calls and time, over communicators."""
    rows: list[dict[str, Any]] = []
    for mode, communicators in product(MODES, FIG11_MS):
        load = ["experiment=memserve/modes", "workload.num_requests=1", "workload.prompt_tokens=2048",
                f"system.transfer={mode}", f"system.communicators={communicators}"]  # fmt: skip
        _, record, policy = simulate(load)
        moves = record.moves
        paper = {"by_request": FIG11_MS[communicators], "by_request_agg": 19.3}.get(mode, float("nan"))
        rows.append({"mode": mode, "communicators": communicators,
                     "calls_in_turn": num_calls(mode, 2048 // 16, 40, communicators),
                     "transfer_ms": (moves.end_ns[0] - moves.start_ns[0]) / 1e6, "paper_ms": paper,
                     "gb_s": policy.flows[0].sent_bytes / (moves.end_ns[0] - moves.start_ns[0])})  # fmt: skip
    notes = ["Simulated: 1P1D of Llama-2-13B (H800, TP2), one prompt of 2,048 tokens: 128 blocks of 16. The paper's "
             "numbers are digitised from its Fig. 11. The cost of a call, 10 us, was derived from its 102 ms at one "
             "communicator, so that point is no prediction; the others are. By layer the transfer begins with the "
             "prefill and cannot end before it."]  # fmt: skip
    keep("calls", "A prompt's transfer over the number of communicators", notes, {"points": rows})


def main() -> int:
    """One of the experiments."""
    asked({"index": index, "cached": cached, "modes": modes, "calls": calls, "pool": pool})()
    return 0


if __name__ == "__main__":
    exit_with(main)
