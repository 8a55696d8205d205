"""The borrowing side of an rManager: loans, moves, recalls, and the renewals that keep what is borrowed.

Reserve before data; ownership switches at a boundary after the data's arrival.
"""

from __future__ import annotations

from common.sched.lane import Seq
from common.types import Command, CopyDone
from systems.infinite_llm.asks import Asker
from systems.infinite_llm.creditor import Tell
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.leases import Leases
from systems.infinite_llm.loans import Loans
from systems.infinite_llm.messages import GMANAGER_INSTANCE, Answer, MoveKvcache, Need, Offer, Release
from systems.infinite_llm.moves import RELIEF, Moves
from systems.infinite_llm.protocol import Loan, Move, State
from systems.infinite_llm.recall import Recaller
from systems.infinite_llm.settings import Settings


class Debtor:
    """Owns loans and the one move under way of its instance."""

    def __init__(self, instance: int, lane: SpanLane, settings: Settings, tell: Tell) -> None:
        self.instance = instance
        self.lane = lane
        self.settings = settings
        self.tell = tell
        self.leases = Leases(instance, settings.lease_ns, tell)
        self.asker = Asker(instance, self.leases, tell)
        self.borrowing = Loans(lane, settings, self.asker)
        self.moves = Moves(lane, settings, self.asker)
        self.recaller = Recaller(lane, settings, self.asker)
        self.relief_ns: int | None = None  # when we last asked for relief and were not answered

    @property
    def loans(self) -> dict[int, Loan]:
        """Open ones, by request."""
        return self.borrowing.open

    @property
    def move(self) -> Move | None:
        """The move under way."""
        return self.moves.move

    def want(self, now_ns: int, seq: Seq, out: list[Command]) -> None:
        """A request that this instance cannot hold alone."""
        self.borrowing.want(now_ns, seq, out)

    # ------------------------------------------------------------ messages

    def offered(self, now_ns: int, message: Offer, out: list[Command]) -> None:
        """The gManager advises whom to ask."""
        if message.admission:
            self.borrowing.offered(now_ns, message, out)
            return
        if message.parts:
            self.relief_ns = None
        for creditor, blocks in message.parts:
            self.ordered(now_ns, MoveKvcache(message.request_id, blocks, creditor, RELIEF), out)

    def ordered(self, now_ns: int, order: MoveKvcache, out: list[Command]) -> None:
        """move_kvcache."""
        self.moves.ordered(now_ns, order, out)

    def answered(self, now_ns: int, message: Answer, creditor: int, out: list[Command]) -> None:
        """A creditor grants or refuses."""
        move = self.move
        if move is not None and move.piece.try_id == message.try_id and move.state is State.RESERVE:
            self.moves.reserved(now_ns, move, message.granted, out)
        elif not self.borrowing.answered(now_ns, message, out) and message.granted:
            moving = move is not None and move.piece.try_id == message.try_id
            if not moving and message.try_id not in self.lane.borrowed.try_ids(creditor):
                self.tell(creditor, Release((message.try_id,)), out)  # nobody waits for it any more

    def copied(self, now_ns: int, event: CopyDone, out: list[Command]) -> None:
        """A copy ended: a move's, or a recall's."""
        if not self.moves.copied(now_ns, event, out):
            self.recaller.copied(now_ns, event, out)

    # ------------------------------------------------------------ boundaries and time

    def scheduled(self, now_ns: int, out: list[Command]) -> None:
        """After the lane's decisions: who was admitted, what was switched or dropped."""
        lane = self.lane
        self.moves.scheduled(now_ns, out)
        self.recaller.scheduled(now_ns, out)
        if lane.released:
            pieces, lane.released = lane.released, []
            self.asker.release(pieces, out)
        self.borrowing.admitted(out)
        homeless, lane.homeless = lane.homeless, []
        for seq in homeless:
            self.want(now_ns, seq, out)
        self._relieve(now_ns, out)

    def _relieve(self, now_ns: int, out: list[Command]) -> None:
        """Memory runs short: ask where blocks of the longest request could go, so that nobody is preempted."""
        lane = self.lane
        if lane.free > lane.low or self.move is not None or self.moves.orders or self.relief_ns is not None:
            return
        if not self.settings.pace or not lane.phase.num or self.moves.frozen:
            return
        decoding = [seq for seq in lane.running.values() if seq.decoding]
        longest = max(decoding, key=lambda seq: (lane.home_blocks(seq), -seq.request_id))
        blocks = min(lane.home_blocks(longest) - 1, lane.low)
        if blocks > 0:
            self.relief_ns = now_ns
            refused, self.moves.refused = tuple(self.moves.refused), {}
            need = Need(longest.request_id, self.instance, 1, blocks, False, refused=refused)
            self.tell(GMANAGER_INSTANCE, need, out)

    def tick(self, now_ns: int, out: list[Command]) -> None:
        """Renew leases, repeat what may have been lost, lose patience, and stop using what we cannot renew."""
        self.borrowing.admitted(out)
        if self.relief_ns is not None and now_ns - self.relief_ns >= self.settings.period_ns:
            self.relief_ns = None
        self.moves.tick(now_ns, out)
        self.borrowing.tick(now_ns, out)
        self._fence(now_ns, out)
        self.leases.renew(now_ns, self._named, out)

    def _fence(self, now_ns: int, out: list[Command]) -> None:
        lane, limit, move = self.lane, self.settings.lease_ns - self.settings.margin_ns, self.move
        if move is not None and now_ns - self.leases.acked.get(move.piece.creditor, now_ns) > limit:
            self.moves.fence(out)
        for creditor in lane.borrowed.creditors():
            if now_ns - self.leases.acked.get(creditor, 0) <= limit:
                continue
            for request_id in lane.borrowed.at(creditor):
                if request_id in self.loans:
                    self.borrowing.give_up(now_ns, self.loans[request_id], "given up", out)
                else:
                    lane.expel(request_id)
                    lane.interrupt(out)

    def _named(self, creditor: int) -> tuple[tuple[int, int], ...]:
        """Reservations that are in use or asked for at a creditor, and their blocks."""
        pieces = [*self.lane.borrowed.on(creditor), *self.borrowing.asked()]
        if self.move is not None:
            pieces.append(self.move.piece)
        return tuple((piece.try_id, piece.num_blocks) for piece in pieces if piece.creditor == creditor)

    # ------------------------------------------------------------ losses

    def creditor_lost(self, now_ns: int, creditor: int, out: list[Command]) -> None:
        """What was asked of it or waits with KV there starts again. (What runs fails with its step.)"""
        self.moves.creditor_lost(now_ns, creditor, out)
        self.leases.lost(creditor)
        self.borrowing.creditor_lost(now_ns, creditor, out)
