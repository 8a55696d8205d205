"""DGFM (v1): a cycle of debt is found, its instances freeze, and the same number of blocks comes home along it.

Every instance of a cycle of k then holds w more blocks of its own and w fewer of its debtor's: nobody's use changes,
and total debt falls by k * w. Where memory is full, the free slots of one instance are the bounce buffer: its blocks
come home first, which frees as many at the next. Notes on the paper walk from a random node; the start here rotates,
for runs must repeat. Freezes end by themselves if the gManager dies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.types import Command
from systems.infinite_llm.messages import Freeze, Frozen, Message, Recall, Recalled, Unfreeze

Edges = Mapping[int, Mapping[int, int]]  # debtor -> creditor -> blocks


def find_cycle(edges: Edges, threshold: int, start: int = 0) -> tuple[int, ...]:
    """Debtors in order, each owing at least `threshold` to the next and the last to the first; () if there is none."""
    heavy = {debtor: [creditor for creditor in sorted(row) if row[creditor] >= threshold and creditor != debtor]
             for debtor, row in edges.items()}  # fmt: skip
    nodes = sorted(heavy)
    first = next((index for index, node in enumerate(nodes) if node >= start), 0)
    cleared: dict[int, None] = {}  # no cycle goes through these
    for root in nodes[first:] + nodes[:first]:
        path: dict[int, None] = {root: None}
        ahead = [iter(heavy[root])]
        while ahead:
            creditor = next(ahead[-1], None)
            if creditor is None:
                cleared[path.popitem()[0]] = None
                ahead.pop()
            elif creditor in path:
                cycle = list(path)
                return tuple(cycle[cycle.index(creditor) :])
            elif creditor in heavy and creditor not in cleared:
                path[creditor] = None
                ahead.append(iter(heavy[creditor]))
    return ()


def cancel(edges: Edges, cycle: tuple[int, ...]) -> tuple[dict[int, dict[int, int]], int]:
    """The ledger after a pass over a cycle: its smallest edge is subtracted from each. Returns that number as well."""
    after = {debtor: dict(row) for debtor, row in edges.items()}
    pairs = list(zip(cycle, cycle[1:] + cycle[:1]))
    blocks = min(after[debtor][creditor] for debtor, creditor in pairs)
    for debtor, creditor in pairs:
        after[debtor][creditor] -= blocks
        if not after[debtor][creditor]:
            del after[debtor][creditor]
    return after, blocks


class Repair:
    """One pass over one cycle, at the gManager. `over` when it has ended, however it ended."""

    def __init__(self, number: int, cycle: tuple[int, ...], threshold: int, now_ns: int,
                 tell: Callable[[int, Message, list[Command]], None]) -> None:  # fmt: skip
        self.number = number
        self.cycle = cycle
        self.threshold = threshold
        self.heard_ns = now_ns
        self.tell = tell
        self.over = False
        self.left = 0  # blocks that still are to come home, of each instance
        self.balanced = True  # did the same number come home everywhere?
        self.moved = 0  # blocks that came home, of each instance
        self._frozen: dict[int, Frozen] = {}
        self._turn = 0
        self._slot = 0  # blocks on their way around in this turn
        self._order: list[int] = []  # who recalls next in this turn, first to last
        self._told: Recall | None = None

    def start(self, out: list[Command]) -> None:
        """Freeze all."""
        for debtor in self.cycle:
            self.tell(debtor, Freeze(self.number, self.creditor(debtor)), out)

    def creditor(self, debtor: int) -> int:
        """The next in the cycle."""
        return self.cycle[(self.cycle.index(debtor) + 1) % len(self.cycle)]

    def frozen(self, now_ns: int, message: Frozen, out: list[Command]) -> None:
        """An instance stands still, and tells what it can call home."""
        if message.repair != self.number or message.instance not in self.cycle or message.instance in self._frozen:
            return
        self.heard_ns = now_ns
        self._frozen[message.instance] = message
        if len(self._frozen) < len(self.cycle):
            return
        self.left = min(answer.num_blocks for answer in self._frozen.values())
        if self.left < self.threshold:
            self.end(out)
        else:
            self._next_turn(out)

    def _next_turn(self, out: list[Command]) -> None:
        """Around once, as many blocks as the instance with the most free ones has room for."""
        first = max(self.cycle, key=lambda i: (self._frozen[i].free, -i))
        self._slot = min(self.left, self._frozen[first].free)
        if self._slot <= 0:
            self.end(out)
            return
        at = self.cycle.index(first)
        self._order = [*self.cycle[at:], *self.cycle[:at]]
        self._ask(out)

    def _ask(self, out: list[Command]) -> None:
        debtor = self._order[0]
        self._turn += 1
        self._told = Recall(self.number, self._turn, self.creditor(debtor), self._slot)
        self.tell(debtor, self._told, out)

    def recalled(self, now_ns: int, message: Recalled, out: list[Command]) -> None:
        """One instance is done: its creditor has room now. If fewer blocks came, fewer go around."""
        if message.repair != self.number or message.turn != self._turn or self.over or not self._order:
            return
        self.heard_ns = now_ns
        if message.num_blocks < self._slot:
            self.balanced &= len(self._order) == len(self.cycle)
            self._slot = message.num_blocks
        if not self._slot:
            self.end(out)
            return
        del self._order[0]
        if self._order:
            self._ask(out)
            return
        self.left -= self._slot
        self.moved += self._slot
        if self.left > 0:
            self._next_turn(out)
        else:
            self.end(out)

    def tick(self, now_ns: int, patience_ns: int, out: list[Command]) -> None:
        """Repeat what may have been lost; give up after a silence."""
        if self.over:
            return
        if now_ns - self.heard_ns > patience_ns:
            self.end(out)
        else:
            self.start(out)  # this keeps them frozen
            if self._told is not None:
                self.tell(self._order[0], self._told, out)

    def end(self, out: list[Command]) -> None:
        """Unfreeze all."""
        self.over = True
        for debtor in self.cycle:
            self.tell(debtor, Unfreeze(self.number), out)
