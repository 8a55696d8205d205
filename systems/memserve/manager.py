"""The cluster manager (MemServe 4.4): who is a member, told by heartbeats.

It sees messages only. An instance that has been silent for `timeout_ns` is declared dead and may be started anew; one
that is heard of again joins. Every change, and the view itself once a period, is broadcast to the global scheduler, so
a lost broadcast costs a period and a doubled one nothing.
"""

from __future__ import annotations

from common.types import Command, Send


class ClusterManager:
    """See the module docstring."""

    def __init__(self, timeout_ns: int) -> None:
        self.timeout_ns = timeout_ns
        self.heard: dict[int, int] = {}  # member -> when it was last heard of
        self.declared = 0  # deaths
        self.epoch = 0

    def beat(self, now_ns: int, instance: int, out: list[Command]) -> None:
        """A heartbeat; the first one of an instance makes it a member."""
        new = instance not in self.heard
        self.heard[instance] = now_ns
        if new:
            self.broadcast(out)

    def check(self, now_ns: int, out: list[Command]) -> list[int]:
        """Once a period: members that fell silent."""
        silent = [instance for instance, heard in self.heard.items() if now_ns - heard > self.timeout_ns]
        for instance in silent:
            del self.heard[instance]
        self.declared += len(silent)
        self.broadcast(out)
        return silent

    def broadcast(self, out: list[Command]) -> None:
        """Tell the scheduler who is there."""
        self.epoch += 1
        out.append(Send("cm", "gs", ("members", self.epoch, tuple(sorted(self.heard)))))
