"""python -m bench.memserve_fig8 [requests]: Fig. 8, times over the rate per instance beside the paper's (simulated).

The rate that a run really reached stands beside the nominal one, and counters say what was busy. Rates beyond the
paper's show what our faster instances do under a load like the paper's. `bench.memserve_shapes` labels the panels.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from bench.harness import exit_with
from bench.memserve import keep, numbers, simulate
from common.record import RunRecord
from systems.memserve.config import ROLES
from systems.memserve.policy import MemServePolicy
from workloads.paths import data_root

SHAPES = {"sharegpt": "ShareGPT", "loogle": "LooGLE", "react": "ReAct"}
RATES = (1, 2, 3, 4, 5)
BEYOND = (10, 20)  # per instance; not the paper's
PAPER = {"jct_s_mean": "JCTavg", "ttft_s_mean": "TTFTavg", "tpot_ms_mean": "TPOTavg",
         "jct_s_p99": "JCTp99", "ttft_s_p99": "TTFTp99", "tpot_ms_p99": "TPOTp99"}  # fmt: skip
SETTINGS = {
    "PD": ("system.design=colocated",),
    "PD-CC": ("system.design=colocated_caching",),
    "1P1D": ("system.design=pd_basic", "system.roles=1P1D"),
    "1P1D-CC": ("system.design=pd_caching_3", "system.roles=1P1D"),
    "1P2D": ("system.design=pd_basic", "system.roles=1P2D", "cluster.num_instances=3"),
    "1P2D-CC": ("system.design=pd_caching_3", "system.roles=1P2D", "cluster.num_instances=3"),
    "2P1D": ("system.design=pd_basic", "system.roles=2P1D", "cluster.num_instances=3"),
    "2P1D-CC": ("system.design=pd_caching_3", "system.roles=2P1D", "cluster.num_instances=3"),
}
BASELINES = {  # the same instances by the systems' own names: what MemServe's machinery costs or gains beside them
    "vllm": ("system=vllm", "engine.prefix_caching=false"),
    "vllm, prefix caching": ("system=vllm", "engine.prefix_caching=true"),
    "pd (1P1D)": ("system=pd", "system.roles=1P1D"),
}


def turns(workload: Any) -> float:
    """Turns of a session in the mean: the geometric law is capped."""
    if not hasattr(workload, "turns_mean"):
        return 1.0
    going_on = 1 - 1 / workload.turns_mean
    return float((1 - going_on**workload.turns_max) * workload.turns_mean)


def point(shape: str, options: tuple[str, ...], rate: float, num: int) -> dict[str, Any]:
    """One run: its numbers, the rate reached and its counters."""
    from common.config import compose

    size = 3 if "cluster.num_instances=3" in options else 4
    base = [f"experiment=memserve/{shape}", *options]
    load = [f"workload.rate={rate * size / turns(compose(base).workload)}", f"workload.num_requests={num}"]
    _, record, policy = simulate([*base, *load])
    return {**numbers(record), **counters(record, policy, size)}


def counters(record: RunRecord, policy: Any, size: int) -> dict[str, Any]:
    """Over the middle half of the arrivals, where the load stands: the rate reached, how busy which role was."""
    requests = record.requests
    arrivals = np.sort(np.array(requests.arrival_ns))
    begin, end = np.quantile(arrivals, (0.25, 0.75))
    record.segments.flush()
    parts = {name: np.array(getattr(record.segments, name), float)
             for name in ("start_ns", "end_ns", "instance", "iterations", "decodes", "prefill_tokens")}  # fmt: skip
    inside = (np.minimum(parts["end_ns"], end) - np.maximum(parts["start_ns"], begin)).clip(0)
    prompts, decodes = parts["prefill_tokens"] > 0, parts["iterations"] * parts["decodes"]
    roles = getattr(policy, "roles", [ROLES["C"]] * size)
    share = {}
    for name, kinds in (("prefill", ("prefill", "both")), ("decode", ("decode", "both"))):
        mine = [instance for instance, role in enumerate(roles) if role in kinds]
        here = np.isin(parts["instance"], mine)
        work = here & prompts if name == "prefill" else here & ~prompts
        share[name] = float(inside[work].sum() / (end - begin) / len(mine))
    plain = ~prompts & (parts["decodes"] > 0)
    moves = record.moves
    wires = [stop - start for start, stop, kind in zip(moves.start_ns, moves.end_ns, moves.kind) if "opy" in kind]
    flows = policy.flows.values() if isinstance(policy, MemServePolicy) else ()
    hits = sum(flow.hit for flow in flows) if flows else sum(requests.cached_tokens)
    pools = [site.pool.counters for site in policy.sites.values()] if flows else []
    return {"reached_rate": float(len(arrivals) / 2 / ((end - begin) / 1e9) / size),
            "prefill_busy": share["prefill"], "decode_busy": share["decode"],
            "decode_batch": float(decodes[plain].sum() / max(1.0, parts["iterations"][plain].sum())),
            "hit_ratio": hits / sum(requests.prompt_tokens), "copies": len(wires),
            "copy_ms_mean": float(np.mean(wires)) / 1e6 if wires else 0.0,
            "evicted": sum(pool["evicted"] for pool in pools), "preemptions": sum(requests.num_preemptions),
            "unfinished": int(sum(status != 2 for status in requests.status))}  # fmt: skip


def curves(num: int) -> list[dict[str, Any]]:
    """Every setting, workload and rate, with the paper's number where it has one."""
    paper = json.loads((data_root() / "memserve_fig8.json").read_text())
    rows: list[dict[str, Any]] = []
    for shape, label in SHAPES.items():
        for setting, options in (SETTINGS | BASELINES).items():
            for rate in (RATES if setting in BASELINES else (*RATES, *BEYOND)):
                many = num if rate <= RATES[-1] else num * rate // 10
                row = {"workload": label, "setting": setting, "rate": rate, **point(shape, options, rate, many)}
                for key, name in PAPER.items():
                    theirs = paper[f"{label} {name}"].get(setting, ()) if rate in RATES else ()
                    scale = 1e3 if key.startswith("tpot") else 1.0  # theirs are seconds
                    row[f"paper_{key}"] = theirs[RATES.index(rate)] * scale if theirs else float("nan")
                rows.append(row)
            print(label, setting, flush=True)
    return rows


