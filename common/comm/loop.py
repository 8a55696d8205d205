"""A worker's ear, mouth and hands: orders come in, answers and heartbeats go out, and one order is done at a time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from common.comm import messages as say
from common.comm.beside import Beside
from common.comm.copies import Arrival
from common.errors import ContractError, KVPlaneError

Handler = Callable[[Any, int], Any]  # (order, its number) -> what an answer says


class Mouth:
    """What a worker says to the policy process, from several threads; heartbeats by itself."""

    def __init__(self, connection: Any) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._beat: Callable[[], say.Beat] | None = None

    def answer(self, answer: say.Answer) -> None:
        """With a heartbeat."""
        self.tell(answer if self._beat is None else answer._replace(beat=self._beat()))

    def tell(self, what: say.Answer | say.Beat) -> None:
        """Send it. The policy process may be gone: then this one ends."""
        try:
            with self._lock:
                self._connection.send(what)
        except OSError:
            os._exit(1)

    def beats(self, beat: Callable[[], say.Beat], period_s: float) -> None:
        """A heartbeat every so often, and with each answer, from now on."""
        self._beat = beat

        def run() -> None:
            while True:
                time.sleep(period_s)
                self.tell(beat())

        threading.Thread(target=run, daemon=True).start()


Orders = SimpleQueue[tuple[int, Any, int | None]]  # sequence, order, attention asked for before (None: not an order)


class Ear:
    """Orders as they come in. When the policy process is gone this one ends at once, whatever it is in."""

    def __init__(self, connection: Any) -> None:
        self.orders: Orders = SimpleQueue()
        self.beside: Beside | None = None
        self.recalled: set[int] = set()  # numbers of iterations ordered ahead; who carries one out takes it from here
        self._early: list[tuple[int, Any]] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def start(self, beside: Beside) -> None:
        """There is somebody to sort them."""
        with self._lock:
            self.beside = beside
            for sequence, order in self._early:
                self._sort(sequence, order)

    def _sort(self, sequence: int, order: Any) -> None:
        assert self.beside is not None
        if isinstance(order, say.Recall):  # overtakes what it recalls, as far as it can
            self.recalled.add(order.number)
            return
        attends = self.beside.note(sequence, order)
        if attends is not None:
            self.orders.put((sequence, order, attends))

    def _read(self, connection: Any) -> None:
        try:
            order = None
            while not isinstance(order, say.Exit):  # after that the connection may close
                sequence, order = connection.recv()
                with self._lock:
                    if self.beside is None:
                        self._early.append((sequence, order))
                    else:
                        self._sort(sequence, order)
        except (EOFError, OSError):
            os._exit(1)


def carry_out(mouth: Mouth, sequence: int, order: Any, handler: Handler) -> None:
    """One order. A broken contract or a failure is answered too, and what follows is done all the same."""
    try:
        answer = say.Answer(sequence, handler(order, sequence))
    except ContractError as error:
        answer = say.Answer(sequence, None, str(error), contract=True)
    except Exception as error:  # whatever it is, it ends the run in one line, at the policy
        kind = "" if isinstance(error, KVPlaneError) else f"{type(error).__name__} in {type(order).__name__}: "
        answer = say.Answer(sequence, None, kind + (str(error).splitlines() or ["?"])[0])
    if isinstance(order, ANSWERED) or answer.error is not None:
        mouth.answer(answer)


def serve(ear: Ear, mouth: Mouth, handlers: Mapping[type, Handler], beside: Beside) -> None:
    """Orders one by one until `Exit`, and between them what has arrived."""
    while True:
        sequence, order, attends = ear.orders.get()
        if isinstance(order, say.Exit):
            return
        if attends is not None:
            beside.before(order, attends)
        carry_out(mouth, sequence, order, handlers[type(order)])
        if attends is not None:
            beside.after()


ANSWERED = (say.Setup, say.Stop, say.DropPages, Arrival, say.RunStage, say.Continue)
"""`Arrival` for `TakeCells` and `Load`."""
