"""What a fleet and its planner say to each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from common.sched.lane import Seq
from common.sched.moving import Mode


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """`epoch_ns`: period of planning. `cooldown_ns`: an empty instance stops after it. `min_instances` stay."""

    epoch_ns: int = 500_000_000
    cooldown_ns: int = 10_000_000_000
    min_instances: int = 1
    watermark: float = 0.05


class Candidate(NamedTuple):
    """A decoding request that is not where it should be."""

    request_id: int
    src: int
    dst: int
    tokens: int
    urgent: bool  # its source cannot give every running request another block


class Planner(Protocol):
    """Where requests should be. `epoch` is told what changed; blocks of a request never shrink."""

    def epoch(self, departed: Sequence[int], grown: Mapping[int, int], arrived: Mapping[int, int]) -> Collection[int]:
        """Plan; returns the requests whose bin has changed."""
        ...

    def bin_of(self, request_id: int) -> int: ...

    def bins(self) -> Collection[int]:
        """Bins in use."""
        ...

    def charge(self, seq: Seq, blocks: int, oracle_tokens: int | None) -> int:
        """Blocks to plan with for a request that holds `blocks` now."""
        ...

    def modes(self, moves: Sequence[Candidate], busy: Mapping[int, int]) -> Mapping[int, Mode]:
        """How these go; whoever is missing waits. `busy`: tokens on their way in or out, by instance."""
        ...

    def hosted(self, bin_id: int, node: int) -> None:
        """A bin has an instance on this machine."""
        ...

    def detour(self, request_id: int, bin_id: int) -> bool:
        """Its instance is not up yet: may it go to that of another bin, which has the blocks? Who can migrate it later
        leaves the plan as it is."""
        ...


@dataclass
class FleetStats:
    """What planning did."""

    epochs: int = 0
    starts: int = 0
    stops: int = 0
    fallbacks: int = 0  # dispatched elsewhere because the planned instance was not up yet
