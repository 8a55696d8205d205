"""What conf/arena declares: arenas, and the search that every system gets. Nothing here runs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import yaml

from common.config import CONF
from common.errors import ConfigError
from workloads.paths import data_root

FOLDER = CONF / "arena"
ORACLES = ("infinite_kv",)  # shown as bounds: no rank, no win
TIE = 3  # decimals of an attainment that count
Axes = dict[str, list[Any]]


@dataclass(frozen=True)
class Objective:
    """What a configuration is chosen by. `slo_attainment`: the highest; `gpu_seconds`: the fewest, among those whose
    attainment is at least `floor` on every tuning seed, else the highest attainment."""

    metric: str
    floor: float = 0.0

    def score(self, summaries: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
        """Higher is better, in order: of means over seeds; ties are broken by mean JCT."""
        mets = [float(one["slo_attainment"] or 0.0) for one in summaries]
        met = round(fmean(mets), TIE)
        jct = -fmean(float(one["mean_e2el_ms"] or float("inf")) for one in summaries)
        if self.metric == "slo_attainment":
            return met, jct, 0.0
        if round(min(mets), TIE) < self.floor:
            return 0.0, met, jct
        return 1.0, -fmean(float(one["gpu_seconds"]) for one in summaries), jct


@dataclass(frozen=True)
class Arena:
    """One workload on the common cluster. `axes`: by system, in the order in which they are searched."""

    name: str
    question: str
    common: tuple[str, ...]
    objective: Objective
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    axes: Mapping[str, Axes]
    needs: str | None
    window_s: Mapping[str, float] | None

    @property
    def present(self) -> bool:
        """Whether its trace, if it needs one, is in the data folder."""
        return self.needs is None or (data_root() / self.needs).is_file()

    def overrides(self, system: str, own: Mapping[str, Any], seed: int) -> list[str]:
        """The configuration of one run."""
        keys = [f"{key}={value}" for key, value in own.items()]
        window = []
        if self.window_s:
            begin = self.window_s["start"] + seed * self.window_s["step"]
            window = [f"workload.window_s=[{begin:g},{begin + self.window_s['length']:g}]"]
        return [*self.common, *window, f"system={system}", *keys, f"seed={seed}"]

    def num_search(self, system: str) -> int:
        """Runs that the search of one system takes, the default included."""
        return len(self.tuning_seeds) * (1 + sum(len(values) for values in self.axes[system].values()))


def names() -> tuple[str, ...]:
    """Every declared arena, the four common ones first."""
    first = ("burst", "long_context", "sessions", "diurnal")
    found = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "search")
    return (*(name for name in first if name in found), *(name for name in found if name not in first))


def load(name: str) -> Arena:
    """One arena; ConfigError where there is none."""
    if name not in names():
        raise ConfigError(f"arena {name} is not declared; there are {', '.join(names())}")
    shared, own = (yaml.safe_load((FOLDER / f"{stem}.yaml").read_text(encoding="utf-8")) for stem in ("search", name))
    slo = own.get("slo", shared["slo"])
    targets = [f"slo.{key}={value}" for key, value in slo.items()]
    axes = {system: {**axes, **(own.get("axes", {}) if system in own.get("static", ()) else {})}
            for system, axes in shared["axes"].items()
            if system in own.get("systems", shared["axes"])}  # fmt: skip
    return Arena(
        name, own["question"], (*shared["common"], *own["workload"], *targets), Objective(**own["objective"]),
        tuple(own.get("seeds", shared["seeds"])), tuple(own.get("tuning_seeds", shared["tuning_seeds"])), axes,
        own.get("needs"), own.get("window_s"),
    )  # fmt: skip