def main() -> int:
    """All of it."""
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rows = curves(num)
    head = ("workload", "setting", "rate")
    named = ("reached_rate", *(f"{metric}_{part}" for metric in ("jct_s", "ttft_s", "tpot_ms")
                               for part in ("mean", "p50", "p99")), *(f"paper_{key}" for key in PAPER))  # fmt: skip
    counted = ("reached_rate", "prefill_busy", "decode_busy", "decode_batch", "hit_ratio", "copies",
               "copy_ms_mean", "evicted", "preemptions", "unfinished")  # fmt: skip
    inside = [row for row in rows if row["rate"] in RATES]
    tables = {"points": [{key: row[key] for key in (*head, *named)} for row in inside],
              "counters": [{key: row[key] for key in (*head, *counted)} for row in rows],
              "beyond the paper's rates": [{key: row[key] for key in (*head, *named[:10])} for row in rows
                                           if row["rate"] in BEYOND]}  # fmt: skip
    notes = [f"Simulated, {num} requests a point ({num} x rate / 10 beyond the paper's rates), prefill-first batching, "
             "by_request_agg, prompt_tree_cost; the paper's columns are digitised from its Fig. 8 (about 1%), nan "
             "where it has no such curve (it has no P50 at all). Rates are per instance; 1P2D and 2P1D have 3 "
             "instances, the others 4.",
             "Reached rate: arrivals a second and instance over the middle half of the arrivals; the next turn waits "
             "for the reply and a think time, so a short run reaches less than its nominal rate. The sessions' rate is "
             "the nominal one over the mean turns of a session (capped).",
             "Busy: share of time in iterations with prompts (prefill and colocated instances), or without (decode and "
             "colocated ones), over the same middle half. Decode batch: of an iteration without prompts. Copies: "
             "transfers between instances."]  # fmt: skip
    keep("fig8", "JCT, TTFT and TPOT over the rate per instance", notes, tables)
    return 0


if __name__ == "__main__":
    exit_with(main)
