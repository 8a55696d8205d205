"""What an instance tells the scheduler, over messages that may be late, lost or doubled (ours: the paper has no such
protocol).

Every message is numbered within a start of its instance. The scheduler hears each number once and acknowledges, once a
heartbeat, what it has heard; the instance keeps a message until then and says it again with every heartbeat from the
second on. So a lost response costs a few heartbeats, and neither load nor cached prompts stay wrong in the scheduler's
view. A message also says below which number nothing is kept any more: a scheduler that took the instance for dead in
between catches up by it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from common.types import Command, Send

PATIENCE = 2  # heartbeats after which a message that is not acknowledged is said again
WINDOW = 256  # where nothing is kept: messages later than so many others count as lost


class Ack(NamedTuple):
    """Every number below `upto` has been heard, and these beyond."""

    upto: int
    beyond: tuple[int, ...]


class Outbox:
    """The instance's end. `start`: its how manieth start this is; `keep` False: nothing is said twice."""

    def __init__(self, instance: int, start: int, keep: bool) -> None:
        self.instance = instance
        self.start = start
        self.num_again = 0
        self._keep = keep
        self._number = 0
        self._beats = 0
        self._kept: dict[int, tuple[int, tuple[Any, ...]]] = {}  # number -> heartbeats by then, message; in order

    def __len__(self) -> int:
        """Messages that are not acknowledged."""
        return len(self._kept)

    def say(self, message: tuple[Any, ...], out: list[Command]) -> None:
        """`message`: kind, request, and what belongs to it."""
        number, self._number = self._number, self._number + 1
        if self._keep:
            self._kept[number] = self._beats, message
        self._send(number, message, out)

    def beat(self, out: list[Command]) -> None:
        """A heartbeat has passed: say again what has waited too long."""
        self._beats += 1
        for number, (since, message) in self._kept.items():
            if self._beats - since >= PATIENCE:
                self.num_again += 1
                self._send(number, message, out)

    def acknowledged(self, upto: int, beyond: tuple[int, ...]) -> None:
        """These need not be kept."""
        for number in [number for number in self._kept if number < upto or number in beyond]:
            del self._kept[number]

    def _send(self, number: int, message: tuple[Any, ...], out: list[Command]) -> None:
        base = next(iter(self._kept), number) if self._keep else max(0, number - WINDOW)
        kind, *what = message
        out.append(Send(f"i{self.instance}", "gs", (kind, self.instance, self.start, number, base, *what)))


class Inbox:
    """The scheduler's end, for one start of one instance."""

    def __init__(self) -> None:
        self.upto = 0  # every number below has been heard, or is known not to matter
        self.beyond: set[int] = set()
        self.owed = False  # has anything been heard since the last acknowledgement?

    def hear(self, number: int, base: int) -> bool:
        """False: it was heard before. Nothing below `base` will be said again."""
        self.owed = True
        new = number >= max(self.upto, base) and number not in self.beyond
        if new:
            self.beyond.add(number)
        if base > self.upto:
            self.upto = base
            self.beyond = {one for one in self.beyond if one >= base}
        while self.upto in self.beyond:
            self.beyond.discard(self.upto)
            self.upto += 1
        return new

    def acknowledge(self) -> Ack:
        """What has been heard so far."""
        self.owed = False
        return Ack(self.upto, tuple(sorted(self.beyond)))
