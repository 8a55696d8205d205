"""Readers of measured operator tables: every format becomes the same few flat arrays, times in ns.

Only fitting and validating come here, so pandas and yaml are imported inside. Formats (found recursively):
aiconfigurator (`gemm_perf`, `context_attention_perf`, `generation_attention_perf`, `nccl_perf`,
`custom_allreduce_perf`, parquet or csv, ms), vllm (in-engine `dense`, `attention`, `per_sequence`, `skew` csv, µs;
`tpN` folders) and vidur (`mlp.csv`, `attention*.csv`, `all_reduce.csv`, `send_recv.csv`, ms).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.cost.shapes import element_widths, linear_shapes
from common.cost.specs import ModelSpec, load_model
from common.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
BFLOAT16_BYTES = 2
MODEL_CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


@dataclass(frozen=True, slots=True)
class Table:
    """Measured points of one operator family. `keys` columns are integers; `context` labels a source (file, tp)."""

    family: str
    columns: tuple[str, ...]
    keys: npt.NDArray[np.int64]  # (rows, columns)
    time_ns: Array
    context: tuple[tuple[str, object], ...] = ()

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """One key column."""
        return self.keys[:, self.columns.index(name)]

    def get(self, name: str, default: Any = None) -> Any:
        """One label of the source."""
        return dict(self.context).get(name, default)

    def take(self, mask: npt.NDArray[np.bool_]) -> Table:
        """The rows where `mask` holds."""
        return Table(self.family, self.columns, self.keys[mask], self.time_ns[mask], self.context)


def read_tables(folder: Path, kind: str | None = None) -> list[Table]:
    """All tables under `folder`, of one format or of any."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder of operator tables")
    readers = {"aiconfigurator": read_aiconfigurator, "vllm": read_vllm, "vidur": read_vidur}
    if kind is not None and kind not in readers:
        raise ConfigError(f"format {kind!r} is unknown; known: {', '.join(readers)}")
    chosen = [readers[kind]] if kind else list(readers.values())
    return [table for reader in chosen for table in reader(folder)]


