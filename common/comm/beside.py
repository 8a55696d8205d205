"""Remote attention that a worker does for others, beside its own steps: a thread, and what may overtake what.

Attention for others waits for every order before it but iterations, and those wait for it where they change memory. In
the global order nothing waits for what comes later, so nobody waits in a circle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from common.comm import messages as say

STEPS = (say.RunStage, say.Continue, say.SendHidden, say.SendCells, say.SendLayers)
"""They neither wait for it nor hold it up."""


class Beside:
    """The reader of orders calls `note` for each in its order; the worker's loop `before` and `after` each."""

    def __init__(self, attend: Callable[[int, Any], None]) -> None:
        self._attend = attend
        self._asked: SimpleQueue[tuple[int, Any, int]] = SimpleQueue()
        self._change = threading.Condition()
        self._noted = self._barrier = self._done = 0  # orders of the loop: noted, the last that counts, and done
        self._attends = self._attended = 0
        threading.Thread(target=self._run, daemon=True).start()

    def note(self, sequence: int, order: Any) -> int | None:
        """An order came. None: it is attention, and taken care of; else how much attention was asked for before."""
        if isinstance(order, say.Attend):
            self._attends += 1
            self._asked.put((sequence, order, self._barrier))
            return None
        self._noted += 1
        if not isinstance(order, STEPS):
            self._barrier = self._noted
        return self._attends

    def before(self, order: Any, attends: int) -> None:
        """The loop is about to do an order that came after so much attention."""
        if not isinstance(order, STEPS):
            with self._change:
                self._change.wait_for(lambda: self._attended >= attends)

    def after(self) -> None:
        """The loop has done its next order."""
        with self._change:
            self._done += 1
            self._change.notify_all()

    def _run(self) -> None:
        while True:
            sequence, order, barrier = self._asked.get()
            with self._change:
                self._change.wait_for(lambda: self._done >= barrier)  # noqa: B023
            self._attend(sequence, order)
            with self._change:
                self._attended += 1
                self._change.notify_all()
