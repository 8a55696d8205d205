"""`python -m workloads.describe workload=NAME [key=value ...]`: what a workload is like, in numbers and a figure."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.errors import ConfigError, KVPlaneError
from workloads.arrivals import NS
from workloads.build import build
from workloads.config import from_mapping
from workloads.content import reusable
from workloads.types import Ints, Workload

CONF = Path(__file__).resolve().parents[1] / "conf" / "workload"
PERCENTILES = (50, 90, 99)
Stats = dict[str, float | int | str]


def load(overrides: Sequence[str]) -> tuple[str, int, dict[str, object]]:
    """(name, seed, mapping) from `workload=NAME`, `seed=N` and `key=value` or `workload.key=value`."""
    pairs: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not key=value; for example workload=burst rate=3")
        pairs[key.removeprefix("workload.")] = value
    name = pairs.pop("workload", None)
    known = sorted(path.stem for path in CONF.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"workload={name} is unknown; choose one of: {', '.join(known)}")
    try:
        seed = int(pairs.pop("seed", "0"))
        if seed < 0:
            raise ValueError
        mapping = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
        for key, value in pairs.items():
            _assign(mapping, key, _value(value))
    except ValueError:
        raise ConfigError("seed must be a whole number of at least 0") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"an override is not a YAML value: {' '.join(str(error).split())}") from None
    return str(name), seed, mapping


def _value(text: str) -> object:
    """As on run.py's command line, where 1e9 is a number; to YAML 1.1 it is a word."""
    value = yaml.safe_load(text)
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _assign(mapping: dict[str, Any], key: str, value: object) -> None:
    """`a.b.c=value`; what is not a mapping on the way becomes one."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(mapping.get(part), dict):
            mapping[part] = {}
        mapping = mapping[part]
    mapping[last] = value


def statistics(workload: Workload) -> Stats:
    stats: Stats = {"name": workload.name, "requests": workload.num_requests}
    timed = np.sort(workload.arrival_ns[workload.arrival_ns >= 0]) / NS
    if workload.concurrency is not None:
        stats["concurrency"] = workload.concurrency
    if len(timed) > 1:
        stats |= arrival_statistics(timed)
    for name, tokens in (("prompt", workload.prompt_tokens), ("output", workload.output_tokens)):
        stats[f"{name}_mean"] = float(tokens.mean())
        stats |= {f"{name}_p{p}": float(np.percentile(tokens, p)) for p in PERCENTILES}
        stats[f"{name}_min"], stats[f"{name}_max"] = int(tokens.min()), int(tokens.max())
    stats["prompt_tokens_total"] = int(workload.prompt_tokens.sum())
    stats["output_tokens_total"] = int(workload.output_tokens.sum())
    if workload.session is not None:
        turns = np.unique(workload.session, return_counts=True)[1]
        stats |= {"sessions": len(turns), "turns_mean": float(turns.mean()), "turns_max": int(turns.max())}
    share = prefix_share(workload)
    if share is not None:
        stats["prefix_share_of_tokens"] = float((share * workload.prompt_tokens).sum() / workload.prompt_tokens.sum())
        stats["requests_without_prefix"] = float(np.mean(share == 0))
    stats |= {f"count_{key}": value for key, value in workload.counts.items()}
    stats["max_output_tokens"] = workload.max_output_tokens
    return stats


def arrival_statistics(seconds: np.ndarray[Any, np.dtype[np.float64]]) -> Stats:
    """Of requests that arrive by time (in sessions: their starts)."""
    duration = float(seconds[-1] - seconds[0])
    gaps = np.diff(seconds)
    per_second = np.bincount((seconds - seconds[0]).astype(np.int64))
    stats: Stats = {"arrivals": len(seconds), "duration_s": duration}
    if duration > 0:
        stats["rate_per_s"] = len(gaps) / duration
        stats["gap_cv"] = float(gaps.std() / gaps.mean())
        stats["peak_per_s"] = int(per_second.max())
        stats["peak_over_mean"] = float(per_second.max() / per_second.mean())
        stats["dispersion_1s"] = float(per_second.var() / per_second.mean())
    return stats


def prefix_share(workload: Workload) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Of each prompt, the part an infinite cache would hold; None where every prompt is unique."""
    if workload.content is None:
        return None
    order = _serving_order(workload)
    hits = np.empty(workload.num_requests)
    hits[order] = reusable((workload.content[i] for i in order.tolist()), workload.output_tokens[order], order)
    share: np.ndarray[Any, np.dtype[np.float64]] = hits / workload.prompt_tokens
    return share


def _serving_order(workload: Workload) -> Ints:
    """By arrival; a turn counts as arriving right after the turn that releases it."""
    when = workload.arrival_ns.tolist()
    if workload.release_after is not None:
        for index, before in enumerate(workload.release_after.tolist()):
            if before >= 0:
                when[index] = when[before]
    return np.argsort(np.array(when), kind="stable")


def table(stats: Mapping[str, float | int | str]) -> str:
    width = max(map(len, stats))
    return "\n".join(
        f"{key:<{width}}  {_shown(value)}" for key, value in stats.items() if value != 0 or key in ("gap_cv",)
    )


def _shown(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m workloads.describe", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="workload=NAME, seed=N, any key of it")
    parser.add_argument("--out", type=Path, help="folder (default: results/workloads/NAME)")
    parser.add_argument("--no-figure", action="store_true", help="numbers only")
    args = parser.parse_intermixed_args(argv)
    try:
        name, seed, mapping = load(args.overrides)
        workload = build(from_mapping(mapping), seed)
        stats = statistics(workload)
        print(table(stats))
        print(f"provenance: {workload.provenance}")
        if not args.no_figure:
            _write(args.out or Path("results") / "workloads" / name, workload, stats, name)
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(out: Path, workload: Workload, stats: Stats, name: str) -> None:
    from workloads.figure import draw

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "statistics.json").write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
        draw(workload, prefix_share(workload), name, out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(f"figure: {out / 'workload.png'}")


if __name__ == "__main__":
    sys.exit(main())
