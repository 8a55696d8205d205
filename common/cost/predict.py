"""What the model says at the points of a measured table, and how far off it is, by family and regime."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.cost.attention import AttentionCost
from common.cost.grids import Array
from common.cost.operators import Operators
from common.cost.table import Table

CACHED = 0.98  # a time below this share of the speed of light was measured with its data in L2: not comparable
LATENCY_NS = 15_000.0  # below this, launch and synchronisation decide
HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Comparison:
    """One table against the model: relative errors and the regime of every point."""

    family: str
    error: Array
    regime: Array  # of str
    signed: Array


def predict(operators: Operators, table: Table) -> tuple[Array, Array]:
    """Predicted times and the speed-of-light share that compute has over memory (> 1: compute-bound), per row."""
    kind = {
        "linear": _linear,
        "prefill_attention": _prefill,
        "decode_attention": _decode,
        "attention": _mixed,
        "chunk_attention": _chunks,
        "elementwise": _elementwise,
        "sampler": _sampler,
        "all_reduce": _all_reduce,
        "send_recv": _send_recv,
    }[table.family]
    return kind(operators, table)


def _balance(operators: Operators, flops: Any, num_bytes: Any) -> Array:
    roof = operators.roof
    ratio: Array = (flops / roof.flops_per_ns) / np.maximum(num_bytes / roof.bytes_per_ns, 1e-9)
    return ratio


def _memory(table: Table) -> Array:
    return np.zeros(len(table.time_ns))


def _linear(operators: Operators, table: Table) -> tuple[Array, Array]:
    out = np.empty(len(table.time_ns))
    m, shapes = table.column("m").astype(float), table.keys[:, 1:]
    for n, k in np.unique(shapes, axis=0):
        rows = (shapes[:, 0] == n) & (shapes[:, 1] == k)
        out[rows] = operators.linear(int(n), int(k), m[rows])
    n, k = shapes[:, 0].astype(float), shapes[:, 1].astype(float)
    return out, _balance(operators, 2 * m * n * k, 2 * n * k)


def _by_heads(operators: Operators, table: Table) -> Iterable[tuple[Array, AttentionCost, int, int]]:
    pairs = np.stack([table.column("heads"), table.column("kv_heads")], axis=1)
    for h, kv in np.unique(pairs, axis=0):
        rows = np.flatnonzero((pairs[:, 0] == h) & (pairs[:, 1] == kv))
        yield rows, AttentionCost(operators, int(h), int(kv), HEAD_DIM), int(h), int(kv)  # type: ignore[misc]


def _prefill(operators: Operators, table: Table) -> tuple[Array, Array]:
    out, balance = np.empty(len(table.time_ns)), np.empty(len(table.time_ns))
    for rows, attention, h, kv in _by_heads(operators, table):
        for row in rows.tolist():
            batch, length = int(table.keys[row, 0]), int(table.keys[row, 1])
            out[row] = attention.batch_ns([(length, 0)] * batch, 0, 0, 0.0)
            balance[row] = _balance(operators, 4 * h * HEAD_DIM * length * length / 2, 4 * kv * HEAD_DIM * length)
    return out, balance


def _chunks(operators: Operators, table: Table) -> tuple[Array, Array]:
    out, balance = np.empty(len(table.time_ns)), np.empty(len(table.time_ns))
    for rows, attention, h, kv in _by_heads(operators, table):
        for row in rows.tolist():
            batch, chunk, cached = (int(x) for x in table.keys[row, :3])
            out[row] = attention.batch_ns([(chunk, cached)] * batch, 0, 0, 0.0)
            reads = 4 * kv * HEAD_DIM * (cached + chunk)
            balance[row] = _balance(operators, 4 * h * HEAD_DIM * chunk * (cached + chunk / 2), reads)
    return out, balance


def _decode(operators: Operators, table: Table) -> tuple[Array, Array]:
    out = np.empty(len(table.time_ns))
    for rows, attention, _, _ in _by_heads(operators, table):
        for row in rows.tolist():
            out[row] = attention.decode_ns(int(table.keys[row, 0]), int(table.keys[row, 1]))
    return out, _memory(table)


def _mixed(operators: Operators, table: Table) -> tuple[Array, Array]:
    model, tp = table.get("model"), int(table.get("tp"))
    h, kv = model.num_heads // tp, max(1, model.num_kv_heads // tp)
    attention = AttentionCost(operators, h, kv, model.head_dim)
    out = np.empty(len(table.time_ns))
    for row, (chunk, cached, decodes, context) in enumerate(table.keys.tolist()):
        alone = attention.decode_ns(decodes, context) if decodes else 0.0
        out[row] = attention.batch_ns([(chunk, cached)], decodes, context, alone) if chunk else alone
    c, p, n, x = (table.keys[:, i].astype(float) for i in range(4))
    pairs = c * (p + c / 2) + n * x
    return out, _balance(operators, 4 * h * HEAD_DIM * pairs, 4 * kv * HEAD_DIM * (p + c + n * x))


def _elementwise(operators: Operators, table: Table) -> tuple[Array, Array]:
    tokens = table.column("tokens").astype(float)
    return operators.elementwise(str(table.get("layer")), int(table.get("width")), tokens), _memory(table)


def _sampler(operators: Operators, table: Table) -> tuple[Array, Array]:
    vocab = -(-table.get("model").vocab_size // int(table.get("tp")))
    return operators.sampler(vocab, table.column("rows").astype(float)), _memory(table)


def _all_reduce(operators: Operators, table: Table) -> tuple[Array, Array]:
    out = np.empty(len(table.time_ns))
    for gpus in np.unique(table.column("gpus")):
        rows = table.column("gpus") == gpus
        out[rows] = operators.all_reduce(int(gpus), table.column("bytes")[rows].astype(float))
    return out, _memory(table)


def _send_recv(operators: Operators, table: Table) -> tuple[Array, Array]:
    return operators.send_recv(table.column("bytes").astype(float)), _memory(table)


def speed_of_light(operators: Operators, table: Table) -> Array:
    """Bytes / bandwidth or FLOPs / peak of every row; 0 where nothing must cross HBM."""
    keys = table.keys.astype(float)
    if table.family == "linear":
        return np.asarray(operators.roof.linear(*keys.T))
    if table.family == "decode_attention":
        reads = 4.0 * HEAD_DIM * keys[:, 3] * keys[:, 0] * keys[:, 1]
        return np.asarray(reads / operators.roof.bytes_per_ns)
    return np.zeros(len(keys))


def split_attention(table: Table) -> list[Table]:
    """An in-engine attention table as its three families; any other table as it is."""
    if table.family != "attention":
        return [table]
    chunk, decodes = table.column("chunk") > 0, table.column("decodes") > 0
    parts = (("prefill_attention", chunk & ~decodes), ("decode_attention", decodes & ~chunk))
    return [table.take(chunk & decodes), *(table.take(mask) for _, mask in parts)]


def _label(table: Table) -> str:
    if table.family != "attention":
        return {"chunk_attention": "prefill_attention"}.get(table.family, table.family)
    chunk, decodes = bool((table.column("chunk") > 0).all()), bool((table.column("decodes") > 0).all())
    return "mixed_attention" if chunk and decodes else "prefill_attention" if chunk else "decode_attention"


def compare(operators: Operators, tables: Iterable[Table]) -> list[Comparison]:
    """Relative errors of the model at every measured point."""
    out = []
    for table in tables:
        for part in split_attention(table):
            if not len(part.time_ns):
                continue
            predicted, balance = predict(operators, part)
            regime = np.where(balance > 1, "compute", "memory")
            regime = np.where(part.time_ns < LATENCY_NS, "latency", regime)
            real = part.time_ns >= CACHED * speed_of_light(operators, part)
            if not real.all():
                left = int((~real).sum())
                print(f"note: {left} of {len(real)} points of {_label(part)} are faster than the card's speed of light "
                      "(their data was cached) and are left out", file=sys.stderr)  # fmt: skip
            signed = (predicted / part.time_ns - 1)[real]
            regime = regime[real]
            label = "lm_head" if part.get("layer") == "lm_head" else _label(part)
            out.append(Comparison(label, np.abs(signed), regime, signed))  # type: ignore[arg-type]
    return out


def summarise(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One row per family and regime: count, median, P95 (and the median signed error)."""
    groups: dict[tuple[str, str], list[tuple[Array, Array]]] = defaultdict(list)
    for item in comparisons:
        for regime in ("memory", "compute", "latency"):
            mask = item.regime == regime
            if mask.any():
                groups[item.family, regime].append((item.error[mask], item.signed[mask]))
    rows = []
    for (family, regime), parts in sorted(groups.items()):
        error, signed = (np.concatenate(column) for column in zip(*parts))
        rows.append(
            {
                "family": family,
                "regime": regime,
                "count": len(error),
                "median": round(float(np.median(error)), 4),
                "p95": round(float(np.percentile(error, 95)), 4),
                "bias": round(float(np.median(signed)), 4),
            }
        )
    return rows
