"""The debtor's part in DGFM (v1, section "fragmented memory"): frozen, it calls blocks of its running requests home.

A recalled block is set aside at home, copied, switched to at a boundary and only then given back, so that a full
instance needs one free slot and nothing is ever missing. The ids and times of freezes and recalls are ours.
"""

from __future__ import annotations

from common.types import Command, CopyDone, CopySpan, FreeSpan, Status
from systems.infinite_llm.asks import Asker
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.messages import GMANAGER_INSTANCE, Recall, Recalled, Return
from systems.infinite_llm.protocol import State, step
from systems.infinite_llm.rblock import Piece
from systems.infinite_llm.settings import Settings


class Recaller:
    """One recall at a time, piece after piece."""

    def __init__(self, lane: SpanLane, settings: Settings, asker: Asker) -> None:
        self.lane = lane
        self.settings = settings
        self.asker = asker
        self.order: Recall | None = None
        self.state: State | None = None
        self.done = 0
        self.last: Recalled | None = None
        self.num_recalled = 0  # blocks, in all
        self._request = -1
        self._piece = Piece(0, -1, 0)  # whose last `_blocks` blocks come home
        self._blocks = 0
        self._tokens = (0, 0)
        self._command_id = -1

    def recallable(self, creditor: int) -> int:
        """Blocks of decoding requests on a creditor."""
        return sum(piece.num_blocks for _, piece in self._pieces(creditor))

    def _pieces(self, creditor: int) -> list[tuple[int, Piece]]:
        lane = self.lane
        return [(request_id, piece) for request_id, pieces in lane.borrowed.pieces.items()
                for piece in pieces if piece.creditor == creditor and piece.try_id
                and request_id in lane.running and lane.running[request_id].decoding]  # fmt: skip

    def ordered(self, now_ns: int, order: Recall, out: list[Command]) -> None:
        """Call blocks home; a repeated order is answered again."""
        if self.last is not None and (self.last.repair, self.last.turn) == (order.repair, order.turn):
            self.asker.tell(GMANAGER_INSTANCE, self.last, out)
        elif self.order is None:
            self.order, self.state, self.done = order, State.WAIT, 0
            self.lane.interrupt(out)
            self.scheduled(now_ns, out)

    def before(self, now_ns: int, out: list[Command]) -> None:
        """At a boundary, before the lane decides: set blocks aside and copy."""
        if self.state is not State.WAIT:
            return
        lane, order = self.lane, self.order
        assert order is not None
        pieces = self._pieces(order.creditor)
        room = min(order.num_blocks - self.done, lane.free)
        if not pieces or room <= 0:
            self.state = step(State.WAIT, "over")
            self._answer(out)
            return
        self._request, self._piece = pieces[-1]
        self._blocks = min(room, self._piece.num_blocks)
        size = lane.config.block_size
        end = (lane.borrowed.start(self._request, self._piece.try_id) + self._piece.num_blocks) * size
        self._tokens = (end - self._blocks * size, end)
        self._command_id = self.asker.copy_id()
        lane.free -= self._blocks
        self.state = step(State.WAIT, "room")
        out.append(CopySpan(self._command_id, self._request, order.creditor, self.asker.instance,
                            lane.stages[0].layers, self._tokens))  # fmt: skip

    def scheduled(self, now_ns: int, out: list[Command]) -> None:
        """After the lane's decisions: give back what it has switched away from; go on where nothing runs."""
        lane = self.lane
        if self.state is State.SWITCH and not lane.coming_home():
            left, lane.recalled = lane.recalled, None
            if left is not None:
                self.done += self._blocks
                self.num_recalled += self._blocks
                if self._request in lane.running:  # else all its KV is freed already
                    out.append(FreeSpan(left.creditor, self._request, tokens=self._tokens))
                self.asker.tell(left.creditor, Return(left.try_id, left.num_blocks), out)
            step(State.SWITCH, "switched")
            self.state = State.WAIT
            assert self.order is not None
            if self.done >= self.order.num_blocks:
                self.state = step(State.WAIT, "over")
                self._answer(out)
            elif lane.busy:
                lane.interrupt(out)
        if self.state is State.WAIT and not lane.busy:
            self.before(now_ns, out)
            lane.schedule(out)

    def copied(self, now_ns: int, event: CopyDone, out: list[Command]) -> None:
        """The blocks are at home, or their request is gone."""
        if self.state is not State.COPY or event.command_id != self._command_id:
            return
        if event.status is Status.OK:
            self.state = step(State.COPY, "arrived")
            self.lane.come_home(self._request, self._piece.try_id, self._blocks, out)
            if not self.lane.busy:
                self.lane.schedule(out)
        else:
            step(State.COPY, "failed")
            self.lane.free += self._blocks
            self.state = State.WAIT
            self.lane.interrupt(out)

    def _answer(self, out: list[Command]) -> None:
        assert self.order is not None
        order, self.order = self.order, None
        self.last = Recalled(order.repair, order.turn, self.asker.instance, self.done)
        self.asker.tell(GMANAGER_INSTANCE, self.last, out)
