"""v1's gManager (`mode=debt`): the global debt ledger, candidates for whoever needs space, and repairs (DGFM).

No plans: it speaks when it is asked, or when it sees a cycle of debt. That one giant at a time is referred stays ours.
"""

from __future__ import annotations

from common.types import Command, MessageArrived, Tier
from systems.infinite_llm.dgfm import Repair, find_cycle
from systems.infinite_llm.gmanager import GManager
from systems.infinite_llm.hostpool import HOST, where
from systems.infinite_llm.ledger import DebtLedger
from systems.infinite_llm.messages import Frozen, Heartbeat, Need, Offer, Recalled, Resync
from systems.infinite_llm.planner import Planner
from systems.infinite_llm.settings import Settings


class DebtGManager(GManager):
    """Heartbeats, sequence numbers and restarts are the base's."""

    def __init__(
        self, instances: tuple[int, ...], nodes: dict[int, int], settings: Settings, planner: Planner, epoch: int = 0
    ) -> None:
        super().__init__(instances, nodes, settings, planner, epoch)
        self.ledger = DebtLedger(settings.lend_cap)
        self.hosts: dict[int, int] = {}  # CPU rBlocks, by the number of their creditor
        self.repair: Repair | None = None
        self.repairs: list[tuple[int, int]] = []  # (length of the cycle, blocks that each called home) of finished ones
        self._number = epoch << 32  # a successor's repairs are not mistaken for its predecessor's
        self._repaired_ns = 0
        self._start = 0
        self._pause = 1  # periods until the next repair may begin

    def message(self, now_ns: int, event: MessageArrived, out: list[Command]) -> None:
        """As the base's, and DGFM's answers."""
        message = event.payload
        if self.repair is not None and isinstance(message, Frozen):
            self.repair.frozen(now_ns, message, out)
        elif self.repair is not None and isinstance(message, Recalled):
            self.repair.recalled(now_ns, message, out)
        elif isinstance(message, Need):
            for instance in message.refused:
                self.ledger.refused(instance, now_ns + self.settings.period_ns)
        super().message(now_ns, event, out)
        self._repairs(now_ns, out)

    def left(self, instance: int) -> None:
        """An instance died, and the repair that it was part of is given up (freezes end by themselves)."""
        super().left(instance)
        self.ledger.forget(instance)
        self.ledger.forget(HOST + instance)
        self.hosts.pop(HOST + instance, None)
        if self.repair is not None and instance in self.repair.cycle:
            self.repair = None

    def took(self, now_ns: int, message: Heartbeat) -> None:
        """The creditor's column of the ledger."""
        self.ledger.heard(now_ns, message.instance, message.load.free, dict(message.debts), message.full)
        blocks, free = message.host
        if blocks:
            self.hosts[HOST + message.instance] = blocks
            self.ledger.heard(now_ns, HOST + message.instance, free, dict(message.host_debts), True)

    # ------------------------------------------------------------ advice

    def offer_relief(self, now_ns: int, need: Need, out: list[Command]) -> None:
        """Candidates: the first that grants ends the search."""
        self._tell(need.instance, Offer(need.request_id, False, self._candidates(now_ns, need)), out)

    def _candidates(self, now_ns: int, need: Need) -> tuple[tuple[int, int], ...]:
        capacity = {instance: load.capacity for instance, load in self.loads.items()}
        node = self.nodes[need.instance]

        def locality(creditor: int) -> tuple[bool, bool, bool]:
            """GPUs first; of host memories the debtor's own; then those of its node."""
            instance, tier = where(creditor)
            host = tier is Tier.DRAM
            return host, host and instance != need.instance, self.nodes[instance] != node

        found = self.ledger.candidates(now_ns, need.instance, {**capacity, **self.hosts}, locality)
        parts, left = [], need.best
        for instance, spare in found:
            parts.append((instance, min(spare, left)))
            if need.admission:  # a giant takes from each what it can have
                left -= parts[-1][1]
                if left <= 0:
                    break
        return tuple(parts)

    def _next_admission(self, now_ns: int, out: list[Command]) -> None:
        """The first giant in line is told candidates, again and again until it is settled."""
        if self.token is not None and now_ns - self.token[2] > 5 * self.settings.period_ns:
            self.token = None
        if self.token is None and self.needs and len(self.loads) == len(self.members):
            need = self.needs.popleft()
            self.token = (need.request_id, need.instance, now_ns)
            parts = self._candidates(now_ns, need)
            if parts:
                self._tell(need.instance, Offer(need.request_id, True, parts), out)
            else:  # perhaps the ledger is wrong: an idle instance has nothing to tell unless it is asked
                for instance in self.members:
                    self._tell(instance, Resync(), out)

    # ------------------------------------------------------------ repairs

    def _repairs(self, now_ns: int, out: list[Command]) -> None:
        settings = self.settings
        if self.repair is not None and not self.repair.over and now_ns - self._repaired_ns >= settings.period_ns:
            self._repaired_ns = now_ns
            self.repair.tick(now_ns, 4 * settings.period_ns, out)
        if self.repair is not None and self.repair.over:
            self.repairs.append((len(self.repair.cycle), self.repair.moved))
            self._pause = 1 if self.repair.moved else 4  # what cannot be called home now may be later
            self.repair, self._repaired_ns = None, now_ns
        quiet = now_ns - self._repaired_ns
        if not settings.dgfm or self.repair is not None or quiet < self._pause * settings.period_ns:
            return
        cycle = find_cycle(self.ledger.edges(), settings.dgfm_threshold, self._start)
        if cycle:
            self._start = cycle[0] + 1
            self._number += 1
            self._repaired_ns = now_ns
            self.repair = Repair(self._number, cycle, settings.dgfm_threshold, now_ns, self._tell)
            self.repair.start(out)
