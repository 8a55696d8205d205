"""The borrowing side of an rManager: loans for requests that are too large for it, moves of blocks in mid-decode,
renewals. Reserve before data; ownership switches at a boundary after the data's arrival.
"""

from __future__ import annotations

from common.sched.lane import Seq
from common.types import Abort, Command, CopyDone, CopySpan, FreeSpan, Status
from systems.infinite_llm.creditor import Tell
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.leases import Leases
from systems.infinite_llm.messages import Answer, MoveKvcache, Need, Offer, Release, Settled, TryMoveKvcache
from systems.infinite_llm.protocol import Loan, Move, State, step
from systems.infinite_llm.rblock import Piece
from systems.infinite_llm.settings import Settings

GMANAGER_INSTANCE = -1
COPY_IDS = 1 << 60  # beyond every lane's command ids


class Debtor:
    """Owns loans and the one move under way of its instance."""

    def __init__(self, instance: int, lane: SpanLane, settings: Settings, tell: Tell) -> None:
        self.instance = instance
        self.lane = lane
        self.settings = settings
        self.tell = tell
        self.loans: dict[int, Loan] = {}
        self.orders: list[MoveKvcache] = []
        self.move: Move | None = None
        self.leases = Leases(instance, settings.lease_ns, tell)
        self.relief_ns: int | None = None  # when we last asked for relief and were not answered
        self._next_id = 0

    # ------------------------------------------------------------ loans

    def want(self, now_ns: int, seq: Seq, out: list[Command]) -> None:
        """A request that this instance cannot hold alone."""
        self.lane.away += 1
        loan = self.loans[seq.request_id] = Loan(seq, now_ns, self.settings.lease_ns)
        self._need(loan, out)

    def _need(self, loan: Loan, out: list[Command]) -> None:
        seq, lane = loan.seq, self.lane
        blocks = self._blocks(seq.known + 1)
        if blocks > lane.pool_blocks:
            del self.loans[seq.request_id]
            lane.away -= 1
            self.tell(GMANAGER_INSTANCE, Settled(seq.request_id), out)
            out.append(Abort(seq.request_id, f"output outgrew the pooled KV cache of {lane.pool_blocks} blocks"))
            return
        least = self._least(seq)
        best = least + min(lane.num_blocks // 4, self._blocks(seq.max_output))
        holding = loan.state is not State.NEED
        self.tell(GMANAGER_INSTANCE, Need(seq.request_id, self.instance, least, best, True, holding), out)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.lane.config.block_size)

    def _least(self, seq: Seq) -> int:
        """Blocks that do not fit here, the next token's included."""
        return max(1, self._blocks(seq.known + 1) + self.lane.watermark - self.lane.num_blocks)

    def offered(self, now_ns: int, message: Offer, out: list[Command]) -> None:
        """The gManager advises whom to ask."""
        if not message.admission:
            if message.parts:
                self.relief_ns = None
            for creditor, blocks in message.parts:
                self.ordered(now_ns, MoveKvcache(message.request_id, blocks, creditor, -1), out)
            return
        loan = self.loans.get(message.request_id)
        if loan is None:
            self.tell(GMANAGER_INSTANCE, Settled(message.request_id), out)
            return
        if loan.state is not State.NEED or sum(blocks for _, blocks in message.parts) < self._least(loan.seq):
            return  # told already, or an answer to what it needed in an earlier life
        loan.state, loan.since_ns = step(State.NEED, "offer"), now_ns
        for creditor, blocks in message.parts:
            piece = self._piece(creditor, blocks)
            loan.asks[piece.try_id] = piece
            loan.missing[piece.try_id] = None
            self._try(loan.seq.request_id, piece, True, out)

    def _piece(self, creditor: int, blocks: int) -> Piece:
        self._next_id += 1
        return Piece((self.instance << 32) + self._next_id, creditor, blocks)

    def _try(self, request_id: int, piece: Piece, wait: bool, out: list[Command]) -> None:
        number = self.leases.number(piece.creditor)
        message = TryMoveKvcache(piece.try_id, number, self.instance, request_id, piece.num_blocks, wait)
        self.tell(piece.creditor, message, out)

    def answered(self, now_ns: int, message: Answer, creditor: int, out: list[Command]) -> None:
        """A creditor grants or refuses."""
        move = self.move
        if move is not None and move.piece.try_id == message.try_id and move.state is State.RESERVE:
            self._reserved(now_ns, move, message.granted, out)
            return
        for loan in self.loans.values():
            if message.try_id in loan.asks:
                if message.try_id in loan.missing:
                    self._loan_answered(now_ns, loan, message, out)
                return
        if message.granted and message.try_id not in self.lane.borrowed.try_ids(creditor) and not (
            move is not None and move.piece.try_id == message.try_id
        ):
            self.tell(creditor, Release((message.try_id,)), out)  # nobody waits for it any more

    def _loan_answered(self, now_ns: int, loan: Loan, message: Answer, out: list[Command]) -> None:
        if not message.granted:
            self.give_up(now_ns, loan, "refused", out)
            return
        del loan.missing[message.try_id]
        creditor = loan.asks[message.try_id].creditor
        self.leases.confirmed(creditor, loan.since_ns)
        if loan.missing:
            return
        loan.state = step(State.TRY, "granted")
        for piece in loan.asks.values():
            self.lane.borrowed.add(loan.seq.request_id, piece)
        self.lane.away -= 1
        self.lane.waiting.appendleft(loan.seq)
        self.lane.poke(out)

    def give_up(self, now_ns: int, loan: Loan, event: str, out: list[Command]) -> None:
        """All that was granted goes back; ask again at the next tick, behind the others."""
        state = loan.state
        assert state is not None
        if state is not State.NEED:
            loan.state = step(state, event)
        if state is State.QUEUED:
            self.lane.waiting.remove(loan.seq)
            self.lane.borrowed.drop(loan.seq.request_id)
            self.lane.away += 1
        self.release(list(loan.asks.values()), out)
        loan.asks, loan.missing, loan.since_ns = {}, {}, now_ns
        loan.patience_ns *= 2
        self.tell(GMANAGER_INSTANCE, Settled(loan.seq.request_id), out)

    def release(self, pieces: list[Piece], out: list[Command]) -> None:
        """Tell their creditors."""
        by_creditor: dict[int, list[int]] = {}
        for piece in pieces:
            by_creditor.setdefault(piece.creditor, []).append(piece.try_id)
        for creditor, try_ids in by_creditor.items():
            self.tell(creditor, Release(tuple(try_ids)), out)

    # ------------------------------------------------------------ moves

    def ordered(self, now_ns: int, order: MoveKvcache, out: list[Command]) -> None:
        """move_kvcache: the plan may be out of date; what cannot be done is dropped."""
        if order.dst != self.instance and order.num_blocks > 0 and self.settings.pace:
            self.orders.append(order)
            self.start(now_ns, out)

    def start(self, now_ns: int, out: list[Command]) -> None:
        """Begin the next move that still makes sense: one at a time, so that the pace is the instance's."""
        while self.move is None and self.orders:
            order = self.orders.pop(0)
            seq = self.lane.running.get(order.request_id)
            if seq is None or not seq.decoding:
                continue
            blocks = min(order.num_blocks, self.lane.home_blocks(seq) - 1)
            if blocks < 1:
                continue
            self.move = Move(order, self._piece(order.dst, blocks), now_ns)
            self._try(order.request_id, self.move.piece, False, out)

    def _reserved(self, now_ns: int, move: Move, granted: bool, out: list[Command]) -> None:
        seq = self.lane.running.get(move.order.request_id)
        if not granted:
            self._end(now_ns, "refused", out)
        elif seq is None or not seq.decoding or self.lane.home_blocks(seq) <= move.piece.num_blocks:
            self.release([move.piece], out)
            self._end(now_ns, "given up", out)
        else:
            move.state = step(State.RESERVE, "granted")
            self.leases.confirmed(move.piece.creditor, move.since_ns)
            self._next_id += 1
            move.command_id = COPY_IDS + (self.instance << 32) + self._next_id
            size = self.lane.config.block_size
            start = self.lane.borrowed.blocks(seq.request_id) * size
            move.tokens = (start, start + move.piece.num_blocks * size)
            out.append(CopySpan(move.command_id, seq.request_id, self.instance, move.piece.creditor,
                                self.lane.stages[0].layers, move.tokens, pace=self.settings.pace))  # fmt: skip

    def copied(self, now_ns: int, event: CopyDone, out: list[Command]) -> None:
        """The data is there, or will never be."""
        move = self.move
        if move is None or move.command_id != event.command_id:
            return
        request_id = move.order.request_id
        if event.status is not Status.OK or request_id not in self.lane.running:
            self.release([move.piece], out)
            self._end(now_ns, "failed", out)
            return
        move.state = step(State.COPY, "arrived")
        self.lane.switch(request_id, move.piece)
        self.lane.interrupt(out)

    def _end(self, now_ns: int, event: str, out: list[Command]) -> None:
        assert self.move is not None and self.move.state is not None
        step(self.move.state, event)
        self.move = None
        self.start(now_ns, out)

    # ------------------------------------------------------------ boundaries and time

    def scheduled(self, now_ns: int, out: list[Command]) -> None:
        """After the lane's decisions: who was admitted, what was switched or dropped."""
        lane, move = self.lane, self.move
        if move is not None and move.state is State.SWITCH and lane.switched():
            self._end(now_ns, "switched", out)
        if lane.released:
            pieces, lane.released = lane.released, []
            self.release(pieces, out)
        self._admitted(out)
        homeless, lane.homeless = lane.homeless, []
        for seq in homeless:
            self.want(now_ns, seq, out)
        self._relieve(now_ns, out)

    def _admitted(self, out: list[Command]) -> None:
        for request_id, loan in list(self.loans.items()):
            if loan.state is State.QUEUED and request_id in self.lane.running:
                loan.state = step(State.QUEUED, "admitted")
                del self.loans[request_id]
                self.tell(GMANAGER_INSTANCE, Settled(request_id), out)

    def _relieve(self, now_ns: int, out: list[Command]) -> None:
        """Memory runs short: ask where blocks of the longest request could go, so that nobody is preempted."""
        lane = self.lane
        if lane.free > lane.low or self.move is not None or self.orders or self.relief_ns is not None:
            return
        if not self.settings.pace or not lane.phase.num:
            return
        decoding = [seq for seq in lane.running.values() if seq.decoding]
        longest = max(decoding, key=lambda seq: (lane.home_blocks(seq), -seq.request_id))
        blocks = min(lane.home_blocks(longest) - 1, lane.low)
        if blocks > 0:
            self.relief_ns = now_ns
            need = Need(longest.request_id, self.instance, 1, blocks, False)
            self.tell(GMANAGER_INSTANCE, need, out)

    def tick(self, now_ns: int, out: list[Command]) -> None:
        """Renew leases, repeat what may have been lost, lose patience, and stop using what we cannot renew."""
        settings, move = self.settings, self.move
        self._admitted(out)
        if self.relief_ns is not None and now_ns - self.relief_ns >= settings.period_ns:
            self.relief_ns = None
        if move is not None and move.state is State.RESERVE and now_ns - move.since_ns >= 2 * settings.period_ns:
            self.release([move.piece], out)
            self._end(now_ns, "given up", out)
        for loan in list(self.loans.values()):
            if loan.state is not State.NEED and now_ns - loan.since_ns > loan.patience_ns:
                self.give_up(now_ns, loan, "given up", out)
            for try_id in loan.missing:
                self._try(loan.seq.request_id, loan.asks[try_id], True, out)
            self._need(loan, out)
        self._fence(now_ns, out)
        self.leases.renew(now_ns, self._named, out)

    def _fence(self, now_ns: int, out: list[Command]) -> None:
        lane, limit, move = self.lane, self.settings.lease_ns - self.settings.margin_ns, self.move
        if move is not None and now_ns - self.leases.acked.get(move.piece.creditor, now_ns) > limit:
            if move.state is State.SWITCH:
                lane.unswitch(move.piece.creditor)
            elif move.state is State.COPY:  # cancels it
                out.append(FreeSpan(move.piece.creditor, move.order.request_id, tokens=move.tokens))
        for creditor in lane.borrowed.creditors():
            if now_ns - self.leases.acked.get(creditor, 0) <= limit:
                continue
            for request_id in lane.borrowed.at(creditor):
                if request_id in self.loans:
                    self.give_up(now_ns, self.loans[request_id], "given up", out)
                else:
                    lane.expel(request_id)
                    lane.interrupt(out)

    def _named(self, creditor: int) -> list[int]:
        """Reservations that are in use or asked for at a creditor."""
        waiting = [piece for loan in self.loans.values() if loan.state is State.TRY for piece in loan.asks.values()]
        if self.move is not None:
            waiting.append(self.move.piece)
        asked = [piece.try_id for piece in waiting if piece.creditor == creditor]
        return self.lane.borrowed.try_ids(creditor) + asked

    # ------------------------------------------------------------ losses

    def creditor_lost(self, now_ns: int, creditor: int, out: list[Command]) -> None:
        """What was asked of it or waits with KV there starts again. (What runs fails with its step.)"""
        self.lane.unswitch(creditor)
        self.leases.lost(creditor)
        self.orders = [order for order in self.orders if order.dst != creditor]
        if self.move is not None and self.move.piece.creditor == creditor and self.move.state is State.RESERVE:
            self._end(now_ns, "given up", out)
        for loan in list(self.loans.values()):
            if any(piece.creditor == creditor for piece in loan.asks.values()):
                self.give_up(now_ns, loan, "given up", out)
