"""One workload of several models: each asks for its own, with lengths and arrivals of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import numpy as np

from common.errors import ConfigError
from workloads.config import Common, WorkloadConfig, from_mapping
from workloads.types import Workload, no_counts

Build = Callable[[WorkloadConfig, int], Workload]


def several(config: Common, seed: int, build: Build) -> Workload:
    """A workload for each name of `per_model`: this one with the keys given there changed (all of them anew where
    `kind` is among them). Merged by arrival. Each has random streams of its own, so a model's requests are those
    that it would have alone."""
    per_model = config.per_model
    if not isinstance(per_model, Mapping) or len(per_model) < 2:
        raise ConfigError(f"workload.per_model={per_model!r}: give two or more models, {{name: {{key: value}}}}")
    return merge({name: build(_one(config, name, changes), seed_of(seed, name)) for name, changes in per_model.items()})


def seed_of(seed: int, name: str) -> int:
    """The seed of a model's part."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "little")


def _one(config: Common, name: str, changes: object) -> WorkloadConfig:
    if not isinstance(changes, Mapping):
        raise ConfigError(f"workload.per_model.{name}={changes!r}: give keys of the workload, or {{}}")
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    own |= {"kind": config.kind, "per_model": None}
    return from_mapping(dict(changes) if "kind" in changes else own | dict(changes))


def merge(parts: Mapping[str, Workload]) -> Workload:
    """All requests by arrival; ties by the order of the models."""
    given = list(parts.values())
    for name, part in parts.items():
        if part.release_after is not None or part.concurrency is not None or part.content is not None:
            raise ConfigError(f"workload.per_model.{name}: requests of several models arrive by the clock and share no "
                              "prompts: use poisson, burst, diurnal, long_context or a file of lengths")  # fmt: skip
    model = np.repeat(np.arange(len(given)), [part.num_requests for part in given])
    arrival = np.concatenate([part.arrival_ns for part in given])
    order = np.lexsort((model, arrival))
    counts = {key: sum(part.counts.get(key, 0) for part in given) for key in no_counts()}
    return Workload(
        name=" + ".join(part.name for part in given),
        arrival_ns=arrival[order],
        prompt_tokens=np.concatenate([part.prompt_tokens for part in given])[order],
        output_tokens=np.concatenate([part.output_tokens for part in given])[order],
        content=None, session=None, release_after=None, think_ns=None, concurrency=None,
        counts=counts,
        max_output_tokens=max(part.max_output_tokens for part in given),
        provenance="; ".join(f"{name}: {part.provenance}" for name, part in parts.items()),
        models=tuple(parts), model=model[order],
    )  # fmt: skip


def by_cluster(workload: Workload, names: tuple[str, ...]) -> Workload:
    """The workload with models numbered as the cluster numbers them; one line where they do not match."""
    if not names and not workload.models:
        return workload
    if not workload.models:
        hint = f"workload.per_model={{{names[0]}: {{}}, …}}"
        raise ConfigError(f"cluster.models={list(names)}: say who asks for which: {hint}")
    unknown = [name for name in workload.models if name not in names]
    if unknown:
        raise ConfigError(f"workload.per_model asks for {unknown[0]}, which is none of cluster.models={list(names)}")
    index = np.array([names.index(name) for name in workload.models])
    return replace(workload, models=names, model=index[workload.model])
