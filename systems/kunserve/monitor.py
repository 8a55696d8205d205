"""Overload and calm: what running and queued requests need, against what there is. Defaults are the released code's.

The code votes for a drop when usage is at least 95% and queued blocks are at least the free ones. The paper counts the
head of the line into the demand; so a head that does not fit is a vote too, even where it is so large that usage stays
below the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Load(NamedTuple):
    """Of one group, in blocks of all layers. `base`: capacity with all parameters resident. `head`: of the queue."""

    used: int
    capacity: int
    base: int
    pending: int
    head: int


@dataclass(frozen=True, slots=True)
class Thresholds:
    """`*_polls`: how many polls in a row must agree. `min_pipeline_ns`: a pipeline stays at least so long."""

    poll_ns: int = 100_000_000
    usage: float = 0.95
    restore_usage: float = 0.5
    overload_polls: int = 1
    calm_polls: int = 10
    min_pipeline_ns: int = 2_000_000_000
    min_serving_ns: int = 1_000_000_000


def overloaded(load: Load, limits: Thresholds) -> bool:
    """Does a group have, or will it have at once, more than it can hold?"""
    free = load.capacity - load.used
    if not load.pending or load.pending < free:
        return False
    return load.used >= limits.usage * load.capacity or load.head > free


def calm(load: Load, limits: Thresholds) -> bool:
    """Would everything fit easily with the parameters back?"""
    return not load.pending and load.used < limits.restore_usage * load.base


class Monitor:
    """Counts agreeing polls per group, so that one sample decides nothing that it should not."""

    def __init__(self, limits: Thresholds) -> None:
        self.limits = limits
        self._hot: dict[int, int] = {}
        self._cool: dict[int, int] = {}

    def sample(self, group: int, load: Load) -> None:
        """One poll of a group."""
        self._hot[group] = self._hot.get(group, 0) + 1 if overloaded(load, self.limits) else 0
        self._cool[group] = self._cool.get(group, 0) + 1 if calm(load, self.limits) else 0

    def is_hot(self, group: int) -> bool:
        """Overloaded for long enough."""
        return self._hot.get(group, 0) >= self.limits.overload_polls

    def is_calm(self, group: int) -> bool:
        """Calm for long enough."""
        return self._cool.get(group, 0) >= self.limits.calm_polls

    def forget(self, group: int) -> None:
        """The group is no more, or starts anew."""
        self._hot.pop(group, None)
        self._cool.pop(group, None)
