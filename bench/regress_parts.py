"""The checks of `bench.regress` beside the matrix: micro-benchmarks and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import accuracy
from bench.micro import compare, pinned
from common.errors import ConfigError


@dataclass(frozen=True)
class Check:
    """`lines`: what moved. `rows`: every number. `notes`: what could not be checked.
    `bless`: None where nothing is new."""

    what: str
    lines: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: bool = False
    baseline: str = ""
    bless: Callable[[str], object] | None = None


def micro_check(quick: bool, current: Path = pinned.ROOT, reference: Path | None = None) -> Check:
    """Every case against the pinned commit's code; what cannot run here is a note, never a pass in silence."""
    bless = _pin
    if find_spec("torch") is None:
        return Check("0 micro-benchmarks", [], notes=["micro: torch is not installed, not checked"])  # nor blessed
    commit = pinned.read().get("commit")
    try:
        if reference is None and commit is None:
            return Check("0 micro-benchmarks", [], notes=["micro: no reference is pinned (bless one)"],
                         baseline=pinned.BASELINE.name, bless=bless)  # fmt: skip
        tree = reference or pinned.tree(str(commit))
    except ConfigError as error:
        return Check("0 micro-benchmarks", [], notes=[f"micro: {error}, not checked"],
                     baseline=pinned.BASELINE.name, bless=bless)  # fmt: skip
    found = compare.checked(current, tree, compare.QUICK_ROUNDS if quick else compare.ROUNDS)
    lines = [f"micro: {timing.name}: {timing.error}" for timing in found if timing.error]
    lines += [f"micro: {timing.line()}" for timing in found if timing.slower]
    rows = [{"name": f"micro: {timing.name}", "unit": "times the pinned reference", "value": timing.ratio}
            for timing in found if not timing.error]  # fmt: skip
    notes = [f"  {timing.line()}" for timing in found if not timing.error and not timing.slower]
    return Check(f"{len(found)} micro-benchmarks", lines, rows, notes, baseline=pinned.BASELINE.name,
                 bless=bless if lines else None)  # fmt: skip


def _pin(reason: str) -> object:
    return pinned.pin(reason)


def accuracy_check(quick: bool) -> Check:
    """Against what was measured, where it is at hand. What raises is named: the other checks are worth knowing."""
    try:
        found, absent = accuracy.parts(quick)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return Check("0 parts of accuracy", [f"accuracy: raised {type(error).__name__}: {text}"], broken=True)
    lines = accuracy.worse(found, accuracy.read()["parts"])
    rows = [{"name": f"accuracy: {name}", "unit": "share", "value": part["error"]} for name, part in found.items()]
    return Check(f"{len(found)} parts of accuracy no worse, errors", lines, rows, absent,
                 baseline=accuracy.BASELINE.name,
                 bless=(lambda reason: accuracy.bless(found, reason)) if found else None)  # fmt: skip
