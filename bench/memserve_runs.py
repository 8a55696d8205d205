"""python -m bench.memserve_runs ladder|mooncake [requests]: MemServe's simulated experiments.

ladder: the designs against each other, by turn of a session. mooncake: the routing policies on the production trace,
against an infinite cache.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from bench.harness import asked, exit_with
from bench.memserve import balance, hit_ratio, hot_minutes, keep, numbers, simulate
from common.kv.index import PrefixIndex

BLOCK = 512  # tokens of a name in the Mooncake traces
COUNTERS = ("P hit tokens", "P computed tokens", "P→D tokens", "D→P tokens", "P→D MB", "D→P MB", "TTFT ms")
LADDER = ("pd_basic", "pd_caching_1", "pd_caching_2", "pd_caching_3")
RULES = ("round_robin", "least_load", "session", "prompt_tree_longest", "prompt_tree_cost", "mooncake", "sglang_router")
VARIANTS = {
    "prompt_tree_longest+guard": ("system.policy=prompt_tree_longest", "system.guard_s=2.0"),
    "prompt_tree_cost+guard": ("system.policy=prompt_tree_cost", "system.guard_s=2.0"),
    "prompt_tree_cost, no Eq. 2": ("system.policy=prompt_tree_cost", "system.fetch=false"),
}


def ladder(num: int) -> None:
    """P hits, recomputed prompt tokens and bytes each way, by turn."""
    rows: list[dict[str, Any]] = []
    for design in LADDER:
        load = (f"system.design={design}", f"workload.num_requests={num}")
        _, record, policy = simulate(["experiment=memserve/ladder", *load])
        times = record.requests
        turn: dict[int, int] = {}
        found: dict[int, list[tuple[float, ...]]] = {}
        for request_id, flow in sorted(policy.flows.items()):
            turn[flow.session] = index = turn.get(flow.session, 0) + 1
            ttft_ms = (times.first_token_ns[request_id] - times.arrival_ns[request_id]) / 1e6
            row = (flow.hit, flow.prompt - flow.hit, flow.sent_tokens, flow.back_tokens, flow.sent_bytes / 1e6,
                   flow.back_bytes / 1e6, ttft_ms)  # fmt: skip
            found.setdefault(index, []).append(row)
        for index in sorted(found):
            rows.append({"design": design, "turn": index, "requests": len(found[index]),
                         **dict(zip(COUNTERS, np.mean(found[index], 0).tolist()))})  # fmt: skip
    notes = ["Simulated. Means per request, by turn; 4 instances (2P2D) of Llama-2-13B on H800, TP2; ShareGPT-shaped "
             "sessions of up to 8 turns, 0.5 sessions/s. A token of KV is 819,200 bytes. Hits and computed tokens are "
             "those of the prefill at P: together they are the prompt."]  # fmt: skip
    keep("ladder", "The four designs, by turn", notes, {"by turn": rows})


def mooncake(num: int) -> None:
    """Hit ratio, TTFT and balance of every routing policy."""
    rows: list[dict[str, Any]] = []
    bound = Bound(0.0, 0.0)

    def look(workload: Any) -> Any:
        nonlocal bound
        bound = bound if bound.tokens else infinite(workload)
        return replace(workload, session=sessions(workload))

    for name in (*RULES, *VARIANTS):
        options = VARIANTS.get(name, (f"system.policy={name}",))
        _, record, policy = simulate(["experiment=memserve/mooncake", f"workload.num_requests={num}", *options], look)
        flows, times = policy.flows.values(), numbers(record)
        prompt = sum(flow.prompt for flow in flows)
        blocks = sum(flow.hit // BLOCK for flow in flows) / sum(-(-flow.prompt // BLOCK) for flow in flows)
        rows.append({"policy": name, "hit_ratio": hit_ratio(policy), "of_bound": hit_ratio(policy) / bound.tokens,
                     "block_hit_ratio": blocks, "of_block_bound": blocks / bound.blocks,
                     "false_hit_ratio": sum(max(0, flow.expected - flow.hit) for flow in flows) / prompt,
                     "fetched_ratio": sum(flow.fetched for flow in flows) / prompt,
                     **{key: times[key] for key in ("ttft_s_mean", "ttft_s_p50", "ttft_s_p99")}, **balance(policy),
                     "max_over_mean_minute_p95": hot_minutes(policy, record),
                     "unfinished": int(sum(status != 2 for status in record.requests.status))})  # fmt: skip
        print(rows[-1], flush=True)
    distinct = len({tuple(list(row.values())[1:]) for row in rows})
    notes = [f"Simulated. First {num} requests of the Mooncake conversation trace (8P8D, pd_caching_3, Llama-3.1-70B, "
             f"H100 TP4, 512-token blocks). One cache that forgets nothing hits {bound.tokens:.4f} of the prompt "
             f"tokens (dashed) and {bound.blocks:.4f} of their blocks. {distinct} of {len(rows)} rows are distinct.",
             "The trace has no session ids. `session` goes by ids inferred from it: a prompt whose hash ids continue "
             "those of an earlier one beyond the one block that all prompts share belongs to its session (in this it "
             "is told more than a router could know).",
             "max_over_mean: the busiest prefill instance, by requests, by prompt tokens, and by tokens computed "
             "there; minute_p95: the last by minutes of arrival, their 95th percentile; decodes: the busiest decode "
             "instance, by requests. +guard: `system.guard_s=2`. "
             "False hits: promised by the scheduler's trees and not there. Fetched: brought from another instance (Eq. "
             "2, or Mooncake's rule). The planner's coefficients are those of the experiment's file, not fitted to "
             "this model."]  # fmt: skip
    keep("mooncake", "Routing policies on the Mooncake conversation trace", notes,
         {"policies": rows, "infinite cache": [bound._asdict()]})  # fmt: skip


class Bound(NamedTuple):
    """What one cache that forgets nothing hits, in order of arrival: of the prompt tokens, and of their blocks."""

    tokens: float
    blocks: float


def infinite(workload: Any) -> Bound:
    """In blocks of 512 tokens; the last prompt token is always computed."""
    index, hit, blocks = PrefixIndex(BLOCK), 0, 0
    for content, tokens in zip(workload.content, workload.prompt_tokens.tolist()):
        hit += index.match(content, tokens - 1)
        blocks += -(-tokens // BLOCK)
        lease = index.acquire((), 0)
        index.extend(lease, content, tokens)
        index.release(lease)
    return Bound(hit / int(workload.prompt_tokens.sum()), hit // BLOCK / blocks)


def sessions(workload: Any) -> Any:
    """Session by request, from its names of blocks: that of whoever first had the last of them that is known, unless it
    is the first block, which all share."""
    owner: dict[str, int] = {}
    found = []
    for request_id, content in enumerate(workload.content):
        names = [source for source, _, _ in content]
        known = [name for name in names[1:] if name in owner]
        session = owner[known[-1]] if known else request_id
        for name in names:
            owner.setdefault(name, session)
        found.append(session)
    return np.array(found)


def main() -> int:
    """One of the experiments."""
    job, num = asked({"ladder": (ladder, 400), "mooncake": (mooncake, 12031)}, alone=False)
    job(int(sys.argv[2]) if len(sys.argv) > 2 else num)
    return 0


if __name__ == "__main__":
    exit_with(main)
