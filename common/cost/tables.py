"""Readers of measured operator tables: every format becomes the same few flat arrays, times in ns.

Only fitting and validating come here, so pandas and yaml are imported inside. Formats (found recursively):
aiconfigurator (`gemm_perf`, `context_attention_perf`, `generation_attention_perf`, `nccl_perf`,
`custom_allreduce_perf`, parquet or csv, ms), vllm (in-engine `dense`, `attention`, `per_sequence`, `skew` csv, µs;
`tpN` folders) and vidur (`mlp.csv`, `attention*.csv`, `all_reduce.csv`, `send_recv.csv`, ms).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cost.table import Table, make_table, read_frame
from common.cost.tables_vidur import read_vidur
from common.cost.tables_vllm import read_vllm
from common.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

BFLOAT16_BYTES = 2


def read_tables(folder: Path, kind: str | None = None) -> list[Table]:
    """All tables under `folder`, of one format or of any."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of operator tables")
    readers = {"aiconfigurator": read_aiconfigurator, "vllm": read_vllm, "vidur": read_vidur}
    if kind is not None and kind not in readers:
        raise ConfigError(f"format {kind!r} is unknown; known: {', '.join(readers)}")
    chosen = [readers[kind]] if kind else list(readers.values())
    return [table for reader in chosen for table in reader(folder)]


def _bf16(frame: pd.DataFrame) -> pd.DataFrame:
    for column in ("gemm_dtype", "attn_dtype", "kv_cache_dtype", "allreduce_dtype"):
        if column in frame:
            frame = frame[frame[column].isin(["bfloat16", "float16", "half"])]
    if "nccl_dtype" in frame:
        frame = frame[frame["nccl_dtype"] == "half"]
    if "head_dim" in frame:
        frame = frame[frame["head_dim"] == 128]
    if "window_size" in frame:
        frame = frame[frame["window_size"] == 0]
    return frame


def read_aiconfigurator(folder: Path) -> Iterator[Table]:
    """bf16, head size 128, no sliding window."""
    files = sorted(p for p in folder.rglob("*_perf.*") if p.suffix in (".parquet", ".csv", ".txt"))
    heads = {"heads": "num_heads", "kv_heads": "num_key_value_heads"}
    for path in files:
        kind = path.name.removesuffix(path.suffix).removesuffix("_perf")
        if kind not in ("gemm", "context_attention", "generation_attention", "nccl", "custom_allreduce"):
            continue
        frame = _bf16(read_frame(path))
        if kind == "gemm":
            yield make_table("linear", frame, {"m": "m", "n": "n", "k": "k"}, "latency", 1e6, path)
        elif kind == "context_attention":
            frame = frame[frame["step"] == 0] if "step" in frame else frame
            yield make_table(
                "prefill_attention",
                frame,
                {"batch": "batch_size", "length": "isl", **heads},
                "latency",
                1e6,
                path,
            )
        elif kind == "generation_attention":
            frame = frame.assign(kv=frame["isl"] + frame["step"])
            yield make_table(
                "decode_attention", frame, {"batch": "batch_size", "kv": "kv", **heads}, "latency", 1e6, path
            )
        else:
            yield from _collectives(frame, kind, path)


def _collectives(frame: pd.DataFrame, kind: str, path: Path) -> Iterator[Table]:
    frame = frame[frame["op_name"] == "all_reduce"]
    if "backend" in frame:
        frame = frame[frame["backend"].str.contains("graph")]
    frame = frame.assign(bytes=frame["message_size"] * BFLOAT16_BYTES)
    yield make_table(
        "all_reduce",
        frame,
        {"gpus": "num_gpus", "bytes": "bytes"},
        "latency",
        1e6,
        path,
        kernel="nccl" if kind == "nccl" else "custom",
    )
