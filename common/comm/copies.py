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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.comm.peers import Peers
from common.engine.instance import put_blocks
from common.errors import KVPlaneError
from common.kernels.cache import gather_cells

WINDOW = 2  # pieces of copies that a worker has on their way
Cells = NDArray[np.int32]  # [layers, blocks]


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


def cut_tokens(kv: Tensor, cells: Cells, tokens: tuple[int, int], first_block: int) -> Tensor:
    """[layers, 2, tokens, kv heads, head size]: exactly these tokens of cells `[layers, blocks]`, the first of which is
    block `first_block` of the request."""
    layers, blocks = cells.shape
    whole = gather_cells(kv, torch.from_numpy(cells.ravel().astype(np.int64)))
    size = kv.shape[2]
    rows = whole.view(layers, blocks, *kv.shape[1:]).transpose(1, 2).reshape(layers, 2, blocks * size, *kv.shape[3:])
    start, end = (token - first_block * size for token in tokens)
    return rows[:, :, start:end].contiguous()


def put_tokens(came: Tensor, kv: Tensor, cells: Cells, tokens: tuple[int, int], first_block: int) -> None:
    """The other way round: what `cut_tokens` gave, into cells that hold the same tokens here."""
    layers, blocks = cells.shape
    size = kv.shape[2]
    rows = came.new_zeros(layers, 2, blocks * size, *kv.shape[3:])
    start, end = (token - first_block * size for token in tokens)
    rows[:, :, start:end] = came
    whole = rows.view(layers, 2, blocks, size, *kv.shape[3:]).transpose(1, 2).reshape(-1, *kv.shape[1:])
    numbers = np.arange(cells.size, dtype=np.int32).reshape(cells.shape)
    put_blocks(whole, numbers, kv, cells, tokens, first_block, size)

