"""The held-out error of the cost model: `python -m common.cost.holdout [--data DIR] [--out DIR]`.

Each card is fitted again without a fifth of its shapes (never of its rows: every time of a shape is on one side) and
asked for them. Linear layers hold out whole (n, k) shapes; attention holds out (batch, length, heads) shapes, and in
a second pass whole head configurations. Two model/card pairs are in no committed grid at all: Llama-2-7B and -70B on
A100, measured by another tool. Two in-engine pairs are reported from refits without them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.cost.fit import data_folder, fit_tables, merge_all_reduce, read_source
from common.cost.operators import Operators
from common.cost.predict import Comparison, compare, summarise
from common.cost.sources import SOURCES, Source
from common.cost.table import Table
from common.cost.tables import read_tables
from common.cost.validate import hardware_named
from common.errors import KVPlaneError

CARDS = {
    "a100_sxm": "a100-80g",
    "a100_2024": "a100-80g-2024",
    "h100_sxm": "h100-80g",
    "l40s": "l40s",
    "rtx4090": "rtx4090",
    "rtxpro6000": "rtxpro6000",
}
SHAPE = {"linear": ("n", "k")}  # every other family: a row is a shape
SHARE = 0.2
Mask = npt.NDArray[np.bool_]
Row = dict[str, Any]


def held_out(table: Table, columns: Sequence[str], seed: int = 0) -> Mask:
    """Rows whose shape is in the test split: a fixed random fifth of the distinct shapes."""
    keys = table.keys[:, [table.columns.index(name) for name in columns]]
    shapes, which = np.unique(keys, axis=0, return_inverse=True)
    chosen = np.random.default_rng([seed, len(shapes)]).permutation(len(shapes)) < SHARE * len(shapes)
    mask: Mask = chosen[which.reshape(-1)]
    return mask


def newest(tables: Sequence[Table]) -> list[Table]:
    """Of several versions of a kernel table only the last; collectives merged: one time per shape."""
    last: dict[tuple[object, ...], Table] = {}
    for t in merge_all_reduce(tables):
        model = t.get("model")
        of = model.name if model else t.get("profile")
        last[t.family, t.get("layer"), t.get("tp"), of, t.get("kernel")] = t
    return list(last.values())


def split_points(tables: Sequence[Table]) -> tuple[list[Table], list[Table]]:
    """Train and test tables, split by shape within each table; linear layers of models are left to `leave_out`."""
    train, test = [], []
    for t in tables:
        if t.family == "linear" and t.get("layer") is not None:
            train.append(t)
            continue
        mask = held_out(t, SHAPE.get(t.family, t.columns))
        if t.family == "attention":  # parts alone anchor a mixed batch: hold out each family by itself
            mask &= ~((t.column("chunk") == 0) & (t.column("decodes") == 0))
        train.append(t.take(~mask))
        test.append(t.take(mask))
    return train, test


def split_heads(tables: Sequence[Table]) -> tuple[list[Table], list[Table]]:
    """Hold out whole head configurations of kernel attention tables."""
    train: list[Table] = []
    test: list[Table] = []
    for t in tables:
        if "heads" not in t.columns or len(np.unique(t.column("heads"))) == 1:
            train.append(t)
            continue
        mask = held_out(t, ("heads", "kv_heads"), seed=1)
        train.append(t.take(~mask))
        test.append(t.take(mask))
    return train, test


def refit(source: Source, train: Sequence[Table], test: Sequence[Table]) -> list[Comparison]:
    """Fit on `train`, compare on `test`."""
    operators = Operators(hardware_named(CARDS[source.name]), fit_tables(source, train))
    return compare(operators, test)


def leave_one_layer_out(source: Source, tables: Sequence[Table]) -> list[Comparison]:
    """Linear layers of models: every (n, k) predicted from the others of its card."""
    linear = [t for t in tables if t.family == "linear" and t.get("layer") is not None]
    rest = [t for t in tables if t.family != "linear"]
    out: list[Comparison] = []
    for shape in sorted({tuple(t.keys[0, 1:].tolist()) for t in linear}):
        inside = [t for t in linear if tuple(t.keys[0, 1:].tolist()) == shape]
        outside = [t for t in linear if tuple(t.keys[0, 1:].tolist()) != shape]
        out += refit(source, rest + outside, inside)
    return out


def card_report(source: Source, tables: Sequence[Table]) -> list[Row]:
    """Held-out rows of one card."""
    tables = newest(tables)
    compared = refit(source, *split_points(tables)) + leave_one_layer_out(source, tables)
    rows = [{"split": "shapes", "card": source.name, **row} for row in summarise(compared)]
    train, test = split_heads(tables)
    if test:
        rows += [{"split": "new heads", "card": source.name, **r} for r in summarise(refit(source, train, test))]
    return rows


def pair_report(data: Path) -> list[Row]:
    """Pairs of model and card that no committed grid has seen."""
    rows: list[Row] = []
    for name in ("Llama-2-7b-hf", "Llama-2-70b-hf"):
        folder = data / "profiles/vidur/compute/a100/meta-llama" / name
        compared = compare(Operators(hardware_named("a100-80g")), read_tables(folder, "vidur"))
        rows += [{"split": "left out", "card": f"a100_sxm / {name} (Vidur)", **r} for r in summarise(compared)]
    return rows


def refit_pairs(source: Source, tables: Sequence[Table]) -> list[Row]:
    """Each model of an in-engine card, from a fit without it."""
    models = sorted({t.get("model").name for t in tables if t.get("model") is not None})
    rows: list[Row] = []
    for name in models if len(models) > 1 else ():
        test = [t for t in tables if t.get("model").name == name]
        train = [t for t in tables if t.get("model").name != name]
        rows += [
            {"split": "refit without", "card": f"{source.name} / {name}", **r}
            for r in summarise(refit(source, train, test))
        ]
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The report as a table."""
    lines = [
        "# Held-out error of the cost model",
        "",
        "Written by `python -m common.cost.holdout`; what each split means is in docs/cost-model.md.",
        "",
        "| split | card | family | regime | points | median | P95 | bias |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['split']} | {r['card']} | {r['family']} | {r['regime']} | {r['count']:,} | "
            f"{r['median']:.1%} | {r['p95']:.1%} | {r['bias']:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print and write the report."""
    parser = argparse.ArgumentParser(prog="python -m common.cost.holdout", description=__doc__)
    parser.add_argument("--data", help="folder of measured tables")
    parser.add_argument("--out", default="results/validation/operators", type=Path)
    args = parser.parse_args(argv)
    try:
        data = data_folder(args.data)
        rows: list[Row] = []
        for source in SOURCES:
            tables, _ = read_source(source, data)
            rows += card_report(source, tables) + refit_pairs(source, tables)
        rows += pair_report(data)
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = markdown(rows)
    (args.out / "heldout.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
