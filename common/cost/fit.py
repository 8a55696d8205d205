"""Fit the committed grids: `python -m common.cost.fit [--data DIR] [--out DIR]`; with --measure, those of this device
(`common.cost.profile`).

DIR holds measured tables (default $KVPLANE_DATA, else ../shared/data). Fitting is: take the median time per shape,
lay it on the lattice of its axes, fill holes by interpolating *time / roofline* in log space, pack. Nothing else is
fitted, and nothing here ever sees an end-to-end run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.cost.filling import axis_of, between, blend, concat, fastest, fill, fill_times, lattice, pool_heads
from common.cost.grids import FOLDER, Array, Grid, pack
from common.cost.roofline import LAUNCH_NS, Roof
from common.cost.sources import SOURCES, Source
from common.cost.table import Table
from common.cost.tables import read_tables
from common.errors import ConfigError, KVPlaneError

HEAD_DIM = 128
DENSE = 0.5  # share of a lattice's shapes that must be measured for it to be completed
MAX_MESSAGE = 1 << 28  # bytes of an all-reduce
SIZE_BINS = 4  # bins of message sizes per doubling
MAX_TOKENS = 16384  # rows of a linear layer worth keeping
LONGEST_NS = 2.3e8  # what a grid can store


def fit_linear(tables: Sequence[Table], roof: Roof) -> dict[str, npt.NDArray[Any]]:
    """(n, k) shapes x tokens; where the shapes nearly make a lattice, it is completed."""
    table = concat(tables)
    if table is None:
        return {}
    table = table.take(table.column("m") <= MAX_TOKENS)
    m, n, k = (axis_of(table, name) for name in ("m", "n", "k"))
    ideal = roof.linear(m[:, None, None], n[None, :, None], k[None, None, :]) + LAUNCH_NS
    logs = np.log(lattice(table, [m, n, k]) / ideal)
    measured = ~np.isnan(logs).all(axis=0)
    for i, j in np.argwhere(measured):
        logs[:, i, j] = fill(logs[:, i, j], [m])
    if measured.mean() > DENSE:
        count = np.broadcast_to(np.arange(float(len(m)))[:, None, None], logs.shape)
        logs = blend(logs, [between(logs, 1, n), between(logs, 2, k)], count)
        logs = fill(logs, [m, n, k], axes_used=(1, 2))
        measured[:] = True
    times = np.minimum(np.exp(logs) * ideal, LONGEST_NS)
    rows = np.argwhere(measured)
    shapes = np.stack([n[rows[:, 0]], k[rows[:, 1]]], axis=1)
    packed = pack(times[:, rows[:, 0], rows[:, 1]].T)
    return {"gemm_m": m.astype(np.int32), "gemm_nk": shapes.astype(np.int32), "gemm": packed}


def _heads(table: Table) -> npt.NDArray[np.int64]:
    pairs = np.stack([table.column("heads"), table.column("kv_heads")], axis=1)
    return np.unique(pairs, axis=0)


Ideal = Callable[[Array, Array, Array, Array], Array]  # roofline of (batch, length or context, heads, KV heads)


def _fit_heads(table: Table, length: str, ideal_of: Ideal, diagonal: bool) -> tuple[list[Array], Array]:
    """Axes (batch, length) and times of head configurations x batch x length: holes are filled across heads first,
    then, where no neighbour is, within a head configuration."""
    axes = [axis_of(table, name) for name in ("batch", length, "heads", "kv_heads")]
    ideal = ideal_of(*np.ix_(*axes))
    times = pool_heads(lattice(table, axes), ideal, axes)
    heads = _heads(table)
    rows = [np.searchsorted(axis, column) for axis, column in zip(axes[2:], heads.T)]
    out = [fill_times(times[:, :, i, j], ideal[:, :, i, j], axes[:2], diagonal) for i, j in zip(*rows)]
    return axes[:2], np.minimum(np.array(out), LONGEST_NS)


def fit_prefill(tables: Sequence[Table], roof: Roof) -> dict[str, npt.NDArray[Any]]:
    """Head configurations x batch x prompt length, nothing cached."""
    table = concat(tables)
    if table is None:
        return {}

    def ideal(batch: Array, length: Array, heads: Array, kv: Array) -> Array:
        tokens = batch * length
        work: Array = roof.prefill_work(tokens, tokens * (length + 1) / 2, heads, kv, HEAD_DIM)
        return work

    axes, times = _fit_heads(table, "length", ideal, False)
    return {
        "pre_heads": _heads(table).astype(np.int32),
        "pre_batch": axes[0].astype(np.int32),
        "pre_length": axes[1].astype(np.int32),
        "pre": pack(times),
    }


def fit_decode(tables: Sequence[Table], roof: Roof) -> dict[str, npt.NDArray[Any]]:
    """Head configurations x batch x context."""
    table = concat(tables)
    if table is None:
        return {}

    def ideal(batch: Array, context: Array, heads: Array, kv: Array) -> Array:
        work: Array = roof.decode(batch, context, heads, kv, HEAD_DIM)
        return work

    axes, times = _fit_heads(table, "kv", ideal, True)
    return {
        "dec_heads": _heads(table).astype(np.int32),
        "dec_batch": axes[0].astype(np.int32),
        "dec_context": axes[1].astype(np.int32),
        "dec": pack(times),
    }


def fit_attention(tables: Sequence[Table], roof: Roof) -> dict[str, npt.NDArray[Any]]:
    """In-engine attention: chunks alone, decodes alone, and both in one batch, per head configuration."""
    if not tables:
        return {}
    heads, sizes, chunks, decodes, mixed = [], [], [], [], []
    c, kp, n, kd = (
        np.unique(np.concatenate([t.column(name)[t.column(name) >= low] for t in tables])).astype(np.float64)
        for name, low in (("chunk", 1), ("kv_prefill", 0), ("decodes", 1), ("kv_decode", 1))
    )
    for t in tables:
        h, kv = _rank_heads(t)
        size = t.get("model").head_dim
        heads.append((h, kv))
        sizes.append(size)
        alone_c, alone_d = t.column("decodes") == 0, t.column("chunk") == 0
        pairs = c[:, None] * kp[None, :] + c[:, None] * (c[:, None] + 1) / 2
        ideal_c = roof.prefill_work(c[:, None], pairs, h, kv, size)
        ideal_d = roof.decode(n[:, None], kd[None, :], h, kv, size)
        chunks.append(fill_times(lattice(_columns(t.take(alone_c), 0, 1), [c, kp]), ideal_c, [c, kp]))
        decodes.append(fill_times(lattice(_columns(t.take(alone_d), 2, 3), [n, kd]), ideal_d, [n, kd], len(kd) < 12))
        both = t.take(~alone_c & ~alone_d)
        if len(both.time_ns):  # else the parts simply add
            total = chunks[-1][:, :, None, None] + decodes[-1][None, None, :, :]
            times = fill_times(lattice(both, [c, kp, n, kd]), total, [c, kp, n, kd])
            mixed.append(np.minimum(times, LONGEST_NS))
    arrays: dict[str, npt.NDArray[Any]] = {
        "mix_heads": np.array(heads, dtype=np.int32),
        "mix_chunk": c.astype(np.int32),
        "mix_cached": kp.astype(np.int32),
        "mix_batch": n.astype(np.int32),
        "mix_context": kd.astype(np.int32),
        "mix_pre": pack(np.array(chunks)),
        "mix_dec": pack(np.array(decodes)),
    }
    if mixed:
        arrays["mix"] = pack(np.array(mixed))
    if set(sizes) != {HEAD_DIM}:
        arrays["mix_size"] = np.array(sizes, dtype=np.int32)
    return arrays


def fit_chunks(chunks: Sequence[Table], decodes: Sequence[Table], roof: Roof) -> dict[str, npt.NDArray[Any]]:
    """Kernels measured one batch of a kind at a time: single chunks over (tokens, cached context), decodes over
    (batch, context); nothing about batches of both."""
    table, alone = concat(chunks), concat(decodes)
    if table is None or alone is None:
        return {}
    heads = _heads(table)
    if not np.array_equal(heads, _heads(alone)):
        raise ConfigError("chunks and decodes were measured for different heads")
    table = table.take(table.column("batch") == 1)
    c, p, n, d = axis_of(table, "chunk"), axis_of(table, "kv_prefill"), axis_of(alone, "batch"), axis_of(alone, "kv")
    pre, dec = [], []
    for h, kv in heads.tolist():
        mine, others = (t.take((t.column("heads") == h) & (t.column("kv_heads") == kv)) for t in (table, alone))
        pairs = c[:, None] * p[None, :] + c[:, None] * (c[:, None] + 1) / 2
        ideal = roof.prefill_work(c[:, None], pairs, h, kv, HEAD_DIM)
        pre.append(np.minimum(fill_times(lattice(_columns(mine, 1, 2), [c, p]), ideal, [c, p]), LONGEST_NS))
        dec.append(
            fill_times(lattice(_columns(others, 0, 1), [n, d]), roof.decode(n[:, None], d, h, kv, HEAD_DIM), [n, d])
        )
    return {
        "mix_heads": heads.astype(np.int32),
        "mix_chunk": c.astype(np.int32),
        "mix_cached": p.astype(np.int32),
        "mix_batch": n.astype(np.int32),
        "mix_context": d.astype(np.int32),
        "mix_pre": pack(np.array(pre)),
        "mix_dec": pack(np.array(dec)),
    }


def _rank_heads(table: Table) -> tuple[int, int]:
    model, tp = table.get("model"), int(table.get("tp"))
    return model.num_heads // tp, max(1, model.num_kv_heads // tp)


def _columns(table: Table, *which: int) -> Table:
    names = tuple(table.columns[i] for i in which)
    return Table(table.family, names, table.keys[:, list(which)], table.time_ns)


def fit_rows(tables: Sequence[Table], column: str, prefix: str) -> dict[str, npt.NDArray[Any]]:
    """Curves over one axis (elementwise operators by tokens, the sampler by rows), one row per source."""
    if not tables:
        return {}
    axis = np.unique(np.concatenate([t.column(column) for t in tables])).astype(np.float64)
    out = [fill(np.log(lattice(t, [axis])), [axis]) for t in tables]
    arrays: dict[str, npt.NDArray[Any]] = {
        f"{prefix}_axis": axis.astype(np.int32),
        prefix: pack(np.exp(np.array(out))),
    }
    if prefix == "elem":
        arrays["elem_name"] = np.array([str(t.get("layer")) for t in tables])
        arrays["elem_width"] = np.array([int(t.get("width")) for t in tables], dtype=np.int32)
    else:
        widths = [-(-t.get("model").vocab_size // int(t.get("tp"))) for t in tables]
        arrays[f"{prefix}_width"] = np.array(widths, dtype=np.int32)
    return arrays


def merge_all_reduce(tables: Sequence[Table]) -> list[Table]:
    """All kernels and versions of all-reduce in one folder as one table: an engine picks the fastest at each size."""
    groups: dict[str, list[Table]] = {}
    for t in tables:
        if t.family == "all_reduce" and len(t.time_ns):
            groups.setdefault(_card_folder(str(t.get("source"))), []).append(t)
    merged = [fastest(group) for group in groups.values()]
    return [t for t in tables if t.family != "all_reduce"] + merged


def _card_folder(source: str) -> str:
    """What precedes `comm/` in an aiconfigurator path, so that one card's kernels meet; else the file itself."""
    head, found, _ = source.rpartition("/comm/")
    return head if found else source


