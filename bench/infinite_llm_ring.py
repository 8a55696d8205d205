"""python -m bench.infinite_llm_ring: ship queries or ship KV (the `ring` baseline), for one decode of a long context.

One request of Llama-2-13B lies evenly over four instances and is decoded at the first. *Query*: each layer's query goes
to three creditors and `(o, lse)` comes back. *Ring*: each layer's KV comes to the query, shard by shard, the next one
while the last is attended to. Times are simulated, by the executor's own cost model and formula; a second set of curves
has attention at the speed of HBM (`roofline`). Equality of the two results is computed with real tensors. Writes
results/infinite_llm/ring.json, ring.md and a figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from common.build import cluster_model
from common.config import compose
from common.cost.model import InstanceCost
from common.executors.network import LinkSpec
from common.kernels.merge import merge
from common.kernels.plan import Rows
from common.kernels.reference import TorchBackend
from common.plots.style import DASHES, PALETTE, new_figure, save, styled

ROOT = Path(__file__).resolve().parent.parent / "results"
NUM_SHARDS = 4
BASE = ["experiment=infinite_llm/ring"]
CONTEXTS = tuple(1 << power for power in range(10, 22))  # 1K .. 2M tokens
LINKS = {  # bytes/s one way, ns one way; the first two are conf/hardware/a100-80g's
    "NVLink 300 GB/s": LinkSpec(3e11, 8_000),
    "NIC 25 GB/s": LinkSpec(2.5e10, 15_000),
    "10 GbE 1.25 GB/s": LinkSpec(1.25e9, 30_000),
    "1 GbE 0.125 GB/s": LinkSpec(1.25e8, 50_000),
}


class Shape(NamedTuple):
    """What travels, in bytes: a query, a partial result and a token's K and V, each of one layer."""

    query: int
    partial: int
    token: int
    layers: int


def ship_query_ns(attend: int, merge_ns: int, link: LinkSpec, shape: Shape, shards: int) -> int:
    """One layer: max(local partial, round trip + bytes + remote partial) + a merge for each creditor."""
    wire = 2 * link.latency_ns + int((shape.query + shape.partial) * 1e9 / link.bandwidth)
    return max(attend, wire + attend) + (shards - 1) * merge_ns


def ship_kv_ns(attend: int, merge_ns: int, link: LinkSpec, shape: Shape, tokens: int, shards: int) -> int:
    """One layer: shards arrive one after the other, each attended to when it and the kernel before it are there."""
    hop = int(tokens * shape.token * 1e9 / link.bandwidth)
    done = attend
    for shard in range(1, shards):
        done = max(done, link.latency_ns + shard * hop) + attend + merge_ns
    return done


def step_bytes(context: int, shape: Shape, shards: int) -> tuple[int, int]:
    """Over all links in one step: queries and partials; KV."""
    away = context - context // shards
    return shape.layers * (shards - 1) * (shape.query + shape.partial), shape.layers * away * shape.token


def table() -> list[dict[str, Any]]:
    """A row per link, attention model and context."""
    cluster = cluster_model(compose(BASE))
    cost = cast(InstanceCost, cluster.cost(cluster.num_layers, True, True))
    token = cluster.instances[0].cell_bytes // cluster.block_size
    shape = Shape(cluster.query_bytes, cluster.partial_bytes, token, cluster.num_layers)
    rows = []
    for name, link in LINKS.items():
        for context in CONTEXTS:
            tokens = context // NUM_SHARDS
            query_bytes, kv_bytes = step_bytes(context, shape, NUM_SHARDS)
            for attention, attend in (("profile", cost.partial_attention_ns(1, tokens)),
                                      ("roofline", int(tokens * cost.attention.read_ns))):  # fmt: skip
                merge_ns = cost.merge_ns(1)
                query = shape.layers * ship_query_ns(attend, merge_ns, link, shape, NUM_SHARDS)
                kv = shape.layers * ship_kv_ns(attend, merge_ns, link, shape, tokens, NUM_SHARDS)
                rows.append({"link": name, "attention": attention, "context": context, "query_bytes": query_bytes,
                             "kv_bytes": kv_bytes, "query_ms": query / 1e6, "kv_ms": kv / 1e6, "ratio": kv / query,
                             "one_instance_ms": shape.layers * NUM_SHARDS * attend / 1e6})  # fmt: skip
    return rows


