"""`build(config, seed)`: the only way to a workload. The order of transformations is the order of this file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from common.errors import ConfigError
from workloads import generators, readers, servegen, sessions, transform
from workloads.config import (
    Burst,
    ClosedLoop,
    Common,
    Diurnal,
    File,
    LongContext,
    Poisson,
    ServeGen,
    Sessions,
    SharedPrefix,
    WorkloadConfig,
    from_mapping,
)  # fmt: skip
from workloads.several import several
from workloads.types import Ints, Workload


def build(config: WorkloadConfig, seed: int) -> Workload:
    """The workload of `config`; equal arguments give equal arrays on any machine."""
    if config.per_model is not None:
        return several(config, seed, build)
    workload = _raw(config, seed)
    if config.window_s is not None:
        workload = transform.window(workload, *config.window_s)
    if isinstance(config, File) and config.jitter_s:
        workload = replace(workload, arrival_ns=_jittered(workload, config.jitter_s, seed))
    if config.mix is not None:
        workload = _mixed(workload, config.mix, seed)
    if config.rate_scale != 1.0:
        workload = transform.rate_scale(workload, config.rate_scale, seed)
    if config.speed != 1.0:
        workload = transform.speed(workload, config.speed)
    if config.length_scale != 1.0 and workload.release_after is None:
        workload = transform.length_scale(workload, config.length_scale)
    return _extent(transform.limit(workload, config), config)


def _raw(config: WorkloadConfig, seed: int) -> Workload:
    match config:
        case Poisson():
            return generators.poisson(config, seed)
        case ClosedLoop():
            return generators.closed_loop(config, seed)
        case Burst():
            return generators.burst(config, seed)
        case LongContext():
            return generators.long_context(config, seed)
        case SharedPrefix():
            return generators.shared_prefix(config, seed)
        case Diurnal():
            return generators.diurnal(config, seed)
        case Sessions():
            return sessions.build_sessions(config, seed)
        case ServeGen():
            return servegen.build_servegen(config, seed)
        case File():
            return readers.read(config, seed)


def _jittered(workload: Workload, spread_s: float, seed: int) -> Ints:
    order = transform.roots(workload)
    arrival = workload.arrival_ns.copy()
    arrival[order] = transform.jitter(arrival[order], spread_s, seed)
    return arrival


def _mixed(workload: Workload, mix: Mapping[str, object], seed: int) -> Workload:
    """`mix: {weight: 0.2, workload: {kind: long_context, ...}}`: bodies from another workload."""
    if sorted(mix) != ["weight", "workload"]:
        raise ConfigError(f"workload.mix has keys {sorted(mix)}; it needs exactly weight and workload")
    weight, other = mix["weight"], mix["workload"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise ConfigError(f"workload.mix.weight={weight!r} must lie between 0 and 1")
    if not isinstance(other, Mapping):
        raise ConfigError("workload.mix.workload must be a mapping with a kind")
    enough = math.ceil(workload.num_requests * weight + 6 * math.sqrt(workload.num_requests) + 1)
    config = (
        from_mapping({"num_requests": enough, "duration_s": None} | dict(other))
        if _endless(other)
        else from_mapping(other)
    )
    return transform.mix(workload, build(config, seed), float(weight), seed)


def _endless(other: Mapping[str, object]) -> bool:
    return other.get("kind") not in ("file", "servegen") and "num_requests" not in other and "duration_s" not in other


def _extent(workload: Workload, config: Common) -> Workload:
    if config.duration_s is not None and workload.concurrency is None:
        workload = transform.window(workload, 0.0, config.duration_s)
    if config.num_requests is not None:
        workload = transform.first(workload, config.num_requests)
    if workload.num_requests == 0:
        why = ", ".join(f"{key} {count}" for key, count in workload.counts.items() if count) or "nothing arrives"
        ways = "window_s, duration_s, num_requests or the limits on lengths"
        raise ConfigError(f"workload {workload.name!r} is empty ({why}): widen {ways}")
    return workload
