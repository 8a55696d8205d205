"""Bandwidth and latency of links, each by itself, from NVLink to 1 GbE: where remote attention stops paying."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bench.infinite_llm.runs import SEEDS, SYSTEMS, Row, band, draw, keep, line, measure, only
from common.build import cluster_model
from common.config import compose
from common.driver import drive
from common.executors.network import LinkSpec
from common.executors.sim import SimExecutor
from common.plots.style import PALETTE, new_figure, styled
from common.record import RequestColumns, RunRecord
from systems.registry import make_policy
from workloads.types import plain

BANDWIDTHS = (3e11, 2.5e10, 1.25e9, 1.25e8)
LATENCIES_US = (8, 50, 200)
NAMES = {3e11: "NVLink", 2.5e10: "200 Gbit/s", 1.25e9: "10 GbE", 1.25e8: "1 GbE"}
GIANT = 300_000


def links() -> None:
    """One giant over three instances' memory; and mix 3, beside vllm_multi, which uses no link."""
    lone = [_giant(bandwidth, latency) for bandwidth in BANDWIDTHS for latency in LATENCIES_US]
    rows: list[Row] = []
    for seed in SEEDS:
        common = {"seed": seed}
        rows.append({**common, "bandwidth": 0.0, "latency_us": 0,
                     **measure("links", *SYSTEMS["vllm_multi"], f"seed={seed}")})  # fmt: skip
        for bandwidth in BANDWIDTHS:
            for latency in LATENCIES_US:
                found = measure("links", *_links(bandwidth, latency), f"seed={seed}")
                rows.append({**common, "bandwidth": bandwidth, "latency_us": latency, **found})
    base = only(rows, bandwidth=0.0)
    table = [{"link": "vllm_multi", "GB/s": "", "latency, us": "", **line(base, base)}]
    for bandwidth in BANDWIDTHS:
        for latency in LATENCIES_US:
            mine = only(rows, bandwidth=bandwidth, latency_us=latency)
            table.append({"link": NAMES[bandwidth], "GB/s": bandwidth / 1e9, "latency, us": latency,
                          **line(mine, base)})  # fmt: skip
    notes = ["Llama-2-7B. First: one request of 300K tokens over the memory of three A100s (home included), the "
             "cluster otherwise empty, every link as given. Second: `experiment=infinite_llm/links`, 150 requests on 8 "
             "A100s, every link as given, 3 seeds; median (least..most) over seeds.",
             "Bandwidth of a link is one way; every layer pays two latencies."]  # fmt: skip
    keep("links", "Links from NVLink to 1 GbE", notes, {"one giant": lone, "mix 3": table,
         "runs": rows})  # fmt: skip
    _plot(lone, rows, base)


def _links(bandwidth: float, latency_us: int) -> tuple[str, ...]:
    return (f"hardware.nvlink_bandwidth={bandwidth}", f"hardware.nvlink_latency_ns={latency_us * 1000}",
            f"hardware.nic_bandwidth={bandwidth}", f"hardware.nic_latency_ns={latency_us * 1000}")  # fmt: skip


def _giant(bandwidth: float, latency_us: int) -> Row:
    config = compose(["experiment=infinite_llm/links", "cluster.num_instances=4"])
    link = LinkSpec(bandwidth, latency_us * 1000)
    cluster = replace(cluster_model(config), nvlink=link, nic=link)
    workload = plain("one", np.zeros(1, np.int64), np.array([GIANT]), np.array([64]), 64, "one request")
    record = RunRecord(RequestColumns.empty(1))
    executor = SimExecutor(cluster, workload, record)  # type: ignore[arg-type]
    policy = make_policy("infinite_llm", cluster.info(), config.engine, config.system_options)
    drive(policy, executor, record)
    done = record.requests
    away = GIANT - cluster.instances[0].kv_cells // cluster.num_layers * cluster.block_size
    kv_ms = away * cluster.instances[0].cell_bytes / cluster.block_size * cluster.num_layers / bandwidth * 1e3
    return {"link": NAMES[bandwidth], "GB/s": bandwidth / 1e9, "latency, us": latency_us,
            "ms per token": (done.finish_ns[0] - done.first_token_ns[0]) / 63e6,
            "TTFT, s": (done.first_token_ns[0] - done.arrival_ns[0]) / 1e9,
            "wire time of the KV away from home, ms (ship KV: at least)": kv_ms}  # fmt: skip


def _plot(lone: list[Row], rows: list[Row], base: list[Row]) -> None:
    with styled():
        figure, ((left, right),) = new_figure(1, 2, 9.0, 3.4)
        at = [bandwidth / 1e9 for bandwidth in BANDWIDTHS]
        for index, latency in enumerate(LATENCIES_US):
            mine = [row for row in lone if row["latency, us"] == latency]
            left.plot(at, [row["ms per token"] for row in mine], color=PALETTE[index], marker="o", ms=3,
                      label=f"{latency} us")  # fmt: skip
            groups: list[Any] = [only(rows, bandwidth=at_, latency_us=latency) for at_ in BANDWIDTHS]
            times = [[row["normal_ms"] for row in group] for group in groups]
            band(right, at, times, color=PALETTE[index], label=f"{latency} us")
        wire = [row["wire time of the KV away from home, ms (ship KV: at least)"] for row in lone[:: len(LATENCIES_US)]]
        left.plot(at, wire, color="black", ls="--", lw=1, label="ship KV: wire time alone")
        left.set_yscale("log")
        left.set_ylabel("ms per output token")
        left.set_title("one request of 300K tokens, 4 instances")
        right.axhline(float(np.median([row["normal_ms"] for row in base])), color="grey", lw=0.8)
        right.set_ylabel("latency per output token, ms")
        right.set_title("mix 3, 8 instances; grey: vllm_multi, which refuses giants")
        for axis in (left, right):
            axis.set_xscale("log")
            axis.set_xlabel("link, GB/s one way")
            axis.legend(fontsize=7)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "links")
