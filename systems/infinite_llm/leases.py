"""The borrower's record of its leases: what it renews at each creditor, and until when it may use what it has."""

from __future__ import annotations

from collections.abc import Callable

from common.types import Command
from systems.infinite_llm.creditor import Tell
from systems.infinite_llm.messages import Renew


class Leases:
    """Numbers every message to creditors, so that late ones are told from new ones."""

    def __init__(self, instance: int, lease_ns: int, tell: Tell) -> None:
        self.instance = instance
        self.lease_ns = lease_ns
        self.tell = tell
        self.acked: dict[int, int] = {}  # creditor -> when the last message that it confirmed was sent
        self._sent: dict[int, tuple[int, bool]] = {}  # renewal -> when, and whether it named anything
        self._open: dict[int, None] = {}  # creditors that may believe that we have something of theirs
        self._last: dict[int, int] = {}  # creditor -> the last message sent to it that it must answer
        self._sequence = 0

    def number(self, creditor: int) -> int:
        """Of the next reservation asked of a creditor."""
        self._sequence += 1
        self._open[creditor] = None
        self._last[creditor] = self._sequence
        return self._sequence

    def confirmed(self, creditor: int, sent_ns: int) -> None:
        """The creditor has answered what was sent then."""
        self.acked[creditor] = max(self.acked.get(creditor, 0), sent_ns)

    def renew(self, now_ns: int, named: Callable[[int], tuple[tuple[int, int], ...]], out: list[Command]) -> None:
        """All that is in use or asked for at each creditor; naming nothing says that a lost release was one."""
        for creditor in sorted(self._open):
            pieces = named(creditor)
            self._sequence += 1
            self._last[creditor] = self._sequence
            self._sent[self._sequence] = now_ns, bool(pieces)
            self.tell(creditor, Renew(self.instance, self._sequence, pieces), out)
        self._sent = {key: sent for key, sent in self._sent.items() if now_ns - sent[0] <= self.lease_ns}

    def renewed(self, creditor: int, sequence: int) -> None:
        """A creditor has confirmed a renewal; the last word between us may be that nothing is left."""
        if sequence in self._sent:
            sent_ns, named = self._sent[sequence]
            self.confirmed(creditor, sent_ns)
            if not named and sequence == self._last.get(creditor):
                self._open.pop(creditor, None)

    def lost(self, creditor: int) -> None:
        """It is dead, and its leases with it."""
        self.acked.pop(creditor, None)
        self._open.pop(creditor, None)
