"""Copies between workers, beside whatever the worker computes: in pieces, a bounded number of them on their way.

A thread sends and another receives, both in the global order of the copies, so that the oldest copy of all can always
go on. What has come waits in a buffer of its own until the worker puts it where it belongs, between two orders."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.comm.peers import Peers
from common.errors import KVPlaneError

WINDOW = 2  # pieces of copies that a worker has on their way


class Arrival(NamedTuple):
    """A copy of this number has come, or its source was lost, or something went wrong (`error`). `put` is for the
    worker to call, between two orders; it returns the answer."""

    number: int
    put: Callable[[], Any]
    error: str | None = None


class Copies:
    """Both threads. `deliver` gets each arrival, in the receiving thread."""

    def __init__(self, peers: Peers, piece_bytes: int, deliver: Callable[[Arrival], None]) -> None:
        self.peers, self.piece_bytes, self._deliver = peers, piece_bytes, deliver
        self._out: SimpleQueue[tuple[Tensor, int, int]] = SimpleQueue()
        self._in: SimpleQueue[tuple[int, Callable[[], Callable[[], Any]]]] = SimpleQueue()
        for target in (self._send, self._receive):
            threading.Thread(target=target, daemon=True).start()

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """Runs of bytes of a contiguous tensor."""
        return list(torch.split(tensor.view(-1).view(torch.uint8), self.piece_bytes))

    def send(self, tensor: Tensor, to: int, number: int) -> None:
        """A contiguous tensor, which is nobody else's from now on."""
        self._out.put((tensor, to, number))

    def take(self, number: int, fetch: Callable[[], Callable[[], Any]]) -> None:
        """`fetch` is called in the receiving thread, and returns what to put."""
        self._in.put((number, fetch))

    def receive(self, tensor: Tensor, source: int, number: int) -> None:
        """Fill a contiguous tensor; in the receiving thread. PeerLost."""
        for piece in self.pieces(tensor):
            self.peers.receive("copies", piece, source, number)

    def _send(self) -> None:
        flying: deque[tuple[Any, Tensor]] = deque()
        while True:
            tensor, to, number = self._out.get()
            for piece in self.pieces(tensor):
                work = self.peers.start("copies", piece, to, number)
                if work is None:
                    break
                flying.append((work, piece))
                while len(flying) >= WINDOW:
                    _wait(flying.popleft()[0])

    def _receive(self) -> None:
        while True:
            number, fetch = self._in.get()
            try:
                self._deliver(Arrival(number, fetch()))
            except (KVPlaneError, RuntimeError) as error:
                self._deliver(Arrival(number, _nothing, (str(error).splitlines() or ["?"])[0]))


def _wait(work: Any) -> None:
    with suppress(RuntimeError):  # the receiver says so
        work.wait()


def _nothing() -> None:
    return None