def equality(context: int, shards: int, heads: int = 8, kv_heads: int = 2, dim: int = 64, block: int = 16,
             dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 4.0) -> dict[str, Any]:  # fmt: skip
    """Both ways with real tensors: the largest difference of one query's attention, and the bytes that travelled."""
    generator = torch.Generator().manual_seed(seed)
    backend = TorchBackend(block)
    sizes = np.diff(np.linspace(0, context, shards + 1).astype(int))
    q = torch.randn(1, heads, dim, generator=generator).to(dtype)
    stores, partials, query_bytes, kv_bytes = [], [], 0, 0
    for shard, size in enumerate(sizes.tolist()):
        kv = torch.randn(-(-size // block), 2, block, kv_heads, dim, generator=generator) * (spread if shard else 1.0)
        stores.append(kv.to(dtype))
        plan = backend.plan(_rows(context, size, len(kv)), "cpu")
        partials.append(backend.run(plan, q, stores[-1], 0, dim**-0.5))
        if shard:
            o, lse = partials[-1]
            query_bytes += q.nbytes + o.nbytes + lse.nbytes
            kv_bytes += 2 * size * kv_heads * dim * kv.to(dtype).element_size()
    shipped = merge(partials)[0]
    parts = [kv.transpose(0, 1).reshape(2, -1, kv_heads, dim)[:, :size] for kv, size in zip(stores, sizes.tolist())]
    blocks = -(-context // block)
    home = torch.zeros(2, blocks * block, kv_heads, dim, dtype=dtype)
    home[:, :context] = torch.cat(parts, 1)
    cells = home.view(2, blocks, block, kv_heads, dim).transpose(0, 1).contiguous()
    alone = backend.run(backend.plan(_rows(context, context, blocks), "cpu"), q, cells, 0, dim**-0.5)[0]
    return {"context": context, "shards": shards, "dtype": str(dtype).removeprefix("torch."),
            "max_abs_difference": float((shipped - alone).abs().max()), "max_abs": float(alone.abs().max()),
            "query_bytes": query_bytes, "kv_bytes": kv_bytes}  # fmt: skip


def _rows(context: int, size: int, blocks: int) -> Rows:
    """The newest query over a shard of `size` keys that it sees whole."""
    numbers = (np.array([value], np.int32) for value in (0, 1, context, 0, size))
    q_start, q_len, q_pos, kv_start, kv_len = numbers
    return Rows(q_start, q_len, q_pos, kv_start, kv_len, np.arange(max(1, blocks), dtype=np.int32)[None])


def markdown(rows: list[dict[str, Any]], equal: list[dict[str, Any]]) -> str:
    """Both tables."""
    lines = [
        "# Ship queries or ship KV (ring)", "",
        f"Simulated: one decode of Llama-2-13B over {NUM_SHARDS} A100-80GB, KV cut evenly, all 40 layers. `profile`: "
        "attention as in the operator tables; `roofline`: at the bandwidth of HBM. Bytes are per step, over all links.",
        "", "| link | attention | context | query, KB | KV, GB | query, ms | KV, ms | KV / query |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if row["context"] in (1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 19, 1 << 21):
            lines.append(f"| {row['link']} | {row['attention']} | {row['context'] >> 10}K | "
                         f"{row['query_bytes'] / 1e3:.0f} | {row['kv_bytes'] / 1e9:.2f} | {row['query_ms']:.2f} | "
                         f"{row['kv_ms']:.1f} | {row['ratio']:.1f} |")  # fmt: skip
    lines += ["", "Measured with real tensors on a CPU (one layer, one query): both ways give the same attention.", "",
              "| context | shards | type | largest difference | largest value | query bytes, both ways | KV bytes |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in equal:
        lines.append(f"| {row['context']} | {row['shards']} | {row['dtype']} | {row['max_abs_difference']:.1e} | "
                     f"{row['max_abs']:.2f} | {row['query_bytes']} | {row['kv_bytes']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]]) -> None:
    """Time per step, and the ratio, over the context."""
    folder = ROOT / "figures" / "infinite_llm"
    with styled():
        figure, ((left, right),) = new_figure(1, 2, 9.6, 3.6)
        for index, name in enumerate(LINKS):
            mine = [row for row in rows if row["link"] == name and row["attention"] == "profile"]
            floor = [row for row in rows if row["link"] == name and row["attention"] == "roofline"]
            at = [row["context"] / 1024 for row in mine]
            left.plot(at, [row["query_ms"] for row in mine], color=PALETTE[index])
            left.plot(at, [row["kv_ms"] for row in mine], color=PALETTE[index], ls=DASHES[1])
            right.plot(at, [row["ratio"] for row in mine], color=PALETTE[index], label=name)
            right.plot(at, [row["ratio"] for row in floor], color=PALETTE[index], ls=DASHES[2])
        left.set_ylabel("ms per step, all layers")
        left.set_title("solid: queries travel; dashed: KV travels (ring)")
        right.set_ylabel("ring / query")
        right.set_title("solid: measured attention; dotted: at HBM's bandwidth")
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel("context, tokens")
            axis.set_xticks([1, 8, 64, 512, 2048], ["1K", "8K", "64K", "512K", "2M"])
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(LINKS))
        figure.suptitle("Simulated: one decode of Llama-2-13B over 4 A100-80GB", fontsize=9)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        folder.mkdir(parents=True, exist_ok=True)
        save(figure, folder, "ring")


def main() -> None:
    """Tables and figure."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    rows = table()
    equal = [equality(context, shards, dtype=dtype) for dtype in (torch.float32, torch.float64)
             for context, shards in ((1000, 4), (32_768, 4), (131_072, 4), (131_072, 7))]  # fmt: skip
    found, text = {"simulated": rows, "measured": equal}, markdown(rows, equal)
    (ROOT / "infinite_llm" / "ring.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (ROOT / "infinite_llm" / "ring.md").write_text(text, encoding="utf-8")
    draw(rows)
    print(text)


if __name__ == "__main__":
    main()
