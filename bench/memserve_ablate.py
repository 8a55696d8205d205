"""python -m bench.memserve_ablate parts|share|failures: what the paper leaves out (simulated).

parts: capacity, order of eviction, swap, both TTLs and so the staleness of the scheduler's trees, one at a time, on
ShareGPT-shaped sessions. share: routing policies over how often each document is asked about, in single questions
or in sessions (LooGLE-shaped, 3P1D; compare Fig. 15). failures: instances and messages lost in mid-run.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from bench.harness import asked, exit_with
from bench.memserve import balance, hit_ratio, keep, numbers, simulate
from systems.memserve.config import POLICIES as RULES

BASE = ("experiment=memserve/ablation",)
PARTS = {
    "base": (),
    "capacity 600 blocks": ("engine.kv_blocks=600",),
    "capacity 2400 blocks": ("engine.kv_blocks=2400",),
    "capacity 4800 blocks": ("engine.kv_blocks=4800",),
    "evict FIFO": ("system.eviction=fifo",),
    "evict LFU": ("system.eviction=lfu",),
    "evict largest leaf": ("system.eviction=largest",),
    "no swap": ("system.swap=false",),
    "no swap, evict FIFO": ("system.swap=false", "system.eviction=fifo"),
    "no swap, evict LFU": ("system.swap=false", "system.eviction=lfu"),
    "no swap, evict largest leaf": ("system.swap=false", "system.eviction=largest"),
    "early swap (half free)": ("system.swap_low=0.5", "system.swap_high=0.6"),
    "local TTL 2 s": ("system.local_ttl_s=2",),
    "local TTL 10 s": ("system.local_ttl_s=10",),
    "local TTL 30 s": ("system.local_ttl_s=30",),
    "local TTL 2 s, trees too": ("system.local_ttl_s=2", "system.tree_ttl_s=2"),
    "tree TTL 2 s": ("system.tree_ttl_s=2",),
    "tree TTL 10 s": ("system.tree_ttl_s=10",),
    "no fetch (Eq. 2)": ("system.fetch=false",),
}
DEGREES = (1, 2, 3, 5)
LOADED = ("workload.rate=40", "workload.think_mean_s=0.1")
LOSSY = "cluster.message_faults={{delay_ms:5,loss:{},duplicate:0.1}}"
FAILURES = {
    "none": (),
    "a P lost": ("cluster.lost=[[30,0]]",),
    "a P lost, started anew": ("cluster.lost=[[30,0]]", "system.restart=true"),
    "a D lost": ("cluster.lost=[[30,2]]",),
    "a D lost, started anew": ("cluster.lost=[[30,2]]", "system.restart=true"),
    "both P lost": ("cluster.lost=[[30,0],[30,1]]",),
    "both P lost, started anew": ("cluster.lost=[[30,0],[30,1]]", "system.restart=true"),
    "both D lost": ("cluster.lost=[[30,2],[30,3]]",),
    "all lost": ("cluster.lost=[[30,0],[30,1],[30,2],[30,3]]",),
    "10% of messages lost": (LOSSY.format(0.1),),
    "50% of messages lost": (LOSSY.format(0.5),),
    "10% lost, never said again": (LOSSY.format(0.1), "system.heartbeat_s=0"),
    "50% lost, never said again": (LOSSY.format(0.5), "system.heartbeat_s=0"),
}


def measured(overrides: list[str]) -> dict[str, Any]:
    """Hits, false hits, evictions and times of one run."""
    _, record, policy = simulate(overrides)
    found, flows = numbers(record), policy.flows.values()
    prompt = sum(flow.prompt for flow in flows)
    pools = [site.pool.counters for site in policy.sites.values()]
    sums = {key: sum(pool[key] for pool in pools) for key in ("evicted", "expired", "swapped_out", "swapped_in")}
    return {"hit_ratio": hit_ratio(policy), "false_hit_ratio": sum(max(0, f.expected - f.hit) for f in flows) / prompt,
            "fetched_ratio": sum(flow.fetched for flow in flows) / prompt, **sums,
            "ttft_s_mean": found["ttft_s_mean"], "ttft_s_p50": found["ttft_s_p50"], "ttft_s_p99": found["ttft_s_p99"],
            "jct_s_mean": found["jct_s_mean"], **balance(policy),
            "unfinished": int(sum(status != 2 for status in record.requests.status))}  # fmt: skip


def parts() -> None:
    """One change at a time."""
    rows = [{"variant": name, **measured([*BASE, *more])} for name, more in PARTS.items()]
    notes = ["Simulated, one seed, 400 requests at 2 sessions/s, 2P2D of Llama-2-13B (H800, TP2), pd_caching_3, "
             "prompt_tree_cost; base: 1,200 blocks of HBM an instance so that there is pressure. Evicted, expired, "
             "swapped: blocks, all instances. A false hit is what the scheduler's tree promised and P had not. Base: "
             "LRU by leaf, swap below 10% free, no local TTL, trees forget after 120 s. Eviction picks leaves, and so "
             "does swapping out, in the same order. max_over_mean: of P; decodes: of D, by requests."]  # fmt: skip
    keep("ablation", "Capacity, eviction, TTL, swap and staleness", notes, {"one at a time": rows})


def failures() -> None:
    """Whoever is lost, and whatever is not heard: what becomes of the requests."""
    rows: list[dict[str, Any]] = []
    for name, more in FAILURES.items():
        _, record, policy = simulate(["experiment=memserve/failures", *more])
        status, found = record.requests.status, numbers(record)
        left = {request_id for instance in policy.gs.members
                for book in (policy.gs.queue[instance], policy.gs.decodes[instance]) for request_id in book}
        marks = [kind for _, _, kind, _ in record.marks]
        rows.append({
            "variant": name, "finished": sum(one == 2 for one in status), "refused": sum(one == 3 for one in status),
            "declared_dead": policy.members.cm.declared, "makeshift": marks.count("makeshift"),
            "said_again": sum(site.outbox.num_again for site in policy.sites.values()), "load_left": len(left),
            "hit_ratio": hit_ratio(policy), **{key: found[key] for key in ("ttft_s_mean", "ttft_s_p50", "ttft_s_p99",
                                                                           "jct_s_mean", "jct_s_p99")},
            "max_over_mean_requests": balance(policy)["max_over_mean_requests"],
        })  # fmt: skip
    notes = ["Simulated, one seed, 400 requests at 2 sessions/s, 2P2D of Llama-2-13B (H800, TP2), pd_caching_3, "
             "prompt_tree_cost; instances are lost at 30 s, heartbeats are sent every second, three of silence are a "
             "death. Lost messages: of all kinds, each copy 5 ms late in the mean, 10% doubled. `never said again`: "
             "`system.heartbeat_s=0`, which also leaves out the cluster manager (nothing dies there).",
             "Times are of the requests that finished. Refused: nobody was left. Makeshift: changes of who does what "
             "for want of a role. Load left: requests in the scheduler's tables when the run ends; none of them "
             "lives. max_over_mean: prefills at the busiest P."]  # fmt: skip
    keep("failures", "Instances and messages lost", notes, {"failures": rows})


def share() -> None:
    """The more questions a document has, or the more sessions talk about it, the more there is to route by."""
    tables: dict[str, list[dict[str, Any]]] = {}
    cases = (("single questions", "share", "workload.num_documents", 240, ()),
             ("sessions", "share_sessions", "workload.system_prompts", 80, ()),
             ("sessions, loaded", "share_sessions", "workload.system_prompts", 80, LOADED))  # fmt: skip
    for case, name, knob, many, more in cases:
        rows: list[dict[str, Any]] = []
        for rule, degree in product(RULES, DEGREES):
            load = [f"experiment=memserve/{name}", f"system.policy={rule}", f"{knob}={many // degree}", *more]
            rows.append({"policy": rule, "share_degree": degree, **measured(load)})
        tables[case] = rows
    notes = ["Simulated, one seed, 3P1D of Llama-2-13B (H800, TP2), pd_caching_3. Single questions: 240 requests at "
             "12/s, every document is asked about so many times; without sessions `session` is least_load. Sessions: "
             "250 requests in some 80 sessions of up to 5 questions, so many of them about a document in the mean "
             "(near the paper's Fig. 15, whose sessions are verbatim copies); loaded: they come ten times as fast and "
             "think a tenth as long.",
             "max_over_mean: the busiest prefill instance, by requests, by prompt tokens, and by tokens computed "
             "there."]  # fmt: skip
    keep("share", "Routing policies over the share degree", notes, tables)


def main() -> int:
    """One of the experiments."""
    asked({"parts": parts, "share": share, "failures": failures})()
    return 0


if __name__ == "__main__":
    exit_with(main)
