"""What a fleet and its planner say to each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from common.options import Kind, Number, Whole, period_ms, share
from common.sched.lane import Seq
from common.sched.moving import Mode

FLEET: dict[str, Kind] = {
    "epoch_ms": period_ms(5e5),  # a run of which only timers are left for 600 s has stalled
    "cooldown_s": Number(high=1e6),
    "min_instances": Whole(0, 100_000),
    "watermark": share(0.9),
}


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """`epoch_ns`: period of planning. `cooldown_ns`: an empty instance stops after it. `min_instances` stay."""

    epoch_ns: int = 500_000_000
    cooldown_ns: int = 10_000_000_000
    min_instances: int = 1
    watermark: float = 0.05

    @staticmethod
    def of(given: Mapping[str, Any]) -> FleetConfig:
        """From options that were checked against `FLEET`."""
        return FleetConfig(
            epoch_ns=int(float(given.get("epoch_ms", 500)) * 1e6),
            cooldown_ns=int(float(given.get("cooldown_s", 10)) * 1e9),
            min_instances=given.get("min_instances", 1),
            watermark=float(given.get("watermark", 0.05)),
        )


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
