"""The two sides of the contract. Policies decide, executors do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from common.types import Command, Event


class Gauge(NamedTuple):
    """What a policy's ledger says of one instance, for the timeline. Blocks are of the whole model's layers."""

    instance: int
    running: int
    waiting: int
    kv_used_blocks: int
    kv_capacity_blocks: int
    kv_cached_blocks: int = 0
    kv_lent_blocks: int = 0
    kv_borrowed_blocks: int = 0
    param_bytes: int = 0


class Policy(Protocol):
    """A sans-IO state machine: no torch, no clock, no I/O, no randomness of its own."""

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React to one event; commands take effect in the order given."""
        ...

    def gauges(self) -> Iterable[Gauge]:
        """The ledger's counts now, one row per instance. Must not change state."""
        ...


class Executor(Protocol):
    """Carries out commands in simulated, emulated or real time."""

    def submit(self, command: Command) -> None:
        """Accept a command; never blocks. Raises ContractError on a command that no state allows."""
        ...

    def poll(self) -> tuple[int, Event] | None:
        """The next event in time order (may wait). None: the source is exhausted and nothing lives."""
        ...
