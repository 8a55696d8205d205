"""The lending side of an rManager: reservations first come, first served, granted at boundaries only; leases.

What a running step may grow into is not free, so a reservation interrupts it and is answered at its boundary. A
reservation that waits (for a request that no instance holds alone) stops admissions here until it is met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.types import Command
from systems.infinite_llm.hostpool import HostPool
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.messages import Answer, Message, Renew, Renewed, TryMoveKvcache
from systems.infinite_llm.rblock import Grant, LentTable

Tell = Callable[[int, Message, list[Command]], None]  # to the rManager of an instance


@dataclass(slots=True)
class Waiting:
    """A reservation not answered yet."""

    message: TryMoveKvcache
    expires_ns: int


class Creditor:
    """Owns the table of what its instance has lent."""

    def __init__(
        self, instance: int, lane: SpanLane | HostPool, lease_ns: int, keep: int, tell: Tell, cap: int | None = None
    ) -> None:
        self.instance = instance
        self.lane = lane
        self.lease_ns = lease_ns
        self.keep = keep  # free blocks that moves leave; admissions of giants may take all
        self.cap = lane.num_blocks if cap is None else cap  # blocks lent at most
        self.refuses = cap is not None  # v1: nobody waits here, not even for a giant
        self.frozen = False  # a repair is under way: lend nothing
        self.tell = tell
        self.lent = LentTable()
        self.queue: list[Waiting] = []

    def asked(self, now_ns: int, message: TryMoveKvcache, out: list[Command]) -> None:
        """try_move_kvcache: grant, refuse, or wait for the boundary."""
        if message.try_id in self.lent.grants:
            self.tell(message.debtor, Answer(message.try_id, True), out)  # its answer was lost
            return
        if any(item.message.try_id == message.try_id for item in self.queue):
            return
        queued = any(item.message.wait for item in self.queue) and not self.refuses
        if message.num_blocks > self.cap or self.frozen or (queued and not message.wait):
            self.tell(message.debtor, Answer(message.try_id, False), out)
            return
        self.queue.append(Waiting(message, now_ns + self.lease_ns))
        self.lane.interrupt(out)
        self.settle(now_ns, out)

    def settle(self, now_ns: int, out: list[Command]) -> None:
        """At a boundary: answer whom we can, in order of arrival."""
        if self.lane.busy:
            return
        while self.queue:
            message = self.queue[0].message
            room = min(self.lane.free - (0 if message.wait else self.keep), self.cap - self.lent.total)
            if message.num_blocks <= room and not self.frozen:
                grant = Grant(message.debtor, message.request_id, message.num_blocks, message.sequence,
                              now_ns + self.lease_ns)  # fmt: skip
                self.lane.lend(message.num_blocks)
                self.lent.lend(message.try_id, grant)
            elif message.wait and not self.refuses:
                break
            self.tell(message.debtor, Answer(message.try_id, message.try_id in self.lent.grants), out)
            del self.queue[0]
        self.lane.held_back = bool(self.queue)

    def released(self, now_ns: int, try_ids: tuple[int, ...], out: list[Command]) -> None:
        """The debtor gives back, or no longer waits."""
        self.queue = [item for item in self.queue if item.message.try_id not in try_ids]
        self._back(now_ns, sum(self.lent.take_back(try_id) for try_id in try_ids), out)

    def returned(self, now_ns: int, try_id: int, num_blocks: int, out: list[Command]) -> None:
        """The debtor has called some of a reservation home."""
        self._back(now_ns, self.lent.cut(try_id, num_blocks), out)

    def renewed(self, now_ns: int, message: Renew, out: list[Command]) -> None:
        """Leases run on; what the debtor should have named and did not lapses."""
        blocks = self.lent.renew(message.debtor, message.sequence, message.named, now_ns + self.lease_ns)
        if blocks is None:
            return
        named = dict(message.named)
        for item in self.queue:
            if item.message.try_id in named:
                item.expires_ns = now_ns + self.lease_ns
        self.queue = [item for item in self.queue
                      if item.message.debtor != message.debtor or item.message.try_id in named
                      or item.message.sequence > message.sequence]  # fmt: skip
        self._back(now_ns, blocks, out)
        self.tell(message.debtor, Renewed(self.instance, message.sequence), out)

    def tick(self, now_ns: int, out: list[Command]) -> None:
        """Leases end: their debtors have stopped using the blocks, or are dead."""
        self.queue = [item for item in self.queue if item.expires_ns > now_ns]
        self._back(now_ns, self.lent.expire(now_ns), out)

    def _back(self, now_ns: int, blocks: int, out: list[Command]) -> None:
        self.lane.free += blocks
        self.lane.lent -= blocks
        self.settle(now_ns, out)  # those who wait for a loan come before our own queue
        if not self.lane.busy:
            self.lane.held_back = bool(self.queue)
        elif self.queue:
            self.lane.interrupt(out)
        self.lane.poke(out)