def fit_all_reduce(tables: Sequence[Table]) -> dict[str, npt.NDArray[Any]]:
    """GPUs x bytes: the fastest kernel measured at each size, or the median of a bin of sizes."""
    if not tables:
        return {}
    merged = thinned(merge_all_reduce(tables)[0])
    merged = merged.take(merged.column("bytes") <= MAX_MESSAGE)
    axes = [axis_of(merged, "gpus"), axis_of(merged, "bytes")]
    times = np.exp(fill(np.log(lattice(merged, axes)), axes))
    return {
        "ar_gpus": axes[0].astype(np.int32),
        "ar_bytes": axes[1].astype(np.int64),
        "ar": pack(np.minimum(times, LONGEST_NS)),
    }


def thinned(table: Table) -> Table:
    """A collective measured at more sizes than bins, each with its noise: the median of each bin of sizes."""
    size = np.unique(table.column("bytes")).astype(np.float64)
    of_size = np.round(np.log2(size) * SIZE_BINS)
    bins = np.unique(of_size)
    if len(bins) == len(size):
        return table
    knots = np.array([np.exp(np.log(size[of_size == b]).mean()) for b in bins]).astype(np.int64)
    which = knots[np.searchsorted(bins, np.round(np.log2(table.column("bytes").astype(np.float64)) * SIZE_BINS))]
    keys, index = np.unique(np.stack([table.column("gpus"), which], axis=1), axis=0, return_inverse=True)
    index = index.reshape(-1)
    times = np.array([np.median(table.time_ns[index == i]) for i in range(len(keys))])
    return Table(table.family, ("gpus", "bytes"), keys, times, table.context)


