"""Vidur's profiles: `mlp.csv`, `attention*.csv`, `all_reduce.csv` and `send_recv.csv`, times in ms.

Its layer times one norm and one residual add by themselves; ours is a norm with the residual add before it, so their
times are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.cost.table import Table, make_table, read_frame


def read_vidur(folder: Path) -> Iterator[Table]:
    """Vidur's per-layer profiles (`mlp.csv`, `attention*.csv`) and its collectives."""
    for path in sorted(folder.rglob("*.csv")):
        if path.name == "mlp.csv":
            yield from _vidur_mlp(path)
        elif path.name.startswith("attention") and path.name != "attention.csv":
            yield from _vidur_attention(path)
        elif path.name in ("all_reduce.csv", "send_recv.csv"):
            yield from _vidur_network(path)


def _vidur_mlp(path: Path) -> Iterator[Table]:
    frame = read_frame(path)
    first = frame.iloc[0]
    heads, kv, hidden, mlp = (int(first[c]) for c in ("n_head", "n_kv_head", "n_embd", "n_expanded_embd"))
    head, profile = hidden // heads, path.parent.name
    norms = ("input_layernorm", "post_attention_layernorm", "add")
    if all(f"time_stats.{name}.median" in frame for name in norms):
        first_norm, second_norm, add = (frame[f"time_stats.{name}.median"] for name in norms)
        frame = frame.assign(norm=(first_norm + second_norm) / 2 + add)
    for tp, group in frame.groupby("num_tensor_parallel_workers", sort=True):
        t = int(str(tp))
        qkv = (heads + 2 * max(kv, t)) * head // t
        shapes = {
            "attn_pre_proj": (qkv, hidden),
            "attn_post_proj": (hidden, hidden // t),
            "mlp_up_proj": (2 * mlp // t, hidden),
            "mlp_down_proj": (hidden, mlp // t),
        }
        for name, (n, k) in shapes.items():
            column = f"time_stats.{name}.median"
            if column in group:
                yield make_table(
                    "linear",
                    group.assign(n=n, k=k),
                    {"m": "num_tokens", "n": "n", "k": "k"},
                    column,
                    1e6,
                    path,
                    layer=name,
                    tp=t,
                    profile=profile,
                )
        widths = {
            "layernorm": ("norm", hidden),
            "final_layernorm": ("norm", hidden),
            "embedding": ("time_stats.emb.median", hidden),
            "act_fn": ("time_stats.mlp_act.median", mlp // t),
            "rotary_emb": ("time_stats.attn_rope.median", heads * head // t + max(1, kv // t) * head),
        }
        for name, (column, width) in widths.items():
            if column in group:
                yield make_table(
                    "elementwise",
                    group,
                    {"tokens": "num_tokens"},
                    column,
                    1e6,
                    path,
                    layer=name,
                    width=width,
                    tp=t,
                    profile=profile,
                )


def _vidur_attention(path: Path) -> Iterator[Table]:
    frame = read_frame(path)
    for keys, group in frame.groupby(["n_q_head", "n_kv_head", "num_tensor_parallel_workers"], sort=True):
        heads, kv, tp = (int(str(x)) for x in keys)
        group = group.assign(heads=heads // tp, kv_heads=max(1, kv // tp))
        shape = {"heads": "heads", "kv_heads": "kv_heads"}
        prefill = group[group["is_prefill"].astype(str).str.lower() == "true"]
        yield make_table(
            "chunk_attention",
            prefill,
            {"batch": "batch_size", "chunk": "prefill_chunk_size", "kv_prefill": "kv_cache_size", **shape},
            "time_stats.attn_prefill.median",
            1e6,
            path,
            tp=tp,
        )
        decode = group[group["is_prefill"].astype(str).str.lower() == "false"]
        decode = decode.assign(kv=decode["kv_cache_size"].clip(lower=1))
        yield make_table(
            "decode_attention",
            decode,
            {"batch": "batch_size", "kv": "kv", **shape},
            "time_stats.attn_decode.median",
            1e6,
            path,
            tp=tp,
        )


def _vidur_network(path: Path) -> Iterator[Table]:
    """Within a node only: between nodes a copy crosses a NIC that the tables do not name."""
    family = path.stem
    frame = read_frame(path)
    if "prediction" in frame:  # a cost table that Vidur has made, of the same name: nothing in it was measured
        return
    if "devices_per_node" in frame:
        frame = frame[frame["devices_per_node"] == frame["num_workers"]]
    columns = {"gpus": "num_workers", "bytes": "size"}
    yield make_table(family, frame, columns, f"time_stats.{family}.median", 1e6, path, kernel="nccl")
