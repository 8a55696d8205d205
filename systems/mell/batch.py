"""Operations of an epoch, carried out together: Depart first, then Update, then Allocate; unneeded moves are pruned.

[fix] The paper leaves "unnecessary movement" open. Here: chains a-b-c become a-c, returns a-b-a vanish, and moves of
requests that departed meanwhile are dropped. Only the net moves are to be executed.
"""

from __future__ import annotations

from collections.abc import Iterable

from systems.mell.groups import Groups
from systems.mell.packing import Move


def prune(moves: Iterable[Move], gone: frozenset[int] = frozenset()) -> list[Move]:
    """Net moves, in order of first mention."""
    net: dict[int, tuple[int, int]] = {}
    for move in moves:
        first = net.get(move.request_id)
        net[move.request_id] = (move.src if first is None else first[0], move.dst)
    return [Move(request_id, src, dst) for request_id, (src, dst) in net.items()
            if src != dst and request_id not in gone]  # fmt: skip


class Batch:
    """What happened since the last epoch."""

    def __init__(self) -> None:
        self.departed: dict[int, None] = {}
        self.sizes: dict[int, int] = {}
        self.arrived: dict[int, int] = {}

    def allocate(self, request_id: int, size: int) -> None:
        """A request arrived."""
        self.arrived[request_id] = size

    def depart(self, request_id: int) -> None:
        """A request ended."""
        if self.arrived.pop(request_id, None) is None:
            self.departed[request_id] = None
        self.sizes.pop(request_id, None)

    def update(self, request_id: int, size: int) -> None:
        """A request grew; the last size counts."""
        (self.arrived if request_id in self.arrived else self.sizes)[request_id] = size

    def flush(self, groups: Groups, batching: bool = True) -> tuple[list[Move], int, int]:
        """Carry out; (moves to execute, group-moves made, request-moves made before pruning)."""
        moves: list[Move] = []
        group_moves = 0
        for request_id in self.departed:
            moves += groups.depart(request_id)
            group_moves += groups.packing.group_moves
        for request_id, size in self.sizes.items():
            moves += groups.update(request_id, size)
            group_moves += groups.packing.group_moves
        for request_id, size in self.arrived.items():
            moves += groups.allocate(request_id, size)
            group_moves += groups.packing.group_moves
        gone = frozenset(self.departed)
        self.departed, self.sizes, self.arrived = {}, {}, {}
        net = prune(moves, gone) if batching else [move for move in moves if move.request_id not in gone]
        return net, group_moves, len(moves)
