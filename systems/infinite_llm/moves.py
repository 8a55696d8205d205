"""Moves of blocks of decoding requests to creditors, one at a time: reserve, copy, switch at a boundary.

v2's orders are done one after the other; of v1's candidates (`mode=debt`) the first that grants ends the search.
"""

from __future__ import annotations

import json

from common.marks import DONE
from common.types import Command, CopyDone, CopySpan, FreeSpan, Mark, Status
from systems.infinite_llm.asks import Asker
from systems.infinite_llm.hostpool import where
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.messages import MoveKvcache
from systems.infinite_llm.protocol import Move, State, step
from systems.infinite_llm.settings import Settings

RELIEF = -1  # in place of a plan's number: an order that no plan made


class Moves:
    """The one move under way of an instance, and orders behind it."""

    def __init__(self, lane: SpanLane, settings: Settings, asker: Asker) -> None:
        self.lane = lane
        self.settings = settings
        self.asker = asker
        self.instance = asker.instance
        self.orders: list[MoveKvcache] = []
        self.move: Move | None = None
        self.refused: dict[int, None] = {}  # creditors, since we last told
        self.in_turn = settings.mode == "debt"
        self.frozen = False  # a repair is under way: nothing moves

    def ordered(self, now_ns: int, order: MoveKvcache, out: list[Command]) -> None:
        """move_kvcache: the plan may be out of date; what cannot be done is dropped, and orders of older plans are."""
        if order.dst != self.instance and order.num_blocks > 0 and self.settings.pace:
            if order.plan > 0:  # what is left of an older plan was made for another moment
                if any(left.plan > order.plan for left in self.orders):
                    return
                self.orders = [left for left in self.orders if left.plan in (order.plan, RELIEF)]
            self.orders.append(order)
            self.start(now_ns, out)

    def start(self, now_ns: int, out: list[Command]) -> None:
        """Begin the next move that still makes sense: one at a time, so that the pace is the instance's."""
        while self.move is None and self.orders and not self.frozen:
            order = self.orders.pop(0)
            seq = self.lane.running.get(order.request_id)
            if seq is None or not seq.decoding:
                continue
            blocks = min(order.num_blocks, self.lane.home_blocks(seq) - 1)
            if blocks < 1:
                continue
            self.move = Move(order, self.asker.piece(order.dst, blocks), now_ns)
            self.asker.ask(order.request_id, self.move.piece, False, out)

    def reserved(self, now_ns: int, move: Move, granted: bool, out: list[Command]) -> None:
        """The creditor's answer: data may go, or nothing happens."""
        seq = self.lane.running.get(move.order.request_id)
        if not granted:
            self.refused[move.piece.creditor] = None
            self._end(now_ns, "refused", out)
            return
        if self.in_turn:
            self.orders.clear()
        if seq is None or not seq.decoding or self.lane.home_blocks(seq) <= move.piece.num_blocks:
            self.asker.release([move.piece], out)
            self._end(now_ns, "given up", out)
            return
        move.state = step(State.RESERVE, "granted")
        self.asker.leases.confirmed(move.piece.creditor, move.since_ns)
        move.command_id = self.asker.copy_id()
        size = self.lane.config.block_size
        start = self.lane.borrowed.covered(seq.request_id) * size
        move.tokens = (start, start + move.piece.num_blocks * size)
        pace: int | None = self.settings.pace
        if not self.settings.move_overlap:
            pace = None
            self.lane.hold("move", out)
        dst, tier = where(move.piece.creditor)
        out.append(CopySpan(move.command_id, seq.request_id, self.instance, dst, self.lane.stages[0].layers,
                            move.tokens, pace=pace, dst_tier=tier))  # fmt: skip

    def copied(self, now_ns: int, event: CopyDone, out: list[Command]) -> bool:
        """The data is there, or will never be. False: not a copy of ours."""
        move = self.move
        if move is None or move.command_id != event.command_id:
            return False
        request_id = move.order.request_id
        if event.status is not Status.OK or request_id not in self.lane.running:
            self.asker.release([move.piece], out)
            self._end(now_ns, "failed", out)
        else:
            move.state = step(State.COPY, "arrived")
            self.lane.switch(request_id, move.piece)
            self.lane.interrupt(out)
        self.lane.go_on("move", out)
        return True

    def _end(self, now_ns: int, event: str, out: list[Command]) -> None:
        assert self.move is not None and self.move.state is not None
        step(self.move.state, event)
        self.move = None
        self.start(now_ns, out)

    def scheduled(self, now_ns: int, out: list[Command]) -> None:
        """After the lane's decisions: was it switched, or dropped?"""
        move = self.move
        if move is not None and move.state is State.SWITCH and self.lane.switched():
            if move.order.plan > 0 and self.lane.borrowed.has(move.order.request_id, move.piece.try_id):
                said = {"plan": move.order.plan, "request": move.order.request_id, "src": self.instance,
                        "dst": move.piece.creditor, "blocks": move.piece.num_blocks}  # fmt: skip
                out.append(Mark(self.instance, DONE, json.dumps(said)))
            self._end(now_ns, "switched", out)

    def tick(self, now_ns: int, out: list[Command]) -> None:
        """A reservation without an answer is given up."""
        move = self.move
        if move is not None and move.state is State.RESERVE and now_ns - move.since_ns >= 2 * self.settings.period_ns:
            self.asker.release([move.piece], out)
            self._end(now_ns, "given up", out)

    def fence(self, out: list[Command]) -> None:
        """The lease of the move under way cannot be renewed: neither copy nor switch."""
        move = self.move
        if move is not None and move.state is State.SWITCH:
            self.lane.unswitch(move.piece.creditor)
        elif move is not None and move.state is State.COPY:  # cancels it
            instance, tier = where(move.piece.creditor)
            out.append(FreeSpan(instance, move.order.request_id, tokens=move.tokens, tier=tier))

    def creditor_lost(self, now_ns: int, creditor: int, out: list[Command]) -> None:
        """Orders to the dead are dropped. (A copy to it fails by itself.)"""
        self.lane.unswitch(creditor)
        self.orders = [order for order in self.orders if order.dst != creditor]
        if self.move is not None and self.move.piece.creditor == creditor and self.move.state is State.RESERVE:
            self._end(now_ns, "given up", out)
