"""Worker to worker: tensors by isend and irecv over four process groups, counted in bytes.

Between two workers each group has one thread that sends and one that receives, both in the global order of orders: so
messages need no tags to find their receivers (NCCL has none; Gloo's catch what would go wrong)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import KVPlaneError

CHANNELS = {"hidden": "hidden", "copies": "copies", "queries": "attention", "partials": "attention"}
"""A process group each, by what its bytes count as: activations; KV and parameters; remote attention there and back."""
KINDS = ("hidden", "copies", "attention", "reduce")
"""`reduce`: between the ranks of an instance, in a group of their own."""
TAGS = 1 << 30


class PeerLost(Exception):
    """A peer's connection is closed: its process is gone, or the wire is cut."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"worker {rank} is gone")
        self.rank = rank


class Peers:
    """This worker's ends. Made by all ranks at once, the policy's too, which is in none of the groups."""

    def __init__(
        self, rank: int, world_size: int, backend: str, timeout_s: float, teams: Sequence[Sequence[int]] = ()
    ) -> None:  # fmt: skip
        """`teams`: workers of each instance."""
        workers, timeout = list(range(1, world_size)), timedelta(seconds=timeout_s)
        self._groups = {channel: dist.new_group(workers, timeout=timeout, backend=backend) for channel in CHANNELS}
        self.rank, self._team_group = rank, None
        self.team: tuple[int, ...] = (rank,)  # of this instance
        for team in teams:  # all processes make all groups
            group = dist.new_group(list(team), timeout=timeout, backend=backend) if len(team) > 1 else None
            if rank in team:
                self.team, self._team_group = tuple(team), group
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # of the counters: several threads send and receive
        self._sent: Counter[str] = Counter()
        self._received: Counter[tuple[str, int]] = Counter()
        self._sending: SimpleQueue[tuple[Any, Tensor]] = SimpleQueue()
        threading.Thread(target=self._reap, daemon=True).start()

    def counts(self) -> tuple[dict[str, int], dict[tuple[str, int], int]]:
        """Bytes sent by kind, and received by (kind, source)."""
        with self._lock:
            return dict(self._sent), dict(self._received)

    def reset(self) -> None:
        """Count anew."""
        with self._lock:
            self._sent.clear()
            self._received.clear()

    def send(self, channel: str, tensor: Tensor, to: int, sequence: int) -> None:
        """Returns at once; the tensor is nobody else's from now on. To a peer that is gone nothing is sent."""
        work = self.start(channel, tensor, to, sequence)
        if work is not None:
            self._sending.put((work, tensor))

    def start(self, channel: str, tensor: Tensor, to: int, sequence: int) -> Any:
        """As `send`; what to wait for before the tensor may go. None: the peer is gone."""
        with self._lock:
            self._sent[CHANNELS[channel]] += tensor.numel() * tensor.element_size()
        try:
            return dist.isend(tensor, to, group=self._groups[channel], tag=sequence % TAGS)
        except RuntimeError:
            return None  # the policy learns of it from the peer's own connection

    def receive(self, channel: str, tensor: Tensor, source: int, sequence: int) -> Tensor:
        """Fill a contiguous tensor. PeerLost; KVPlaneError when the peer is there but silent."""
        try:
            work: Any = dist.irecv(tensor, source, group=self._groups[channel], tag=sequence % TAGS)
            work.wait()
        except RuntimeError as error:
            self._unless_silent(error, f"worker {source}", channel)
            raise PeerLost(source) from None
        with self._lock:
            self._received[CHANNELS[channel], source] += tensor.numel() * tensor.element_size()
        return tensor

    def _unless_silent(self, error: RuntimeError, who: str, kind: str) -> None:
        """KVPlaneError where a peer is there and says nothing."""
        if "imed out" in str(error) or "imeout" in str(error):
            raise KVPlaneError(f"nothing came from {who} for {self._timeout_s:g} s ({kind}); "
                               "see runtime.transfer_timeout_s") from None  # fmt: skip

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks of this instance, in their order; all of them call it. PeerLost."""
        parts = [torch.empty_like(tensor) for _ in self.team]
        others = [rank for rank in self.team if rank != self.rank]
        size = tensor.numel() * tensor.element_size()
        with self._lock:
            self._sent["reduce"] += size * len(others)
        try:
            dist.all_gather(parts, tensor, group=self._team_group)
        except RuntimeError as error:  # who of them is gone it does not say: the instance is lost with any
            self._unless_silent(error, f"the other ranks of worker {self.rank}'s instance", "reduce")
            raise PeerLost(others[0]) from None
        with self._lock:
            self._received.update({("reduce", rank): size for rank in others})
        return parts

    def _reap(self) -> None:
        """Keeps what is being sent alive until it is out."""
        while True:
            work, _ = self._sending.get()
            try:
                work.wait()
            except RuntimeError:
                continue  # as in `start`


def pack(*parts: Tensor) -> Tensor:
    """One run of bytes of these tensors; those of wider types come first."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def unpack(data: Tensor, *shapes: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """The tensors that were packed, as views."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
    return [part.view(dtype).view(shape) for part, (shape, dtype) in zip(torch.split(data, sizes), shapes)]


def packed_bytes(*shapes: tuple[tuple[int, ...], torch.dtype]) -> int:
    """How many bytes they come to."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)