def fit_send_recv(tables: Sequence[Table]) -> dict[str, npt.NDArray[Any]]:
    """Point-to-point within a node: median time in bins of bytes."""
    if not tables:
        return {}
    inside = tables[0]
    size = inside.column("bytes").astype(np.float64)
    bins = np.round(np.log2(size) * SIZE_BINS)
    knots = [float(np.exp(np.log(size[bins == b]).mean())) for b in np.unique(bins)]
    times = [float(np.median(inside.time_ns[bins == b])) for b in np.unique(bins)]
    return {"sr_bytes": np.array(knots).astype(np.int64), "sr": pack(np.array(times))}


def skew_rule(files: Sequence[Path]) -> dict[str, float] | None:
    """What uneven lengths cost decode batches, by tp: the profile's own `skew_fit.per_tp.*.alpha_default` in
    meta.yaml, mean over its models; None where its fit is off or there is none: no correction that its authors have
    not measured and enabled."""
    import yaml

    found: dict[str, list[float]] = {}
    for file in files:
        fit = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("skew_fit") or {}
        for tp, entry in (fit.get("per_tp") or {}).items() if fit.get("enabled") else ():
            found.setdefault(str(tp), []).append(float(entry["alpha_default"]))
    return {tp: round(sum(alphas) / len(alphas), 4) for tp, alphas in sorted(found.items())} or None


