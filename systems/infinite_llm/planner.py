"""The proactive planner of v2: which request's blocks should move where, greedily, for the sum of throughputs.

Debtors by batch size, creditors by free memory, the debtor's longest request, the number of blocks searched, stop at
no gain. Hysteresis and the cost of moving (pace) are ours, and so is that a debtor must have requests waiting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from heapq import heapify, heapreplace
from typing import NamedTuple

from systems.infinite_llm.messages import Load
from systems.infinite_llm.throughput import Throughput


def scatter(*numbers: int) -> int:
    """A number that looks random and is the same in every run."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ (number + 1)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return mixed


class View(NamedTuple):
    """What the gManager knows: loads, and blocks at home of each instance's own decoding requests."""

    loads: Mapping[int, Load]
    requests: Mapping[int, Mapping[int, int]]


class PlannedMove(NamedTuple):
    """Move blocks. Predicted tokens per second of both ends together: as things stand, without the move once those who
    fit have been admitted, and with it."""

    request_id: int
    src: int
    dst: int
    num_blocks: int
    before_tps: float
    stay_tps: float
    after_tps: float

    @property
    def gain_tps(self) -> float:
        """What the move itself is to bring."""
        return self.after_tps - self.stay_tps


def freest(heap: list[tuple[int, int]], loads: Mapping[int, Load]) -> int:
    """The instance with most free blocks, the first of equals. Entries (-free, instance) may be out of date: what is
    free has only fallen since."""
    while True:
        free, instance = heap[0]
        if -free == loads[instance].free:
            return instance
        heapreplace(heap, (-loads[instance].free, instance))


def planned_text(plan: int, move: PlannedMove, window_ns: int) -> str:
    """A mark's text, as `common.predictions` reads it."""
    return json.dumps({"plan": plan, "request": move.request_id, "src": move.src, "dst": move.dst,
                       "blocks": move.num_blocks, "before": move.before_tps, "stay": move.stay_tps,
                       "after": move.after_tps, "window_ns": window_ns})  # fmt: skip


class Planner:
    """Pure: a view in, moves out."""

    def __init__(self, model: Throughput, block_size: int, pace: int = 16, hysteresis: float = 0.02,
                 horizon_iterations: int = 500, max_utilisation: float = 0.9, max_moves: int = 4,
                 scattered: bool = False) -> None:  # fmt: skip
        self.model = model
        self.block_size = block_size
        self.pace = pace
        self.hysteresis = hysteresis
        self.horizon_iterations = horizon_iterations
        self.max_utilisation = max_utilisation
        self.scattered = scattered  # an ablation: any creditor, instead of the one with most free memory
        self.num_choices = 0
        self.max_moves = max_moves  # of one debtor in one plan: it moves one after the other

    def plan(self, view: View) -> list[PlannedMove]:
        """Moves in order, each on top of those before it."""
        loads = dict(view.loads)
        requests = {key: dict(blocks) for key, blocks in view.requests.items()}
        debtors = sorted((i for i, load in loads.items() if load.waiting and load.decoding and requests.get(i)),
                         key=lambda i: (loads[i].decoding, i))  # fmt: skip
        creditors = [(-load.free, i) for i, load in loads.items() if not load.waiting]
        heapify(creditors)
        moves: list[PlannedMove] = []
        for debtor in debtors:
            for _ in range(self.max_moves):
                move = self._best_move(debtor, creditors, loads, requests[debtor])
                if move is None:
                    break
                moves.append(move)
                loads[debtor], loads[move.dst] = self.moved(loads[debtor], loads[move.dst], move.num_blocks)
                requests[debtor][move.request_id] -= move.num_blocks
        return moves

    def _best_move(
        self, debtor: int, creditors: list[tuple[int, int]], loads: dict[int, Load], own: dict[int, int]
    ) -> PlannedMove | None:
        load = loads[debtor]
        if not creditors or not load.waiting:
            return None
        if self.scattered:
            self.num_choices += 1
            creditor = min((i for _, i in creditors), key=lambda i: scatter(i, self.num_choices))
        else:
            creditor = freest(creditors, loads)
        request_id = max(own, key=lambda r: (own[r], -r))
        other = loads[creditor]
        most = min(own[request_id] - 1, self.spare(other))
        num, net = self.search(load, other, most)
        if num == 0 or net <= self.hysteresis * self._tps(load, other) * self.horizon_iterations:
            return None
        return PlannedMove(request_id, debtor, creditor, num, self._tps(load, other),
                           self._tps(self.admitted(load), other), self._tps(*self.moved(load, other, num)))  # fmt: skip

    def spare(self, load: Load) -> int:
        """Blocks that a creditor lends for throughput or relief: none while requests of its own wait."""
        return 0 if load.waiting else load.free - load.capacity + int(self.max_utilisation * load.capacity)

    def search(self, debtor: Load, creditor: Load, most: int) -> tuple[int, float]:
        """n* and its net gain. Between the numbers at which one more waiting request fits the gain is convex in n: its
        largest values are at the ends of these ranges, so only they are tried."""
        best, best_net = 0, 0.0
        each = max(1, -(-debtor.waiting_blocks // max(1, debtor.waiting)))
        for admitted in range(debtor.waiting + 1):
            first = max(1, admitted * each - debtor.free)
            last = most if admitted == debtor.waiting else min(most, (admitted + 1) * each - debtor.free - 1)
            if first > most:
                break
            for num in (first, last) if last > first else (first,) if last == first else ():
                net = self.net(debtor, creditor, num)
                if net > best_net:
                    best, best_net = num, net
        return best, best_net

    def net(self, debtor: Load, creditor: Load, num_blocks: int) -> float:
        """Gain times the iterations of the horizon that are left when the move is over."""
        moving = num_blocks * self.block_size / self.pace
        return self.gain(debtor, creditor, num_blocks) * max(0.0, self.horizon_iterations - moving)

    def gain(self, debtor: Load, creditor: Load, num_blocks: int) -> float:
        """Predicted change of both ends' tokens per second, against no move. Those who wait and fit come in either
        way: their throughput is no gain of the move."""
        return self._tps(*self.moved(debtor, creditor, num_blocks)) - self._tps(self.admitted(debtor), creditor)

    def _tps(self, *loads: Load) -> float:
        return sum(self.model.tokens_per_s(load.decoding, load.attended_tokens) for load in loads)

    def admitted(self, load: Load) -> Load:
        """An instance once as many waiting requests as fit are in."""
        return self.moved(load, load, 0)[0]

    def moved(self, debtor: Load, creditor: Load, num_blocks: int) -> tuple[Load, Load]:
        """Both ends after a move: the debtor admits as many waiting requests as then fit."""
        size = self.block_size
        free = debtor.free + num_blocks
        each = max(1, -(-debtor.waiting_blocks // max(1, debtor.waiting)))
        more = min(debtor.waiting, free // each)
        joined = more * each
        after = debtor._replace(
            free=free - joined, decoding=debtor.decoding + more, waiting=debtor.waiting - more,
            waiting_blocks=max(0, debtor.waiting_blocks - joined),
            attended_tokens=debtor.attended_tokens + (joined - num_blocks) * size)  # fmt: skip
        lender = creditor._replace(free=creditor.free - num_blocks,
                                   attended_tokens=creditor.attended_tokens + num_blocks * size)  # fmt: skip
        return after, lender
