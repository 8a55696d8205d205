"""The cluster manager (MemServe 4.4): who is a member, told by heartbeats.

It sees messages only. An instance that has been silent for `timeout_ns` is declared dead and may be started anew; one
that is heard of again joins. A heartbeat says how often its instance has been started, so one that died and came back
between two looks is seen to be another. Every change, and the view itself once a period, is broadcast to the global
scheduler: a lost broadcast costs a period, a doubled or overtaken one nothing. A manager that died and is back knows
nobody: it listens for `timeout_ns` before it says who is there.
"""

from __future__ import annotations

from typing import NamedTuple

from common.types import Command, Send


class Heard(NamedTuple):
    """When a member was last heard of, and its how manieth start it was then."""

    at_ns: int
    start: int


class ClusterManager:
    """See the module docstring."""

    def __init__(self, timeout_ns: int) -> None:
        self.timeout_ns = timeout_ns
        self.heard: dict[int, Heard] = {}
        self.declared = 0  # deaths
        self.epoch = 0
        self.listens_until_ns = 0

    def back(self, now_ns: int) -> None:
        """It died, and all that it knew with it. Epochs go on above any that it can have used."""
        self.heard = {}
        self.epoch = now_ns
        self.listens_until_ns = now_ns + self.timeout_ns

    def beat(self, now_ns: int, instance: int, start: int, out: list[Command]) -> None:
        """A heartbeat; the first one of an instance, or of a new start of it, makes it a member."""
        known = self.heard.get(instance)
        if known is not None and start < known.start:
            return  # from before its death
        self.heard[instance] = Heard(now_ns, start)
        if (known is None or start > known.start) and now_ns >= self.listens_until_ns:
            self.broadcast(out)

    def check(self, now_ns: int, out: list[Command]) -> list[int]:
        """Once a period: members that fell silent."""
        if now_ns < self.listens_until_ns:
            return []
        silent = [instance for instance, heard in self.heard.items() if now_ns - heard.at_ns > self.timeout_ns]
        for instance in silent:
            del self.heard[instance]
        self.declared += len(silent)
        self.broadcast(out)
        return silent

    def broadcast(self, out: list[Command]) -> None:
        """Tell the scheduler who is there."""
        self.epoch += 1
        view = tuple((instance, heard.start) for instance, heard in sorted(self.heard.items()))
        out.append(Send("cm", "gs", ("members", self.epoch, view)))
