"""What the MemServe experiments share: one simulated run with its policy's counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import latencies, write_report
from common.config import RunConfig, compose
from common.driver import drive
from common.record import RequestColumns, RunRecord
from systems.memserve.policy import MemServePolicy
from systems.registry import make_policy
from workloads.build import build

RESULTS = Path(__file__).resolve().parent.parent / "results" / "memserve"


def simulate(overrides: Sequence[str], change: Callable[[Any], Any] | None = None) -> tuple[RunConfig, RunRecord, Any]:
    """Run one configuration in this process; (config, record, policy). `change` may replace the workload."""
    from run import make_executor, served

    config = compose(overrides)
    workload = served(build(config.workload, config.seed), config.engine.max_model_len)
    if change is not None:
        workload = change(workload)
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    executor = make_executor(config, workload, record)
    policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
    drive(policy, executor, record)
    return config, record, policy


def numbers(record: RunRecord) -> dict[str, float]:
    """Mean, P50 and P99 of JCT, TTFT (s) and TPOT (ms)."""
    times = latencies(record)
    found: dict[str, float] = {}
    for name, values in (("jct_s", times.e2e / 1e3), ("ttft_s", times.ttft / 1e3), ("tpot_ms", times.tpot)):
        found[f"{name}_mean"] = float(np.mean(values))
        found[f"{name}_p50"] = float(np.percentile(values, 50))
        found[f"{name}_p99"] = float(np.percentile(values, 99))
    return found


def hit_ratio(policy: Any) -> float:
    """Prompt tokens that prefills read from a cache, of all."""
    assert isinstance(policy, MemServePolicy)
    flows = policy.flows.values()
    return float(sum(flow.hit for flow in flows) / max(1, sum(flow.prompt for flow in flows)))


def balance(policy: Any) -> dict[str, float]:
    """The busiest prefill instance over the mean: by requests sent there, by their prompt tokens, and by the tokens
    that it had to compute (each request counts where it was prefilled last). `decodes`: requests at the busiest decode
    instance, if there are several."""
    prefill = [instance for instance, role in enumerate(policy.gs.roles) if role != "decode"]
    places = {instance: place for place, instance in enumerate(prefill)}
    found = np.zeros((len(places), 2))
    for flow in policy.flows.values():
        if flow.prefill_at in places:
            found[places[flow.prefill_at]] += flow.prompt, flow.prompt - flow.hit
    sent = np.array([policy.gs.dispatched.get(instance, 0) for instance in places])
    decoding = [instance for instance, role in enumerate(policy.gs.roles) if role != "prefill"]
    decoded = np.array([sum(flow.decode_at == instance for flow in policy.flows.values()) for instance in decoding])
    loads = {"requests": sent, "tokens": found[:, 0], "computed": found[:, 1]}
    if len(decoding) > 1:
        loads["decodes"] = decoded
    return {f"max_over_mean_{name}": float(load.max() / max(1e-9, load.mean())) for name, load in loads.items()}


def hot_minutes(policy: Any, record: RunRecord) -> float:
    """Of the minutes of arrival the 95th percentile of: tokens to be computed at the busiest prefill instance over the
    mean. (Whole runs average hot spots away.)"""
    prefill = [instance for instance, role in enumerate(policy.gs.roles) if role != "decode"]
    arrivals = record.requests.arrival_ns
    found = np.zeros((max(arrivals) // 60_000_000_000 + 1, len(policy.gs.roles)))
    for request_id, flow in policy.flows.items():
        if flow.prefill_at >= 0:
            found[arrivals[request_id] // 60_000_000_000, flow.prefill_at] += flow.prompt - flow.hit
    load = found[:, prefill]
    busy = load[load.sum(1) > 0]
    return float(np.percentile(busy.max(1) / busy.mean(1), 95))


def keep(name: str, title: str, notes: list[str], tables: dict[str, list[dict[str, Any]]]) -> None:
    """Table and figure of an experiment, committed both."""
    from bench.memserve_figures import draw

    write_report(name, title, notes, tables, RESULTS)
    draw(name)
