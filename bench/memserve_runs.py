"""python -m bench.memserve_runs ladder|mooncake [requests]: MemServe's simulated experiments.

ladder: the designs against each other, by turn of a session. mooncake: the routing policies on the production trace,
against an infinite cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.harness import asked, exit_with
from bench.memserve import balance, hit_ratio, keep, numbers, simulate
from common.plots.style import new_figure

LADDER = ("pd_basic", "pd_caching_1", "pd_caching_2", "pd_caching_3")
RULES = ("round_robin", "least_load", "session", "prompt_tree_longest", "prompt_tree_cost", "mooncake", "sglang_router")


def ladder(num: int) -> None:
    """P hits, recomputed prompt tokens and bytes each way, by turn."""
    rows: list[dict[str, Any]] = []
    figure, axes = new_figure(1, 4, 13.0, 3.4)
    axes = axes[0]
    names = ("P hit tokens", "P computed tokens", "P→D tokens", "D→P tokens")
    for design in LADDER:
        more = ("workload.turns_mean=50", "workload.turns_max=8", "workload.rate=0.5", f"workload.num_requests={num}")
        _, _, policy = simulate(["experiment=memserve/sharegpt", f"system.design={design}", *more])
        turn: dict[int, int] = {}
        found: dict[int, list[tuple[int, ...]]] = {}
        for _, flow in sorted(policy.flows.items()):
            turn[flow.session] = index = turn.get(flow.session, 0) + 1
            row = (flow.hit, flow.prompt - flow.hit, flow.sent_tokens, flow.back_tokens)
            found.setdefault(index, []).append(row)
        means = {index: np.mean(found[index], 0) for index in sorted(found)}
        for index, mean in means.items():
            rows.append({"design": design, "turn": index, "requests": len(found[index]),
                         **{name: float(value) for name, value in zip(names, mean)}})  # fmt: skip
        for place, axis in enumerate(axes):
            values = [mean[place] for mean in means.values()]
            width = 5 - 1.3 * LADDER.index(design)  # lines that lie on each other stay visible
            axis.plot(list(means), values, lw=width, label=design)
    for axis, name in zip(axes, names):
        axis.set_xlabel("turn of the session")
        axis.set_title(f"{name} (simulated)", fontsize=9)
    axes[0].legend(fontsize=7)
    notes = ["Simulated. Means per request, by turn; 4 instances (2P2D) of Llama-2-13B on H800, TP2; ShareGPT-shaped "
             "sessions of up to 8 turns, 0.5 sessions/s. A token of KV is 819,200 bytes."]  # fmt: skip
    keep("ladder", "The four designs, by turn", notes, {"by turn": rows}, figure)


def mooncake(num: int) -> None:
    """Hit ratio, TTFT and balance of every routing policy."""
    rows: list[dict[str, Any]] = []
    bound = 0.0
    for name in (*RULES, "prompt_tree_longest+guard", "prompt_tree_cost+guard"):
        rule, _, guard = name.partition("+")
        options = [f"system.policy={rule}", f"workload.num_requests={num}"]
        options += ["system.guard_s=2.0"] if guard else []
        seen: list[float] = []
        _, record, policy = simulate(["experiment=memserve/mooncake", *options], _looked_at(seen))
        bound, found = seen[0], numbers(record)
        flows = policy.flows.values()
        false = sum(max(0, flow.expected - flow.hit) for flow in flows) / sum(flow.prompt for flow in flows)
        rows.append({"policy": name, "hit_ratio": hit_ratio(policy), "of_bound": hit_ratio(policy) / bound,
                     "ttft_s_mean": found["ttft_s_mean"], "ttft_s_p50": found["ttft_s_p50"],
                     "ttft_s_p99": found["ttft_s_p99"], "max_over_mean_load": balance(policy),
                     "false_hit_ratio": false,
                     "unfinished": int(sum(s != 2 for s in record.requests.status))})  # fmt: skip
        print(rows[-1], flush=True)
    figure, axes = new_figure(1, 3, 12.0, 3.4)
    axes = axes[0]
    labels = [row["policy"] for row in rows]
    keys = (("hit_ratio", "token hit ratio"), ("ttft_s_p99", "P99 TTFT (s)"), ("max_over_mean_load", "max/mean load"))
    for axis, (key, title) in zip(axes, keys):
        axis.barh(labels, [row[key] for row in rows])
        axis.set_title(title)
        axis.invert_yaxis()
    axes[0].axvline(bound, color="black", ls="--", lw=1)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    notes = [f"Simulated. First {num} requests of the Mooncake conversation trace (8P8D, pd_caching_3, Llama-3.1-70B, "
             f"H100 TP4, 512-token blocks); an infinite shared cache hits {bound:.4f} of the prompt tokens (dashed). "
             "The trace has no session ids: `session` is least_load here. Load: prefills sent to an instance. The "
             "planner's coefficients are those of the experiment's file, not fitted to this model."]  # fmt: skip
    keep("mooncake", "Routing policies on the Mooncake conversation trace", notes, {"policies": rows}, figure)


def _looked_at(seen: list[float]) -> Callable[[Any], Any]:
    def look(workload: Any) -> Any:
        seen.append(_infinite(workload))
        return workload

    return look


def _infinite(workload: Any) -> float:
    """Token hit ratio of one cache that forgets nothing, in 512-token blocks, in order of arrival."""
    from common.kv.index import PrefixIndex

    index, hit = PrefixIndex(512), 0
    for content, tokens in zip(workload.content, workload.prompt_tokens.tolist()):
        hit += index.match(content, tokens - 1)
        lease = index.acquire((), 0)
        index.extend(lease, content, tokens)
        index.release(lease)
    return hit / int(workload.prompt_tokens.sum())


def main() -> int:
    """One of the experiments."""
    job, num = asked({"ladder": (ladder, 400), "mooncake": (mooncake, 12031)}, alone=False)
    job(int(sys.argv[2]) if len(sys.argv) > 2 else num)
    return 0


if __name__ == "__main__":
    exit_with(main)
