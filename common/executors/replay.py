"""Replays a recorded log: the policy sees the same events at the same times, and must give the same commands.

So a run of real engines, whose timing no one can repeat, can still be held against its policy's code (parity).
"""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import ContractError
from common.log import Line, Submitted, encode
from common.types import Command, Event


class ReplayExecutor:
    """Delivers the events of a log; ContractError at the first command that is missing, other, or too many."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = iter(lines)
        self._next = next(self._lines, None)
        self._where = "before any event"
        self._num_events = 0
        self._num_commands = 0  # since the last event

    def submit(self, command: Command) -> None:
        """Compare a command with the recorded one."""
        self._num_commands += 1
        line = self._next
        if not isinstance(line, Submitted):
            raise ContractError(f"{self._where}: command {self._num_commands} was not recorded: {command}")
        if encode(command) != encode(line.command):
            raise ContractError(
                f"{self._where}: command {self._num_commands} is {command}, recorded was {line.command}"
                f"{_first_difference(command, line.command)}"
            )
        self._next = next(self._lines, None)

    def poll(self) -> tuple[int, Event] | None:
        """The next event of the log. None at its end."""
        line = self._next
        if isinstance(line, Submitted):
            raise ContractError(f"{self._where}: command {self._num_commands + 1} is missing: {line.command}")
        if line is None:
            return None
        self._num_events += 1
        self._num_commands = 0
        self._where = f"event {self._num_events} ({type(line.event).__name__} at {line.now_ns} ns)"
        self._next = next(self._lines, None)
        return line.now_ns, line.event


def _first_difference(command: Command, recorded: Command) -> str:
    """The first field that differs, when both are of one kind."""
    if type(command) is not type(recorded):
        return ""
    for name, mine, theirs in zip(command._fields, command, recorded):
        if encode(mine) != encode(theirs):
            return f" (first difference: {name} = {mine!r}, recorded {theirs!r})"
    return ""
