"""Operators measured inside vLLM: `dense`, `attention`, `per_sequence` and `skew` csv, times in us."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cost.shapes import element_widths, linear_shapes
from common.cost.specs import ModelSpec, load_model
from common.cost.table import Table, make_table, read_frame

if TYPE_CHECKING:
    import pandas as pd

MODEL_CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


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
        frame = read_frame(path)
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
            yield make_table("attention", frame, columns, "time_us", 1e3, path, **context)
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
            table = make_table(
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
            table = make_table("sampler", group, {"rows": rows}, "time_us", 1e3, path, **context)
        elif name in widths:
            table = make_table(
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
