"""What serving others costs a creditor: its own iterations that were slowed by remote attention, and time it gave.

Rows are pieces of about a second per instance. An iteration is slowed by the share of the instance's time that remote
work takes when it is priced (see `simremote.creditor_load`); without that it would have taken `busy - slowed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.executors.simlane import SimLane
from common.record import ServingColumns

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor

PIECE_NS = 1_000_000_000
FIELDS = ("iterations", "busy_ns", "slowed_ns", "tokens", "token_ns", "token_slowed_ns", "served_ns")


class Serving:
    """Sums per instance, in ns; `tokens` are those of the instance's own decoding requests."""

    def __init__(self, columns: ServingColumns) -> None:
        self.columns = columns
        self._begin: dict[int, int] = {}
        self._end: dict[int, int] = {}
        self._sums: dict[int, list[int]] = {}

    def iterated(self, executor: SimExecutor, lane: SimLane, start: int, now: int, decodes: int) -> None:
        """An iteration of a lane is complete: it was slowed as a creditor's, or made creditors work."""
        took = now - start
        for instance, slowed in lane.slowed:
            self._add(instance, start, now, (1, took, slowed, decodes, decodes * took, decodes * slowed, 0))
        for instance in executor.control.creditors.get(lane.id, ()):
            share = executor.instances[instance].remote_load.get(lane.id, 0.0)
            self._add(instance, start, now, (0, 0, 0, 0, 0, 0, int(share * took)))

    def _add(self, instance: int, start: int, now: int, amounts: tuple[int, ...]) -> None:
        sums = self._sums.get(instance)
        if sums is None:
            self._begin[instance] = start
            sums = self._sums[instance] = [0] * len(FIELDS)
        for index, amount in enumerate(amounts):
            sums[index] += amount
        self._end[instance] = now
        if now - self._begin[instance] >= PIECE_NS:
            self._write(instance)

    def _write(self, instance: int) -> None:
        columns = self.columns
        columns.start_ns.append(self._begin.pop(instance))
        columns.end_ns.append(self._end.pop(instance))
        columns.instance.append(instance)
        for name, value in zip(FIELDS, self._sums.pop(instance)):
            getattr(columns, name).append(value)

    def close(self) -> None:
        """Write what is not yet written."""
        for instance in list(self._sums):
            self._write(instance)
