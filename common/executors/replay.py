"""Replays a recorded log: the policy sees the same events at the same times, and must give the same commands.

So a run of real engines, whose timing no one can repeat, can still be held against its policy's code (parity).
`python -m bench.replay` does it for the folder of a run.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import ContractError
from common.log import Line, Submitted, encode
from common.types import Command, Event

SHOWN = 300  # characters of a command or a field: a step may add a thousand requests


class Difference(ContractError):
    """The policy gives another command than the recorded one."""


class ReplayExecutor:
    """Delivers the events of a log; Difference at the first command that is missing, other, or too many.

    `partial`: the log of a run that did not complete. The commands after its last event may be missing in it.
    """

    def __init__(self, lines: Iterable[Line], partial: bool = False) -> None:
        self._lines = iter(lines)
        self._partial = partial
        self._next = next(self._lines, None)
        self._since = 0  # commands since the last event
        self.where = "before any event"
        self.num_events = 0  # delivered
        self.num_commands = 0  # found to be the recorded ones

    def submit(self, command: Command) -> None:
        """Compare a command with the recorded one."""
        self._since += 1
        line = self._next
        if line is None and self._partial:
            return
        if not isinstance(line, Submitted):
            raise Difference(f"{self.where}: command {self._since} was not recorded: {_shown(command)}")
        if encode(command) != encode(line.command):
            raise Difference(
                f"{self.where}: command {self._since} is {_shown(command)}, recorded was {_shown(line.command)}"
                f"{_first_difference(command, line.command)}"
            )
        self.num_commands += 1
        self._next = next(self._lines, None)

    def poll(self) -> tuple[int, Event] | None:
        """The next event of the log. None at its end."""
        line = self._next
        if isinstance(line, Submitted):
            raise Difference(f"{self.where}: command {self._since + 1} is missing: {_shown(line.command)}")
        if line is None:
            return None
        self.num_events += 1
        self._since = 0
        self.where = f"event {self.num_events} ({type(line.event).__name__} at {line.now_ns} ns)"
        self._next = next(self._lines, None)
        return line.now_ns, line.event


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def _first_difference(command: Command, recorded: Command) -> str:
    """The first field that differs, when both are of one kind."""
    if type(command) is not type(recorded):
        return ""
    for name, mine, theirs in zip(command._fields, command, recorded):
        if encode(mine) != encode(theirs):
            return f" (first difference: {name} = {_shown(mine)}, recorded {_shown(theirs)})"
    return ""
