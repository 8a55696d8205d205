"""Loans for requests that no instance holds alone: they wait outside their home's queue until others have lent.

v2 asks every creditor of an offer at once and waits; v1 (`mode=debt`) asks them in turn, is refused where nothing is
free, keeps what was granted and asks the gManager again for the rest.
"""

from __future__ import annotations

from common.sched.lane import Seq
from common.types import Abort, Command
from systems.infinite_llm.asks import Asker
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.messages import GMANAGER_INSTANCE, Answer, Need, Offer, Settled
from systems.infinite_llm.protocol import Loan, State, step
from systems.infinite_llm.rblock import Piece
from systems.infinite_llm.settings import Settings


class Loans:
    """By request. A loan ends when its request is admitted."""

    def __init__(self, lane: SpanLane, settings: Settings, asker: Asker) -> None:
        self.lane = lane
        self.settings = settings
        self.asker = asker
        self.tell = asker.tell
        self.open: dict[int, Loan] = {}
        self.in_turn = settings.mode == "debt"

    def want(self, now_ns: int, seq: Seq, out: list[Command]) -> None:
        """A request that this instance cannot hold alone."""
        self.lane.away += 1
        loan = self.open[seq.request_id] = Loan(seq, now_ns, self.settings.lease_ns)
        self.need(loan, out)

    def need(self, loan: Loan, out: list[Command]) -> None:
        """Tell the gManager what is still missing; who has outgrown the pool ends here."""
        seq, lane = loan.seq, self.lane
        blocks = self._blocks(seq.known + 1)
        if blocks > lane.pool_blocks:
            del self.open[seq.request_id]
            lane.away -= 1
            self.asker.release(list(loan.asks.values()), out)
            self.tell(GMANAGER_INSTANCE, Settled(seq.request_id), out)
            out.append(Abort(seq.request_id, f"output outgrew the pooled KV cache of {lane.pool_blocks} blocks"))
            return
        least = self._least(seq)
        best = least + min(lane.num_blocks // 4, self._blocks(seq.max_output))
        holding = loan.state is not State.NEED
        have = loan.granted() if loan.state is State.NEED else 0
        refused, loan.refused = tuple(loan.refused), {}
        more = max(1, least - have), max(1, best - have)
        self.tell(GMANAGER_INSTANCE, Need(seq.request_id, self.asker.instance, *more, True, holding, refused), out)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.lane.config.block_size)

    def _least(self, seq: Seq) -> int:
        """Blocks that do not fit here, the next token's included."""
        return max(1, self._blocks(seq.known + 1) + self.lane.watermark - self.lane.num_blocks)

    def offered(self, now_ns: int, message: Offer, out: list[Command]) -> None:
        """The gManager advises whom to ask."""
        loan = self.open.get(message.request_id)
        if loan is None:
            self.tell(GMANAGER_INSTANCE, Settled(message.request_id), out)
            return
        offered = sum(blocks for _, blocks in message.parts)
        if loan.state is not State.NEED or not offered or (not self.in_turn and offered < self._least(loan.seq)):
            return  # told already, or an answer to what it needed in an earlier life
        loan.state, loan.asked_ns = step(State.NEED, "offer"), now_ns
        if not self.in_turn or not loan.asks:
            loan.since_ns = now_ns
        loan.candidates = list(message.parts)
        while loan.candidates:
            self._ask_next(now_ns, loan, out)
            if self.in_turn:
                break

    def _ask_next(self, now_ns: int, loan: Loan, out: list[Command]) -> None:
        creditor, blocks = loan.candidates.pop(0)
        piece = self.asker.piece(creditor, blocks)
        loan.asks[piece.try_id] = piece
        loan.missing[piece.try_id] = None
        loan.asked_ns = now_ns
        self.asker.ask(loan.seq.request_id, piece, True, out)

    def answered(self, now_ns: int, message: Answer, out: list[Command]) -> bool:
        """A creditor grants or refuses; False: no loan asked for this."""
        for loan in self.open.values():
            if message.try_id in loan.asks:
                if message.try_id in loan.missing:
                    self._answered(now_ns, loan, message, out)
                return True
        return False

    def _answered(self, now_ns: int, loan: Loan, message: Answer, out: list[Command]) -> None:
        del loan.missing[message.try_id]
        creditor = loan.asks[message.try_id].creditor
        if message.granted:
            self.asker.leases.confirmed(creditor, loan.asked_ns)
        elif not self.in_turn:
            self.give_up(now_ns, loan, "refused", out)
            return
        else:
            del loan.asks[message.try_id]
            loan.refused[creditor] = None
        if loan.missing:
            return
        if self.in_turn and loan.granted() < self._least(loan.seq):
            if loan.candidates:
                self._ask_next(now_ns, loan, out)
            else:
                loan.state = step(State.TRY, "refused")  # what was granted is kept
                self.need(loan, out)
            return
        self._granted(loan, out)

    def _granted(self, loan: Loan, out: list[Command]) -> None:
        loan.state, loan.candidates = step(State.TRY, "granted"), []
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
        self.asker.release(list(loan.asks.values()), out)
        loan.asks, loan.missing, loan.candidates, loan.since_ns = {}, {}, [], now_ns
        loan.patience_ns *= 2
        self.tell(GMANAGER_INSTANCE, Settled(loan.seq.request_id), out)

    def admitted(self, out: list[Command]) -> None:
        """After the lane's decisions: loans whose requests run now are over."""
        for request_id, loan in list(self.open.items()):
            if loan.state is State.QUEUED and request_id in self.lane.running:
                loan.state = step(State.QUEUED, "admitted")
                del self.open[request_id]
                self.tell(GMANAGER_INSTANCE, Settled(request_id), out)

    def tick(self, now_ns: int, out: list[Command]) -> None:
        """Lose patience, and repeat what may have been lost."""
        for loan in list(self.open.values()):
            holds = loan.state is not State.NEED or bool(loan.asks)
            if holds and now_ns - loan.since_ns > loan.patience_ns:
                self.give_up(now_ns, loan, "given up", out)
            for try_id in loan.missing:
                self.asker.ask(loan.seq.request_id, loan.asks[try_id], True, out)
            self.need(loan, out)

    def creditor_lost(self, now_ns: int, creditor: int, out: list[Command]) -> None:
        """What was asked of it starts again."""
        for loan in list(self.open.values()):
            loan.candidates = [part for part in loan.candidates if part[0] != creditor]
            if any(piece.creditor == creditor for piece in loan.asks.values()):
                self.give_up(now_ns, loan, "given up", out)

    def asked(self) -> list[Piece]:
        """Reservations asked for or granted, and not yet in the lane's table."""
        return [piece for loan in self.open.values() if loan.state in (State.TRY, State.NEED)
                for piece in loan.asks.values()]  # fmt: skip
