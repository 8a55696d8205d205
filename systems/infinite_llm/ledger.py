"""v1's global debt ledger: per instance its free space and what it has lent to whom, as of its last heartbeat.

It only advises. A candidate's "no" shows that it was out of date: the row is corrected and referrals to that instance
pause until it has been heard of again (the pause's length is ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from systems.infinite_llm.hostpool import HOST

NUM_CANDIDATES = 3


@dataclass(slots=True)
class Row:
    """One instance."""

    free: int = 0
    lent: dict[int, int] = field(default_factory=dict)  # debtor -> blocks
    heard_ns: int = 0
    paused_ns: int = -1  # no referrals before


class DebtLedger:
    """Rows by instance. `cap`: share of an instance's blocks that it lends at most."""

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self.rows: dict[int, Row] = {}

    def heard(self, now_ns: int, instance: int, free: int, debts: Mapping[int, int], full: bool) -> None:
        """A heartbeat's news."""
        row = self.rows.setdefault(instance, Row())
        if full:
            row.lent = {}
        row.free, row.heard_ns = free, now_ns
        for debtor, blocks in debts.items():
            if blocks:
                row.lent[debtor] = blocks
            else:
                row.lent.pop(debtor, None)

    def forget(self, instance: int) -> None:
        """It died: as a creditor at once; what it owes, its creditors will tell when its leases end."""
        self.rows.pop(instance, None)

    def refused(self, instance: int, until_ns: int) -> None:
        """It said no: nothing is free there, whatever the row says."""
        row = self.rows.get(instance)
        if row is not None:
            row.free, row.paused_ns = 0, until_ns

    def candidates(
        self, now_ns: int, debtor: int, capacity: Mapping[int, int], rank: Callable[[int], object]
    ) -> list[tuple[int, int]]:
        """Up to three creditors to ask in turn, and blocks that each may have; `rank` gives the locality. The cap is of
        GPUs: CPU rBlocks are for lending only."""
        found = []
        for instance, row in self.rows.items():
            limit = capacity.get(instance, 0) if instance >= HOST else int(self.cap * capacity.get(instance, 0))
            spare = min(row.free, limit - sum(row.lent.values()))
            if instance != debtor and spare > 0 and now_ns >= row.paused_ns:
                found.append((instance, spare))
        found.sort(key=lambda item: (rank(item[0]), -item[1], item[0]))
        return found[:NUM_CANDIDATES]

    def edges(self) -> dict[int, dict[int, int]]:
        """Debtor -> creditor -> blocks."""
        found: dict[int, dict[int, int]] = {}
        for creditor, row in self.rows.items():
            for debtor, blocks in row.lent.items():
                if debtor in self.rows:
                    found.setdefault(debtor, {})[creditor] = blocks
        return found

    def total(self) -> int:
        """All debt."""
        return sum(sum(row.lent.values()) for row in self.rows.values())