def _frame(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read as a table ({error})") from None


def _table(
    family: str,
    frame: pd.DataFrame,
    columns: dict[str, str],
    time: str,
    scale: float,
    source: Path,
    **context: object,
) -> Table:
    """Median time per distinct key of `columns` (our name -> theirs)."""
    missing = [theirs for theirs in [*columns.values(), time] if theirs not in frame]
    if missing:
        raise ConfigError(f"{source}: column {missing[0]!r} is missing")
    frame = frame[[*columns.values(), time]].dropna()
    median = frame.groupby(list(columns.values()), sort=True)[time].median().reset_index()
    keys = np.stack([median[theirs].to_numpy(dtype=np.int64) for theirs in columns.values()], axis=1)
    labels = tuple({"source": str(source), **context}.items())
    return Table(family, tuple(columns), keys, median[time].to_numpy(dtype=np.float64) * scale, labels)


# -- aiconfigurator ----------------------------------------------------------------------------------------------


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
        frame = _bf16(_frame(path))
        if kind == "gemm":
            yield _table("linear", frame, {"m": "m", "n": "n", "k": "k"}, "latency", 1e6, path)
        elif kind == "context_attention":
            frame = frame[frame["step"] == 0] if "step" in frame else frame
            yield _table(
                "prefill_attention",
                frame,
                {"batch": "batch_size", "length": "isl", **heads},
                "latency",
                1e6,
                path,
            )
        elif kind == "generation_attention":
            frame = frame.assign(kv=frame["isl"] + frame["step"])
            yield _table("decode_attention", frame, {"batch": "batch_size", "kv": "kv", **heads}, "latency", 1e6, path)
        else:
            yield from _collectives(frame, kind, path)


def _collectives(frame: pd.DataFrame, kind: str, path: Path) -> Iterator[Table]:
    frame = frame[frame["op_name"] == "all_reduce"]
    if "backend" in frame:
        frame = frame[frame["backend"].str.contains("graph")]
    frame = frame.assign(bytes=frame["message_size"] * BFLOAT16_BYTES)
    yield _table(
        "all_reduce",
        frame,
        {"gpus": "num_gpus", "bytes": "bytes"},
        "latency",
        1e6,
        path,
        kernel="nccl" if kind == "nccl" else "custom",
    )


# -- vLLM in-engine ------------------------------------------------------------------------------------------------


def known_models() -> dict[str, ModelSpec]:
    """The models of conf/model by lower-case name, to resolve the folders of in-engine tables."""
    import yaml

    specs = [load_model(yaml.safe_load(path.read_text())) for path in sorted(MODEL_CONF.glob("*.yaml"))]
    return {spec.name.lower(): spec for spec in specs}


def _model_of(path: Path, models: dict[str, ModelSpec]) -> tuple[ModelSpec, int] | None:
    tp = 1
    for part in reversed(path.parent.parts):
        lower = part.lower()
        if lower.startswith("tp") and lower[2:].isdigit():
            tp = int(lower[2:])
            continue
        for name, spec in models.items():
            if lower == name or lower.removesuffix("-instruct") == name:
                return spec, tp
    return None


def read_vllm(folder: Path) -> Iterator[Table]:
    """The in-engine tables; a folder must carry the name of a model in conf/model."""
    models = known_models()
    for path in sorted(folder.rglob("*.csv")):
        if path.name not in ("dense.csv", "attention.csv", "per_sequence.csv"):
            continue
        frame = _frame(path)
        if "time_us" not in frame:
            continue
        found = _model_of(path, models)
        if found is None:
            print(f"{path}: skipped, no model of conf/model is named in its path", file=sys.stderr)
            continue
        model, tp = found
        context = {"model": model, "tp": tp}
        if path.name == "attention.csv":
            columns = {
                "chunk": "prefill_chunk",
                "kv_prefill": "kv_prefill",
                "decodes": "n_decode",
                "kv_decode": "kv_decode",
            }
            yield _table("attention", frame, columns, "time_us", 1e3, path, **context)
        else:
            rows = "tokens" if path.name == "dense.csv" else "sequences"
            yield from _layers(frame, rows, path, context)


def _layers(frame: pd.DataFrame, rows: str, path: Path, context: dict[str, Any]) -> Iterator[Table]:
    shapes = linear_shapes(context["model"], context["tp"])
    widths = element_widths(context["model"], context["tp"])
    for layer, group in frame.groupby("layer", sort=True):
        name = str(layer)
        if name in shapes:
            n, k = shapes[name]
            table = _table(
                "linear",
                group.assign(n=n, k=k),
                {"m": rows, "n": "n", "k": "k"},
                "time_us",
                1e3,
                path,
                layer=name,
                **context,
            )
        elif name == "sampler":
            table = _table("sampler", group, {"rows": rows}, "time_us", 1e3, path, **context)
        elif name in widths:
            table = _table(
                "elementwise",
                group,
                {"tokens": rows},
                "time_us",
                1e3,
                path,
                layer=name,
                width=widths[name],
                **context,
            )
        else:
            print(f"{path}: layer {name!r} skipped", file=sys.stderr)
            continue
        yield table


def read_skew(path: Path) -> pd.DataFrame:
    """Uneven decode lengths: `t_mean_us`, `t_max_us`, `t_skew_us` per point."""
    return _frame(path)


# -- Vidur -----------------------------------------------------------------------------------------------------------


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
    frame = _frame(path)
    first = frame.iloc[0]
    heads, kv, hidden, mlp = (int(first[c]) for c in ("n_head", "n_kv_head", "n_embd", "n_expanded_embd"))
    head = hidden // heads
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
                yield _table(
                    "linear",
                    group.assign(n=n, k=k),
                    {"m": "num_tokens", "n": "n", "k": "k"},
                    column,
                    1e6,
                    path,
                    layer=name,
                    tp=t,
                )


def _vidur_attention(path: Path) -> Iterator[Table]:
    frame = _frame(path)
    for keys, group in frame.groupby(["n_q_head", "n_kv_head", "num_tensor_parallel_workers"], sort=True):
        heads, kv, tp = (int(str(x)) for x in keys)
        group = group.assign(heads=heads // tp, kv_heads=max(1, kv // tp))
        shape = {"heads": "heads", "kv_heads": "kv_heads"}
        prefill = group[group["is_prefill"].astype(str).str.lower() == "true"]
        yield _table(
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
        yield _table(
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
    frame = _frame(path)
    if "devices_per_node" in frame:
        frame = frame[frame["devices_per_node"] == frame["num_workers"]]
    columns = {"gpus": "num_workers", "bytes": "size"}
    yield _table(family, frame, columns, f"time_stats.{family}.median", 1e6, path, kernel="nccl")