def fit_tables(source: Source, tables: Sequence[Table], skew: dict[str, float] | None = None) -> Grid:
    """One card's grid from its measured tables."""
    roof = Roof.of(source.peak_flops, source.mem_bandwidth, source.dtype_bytes)

    def of(family: str) -> list[Table]:
        return [t for t in tables if t.family == family and len(t.time_ns)]

    chunks, decodes = of("chunk_attention"), of("decode_attention")
    arrays = {
        **fit_linear(of("linear"), roof),
        **fit_prefill(of("prefill_attention"), roof),
        **(fit_chunks(chunks, decodes, roof) if chunks else fit_decode(decodes, roof)),
        **fit_attention(of("attention"), roof),
        **fit_rows(of("elementwise"), "tokens", "elem"),
        **fit_rows(of("sampler"), "rows", "samp"),
        **fit_all_reduce(of("all_reduce")),
        **fit_send_recv(of("send_recv")),
    }
    meta: dict[str, Any] = {
        "name": source.name,
        "peak_flops": source.peak_flops,
        "mem_bandwidth": source.mem_bandwidth,
        "link_bandwidth": source.link_bandwidth,
        "num_sm": source.num_sm,
        "kernel": source.kernel,
        "source": source.licence,
        "skew": skew,
    }
    if source.dense:
        meta["dense"] = True
    if source.dtype_bytes != 2:
        meta["dtype_bytes"] = source.dtype_bytes
    return Grid(meta, arrays)


def read_source(source: Source, data: Path) -> tuple[list[Table], dict[str, float] | None]:
    """A card's tables and its skew rule."""
    tables: list[Table] = []
    skews: list[Path] = []
    for folder in source.folders:
        tables += read_tables(data / folder)
        skews += sorted((data / folder).rglob("meta.yaml"))
    if source.network:
        tables += [t for t in read_tables(data / source.network, "vidur") if t.family == "send_recv"]
    return tables, skew_rule(skews)


def data_folder(given: str | None) -> Path:
    """The folder of measured data: --data, $KVPLANE_DATA, or ../shared/data beside the repository."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(given or os.environ.get("KVPLANE_DATA") or root.parent / "shared" / "data")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no measured data here; pass --data DIR or set KVPLANE_DATA")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Fit and write every grid."""
    parser = argparse.ArgumentParser(prog="python -m common.cost.fit", description=__doc__)
    parser.add_argument("--data", help="folder of measured tables")
    parser.add_argument("--out", help="where the grids go (with --measure: the profile; $KVPLANE_PROFILES)")
    parser.add_argument("--measure", action="store_true", help="profile this device; further options: bench.profile's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --measure")
    parser.add_argument("--name", help="of --measure: the profile's name")
    args, more = parser.parse_known_args(argv)
    if more and not args.measure:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        if args.measure:
            from common.cost.profile import measure
            from common.cost.profiles import profile_folder

            name = args.name or f"measured-{args.device}"
            measure(args.device, name, Path(args.out) if args.out else profile_folder(), more)
            return 0
        data = data_folder(args.data)
        for source in SOURCES:
            tables, skew = read_source(source, data)
            path = Path(args.out or FOLDER) / f"{source.name}.npz"
            fit_tables(source, tables, skew).save(path)
            print(f"{path.name}: {sum(len(t.time_ns) for t in tables):,} points, {path.stat().st_size:,} bytes")
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
