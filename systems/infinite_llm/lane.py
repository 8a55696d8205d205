"""Continuous batching at home for requests whose leading blocks may lie elsewhere.

The ledger of `LaneScheduler`, with two more kinds of counts: lent + free + private at home = total, and a request's
blocks elsewhere are charged to nobody here, as shared cached blocks are. New KV is appended at home.
"""

from __future__ import annotations

from common.errors import ContractError
from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.types import Command, Entry, Interrupt, Placement, RunStep, Span, Stage, StepDone
from systems.infinite_llm.hostpool import where
from systems.infinite_llm.rblock import BorrowedTable, Piece


class SpanLane(LaneScheduler):
    """Owns one lane. What changes it from outside while it runs takes effect at its next boundary (`schedule`)."""

    def __init__(self, lane: int, stage: Stage, num_blocks: int, config: EngineConfig) -> None:
        super().__init__(lane, (stage,), num_blocks, config)
        self.borrowed = BorrowedTable()
        self.lent = 0
        self.away = 0  # requests of this home that wait for a loan, outside the queue
        self.pooled = False  # may requests be larger than this instance?
        self.pool_blocks = num_blocks  # what a request may use in all
        self.low = 0  # end steps when free blocks fall to this
        self.held_back = False  # somebody waits for blocks here: admit nobody
        self.homeless: list[Seq] = []  # preempted, and too large to come back without a loan
        self.released: list[Piece] = []  # no longer used since last asked
        self._switches: list[tuple[int, Piece]] = []
        self._recall: tuple[int, int, int] | None = None  # request, reservation, blocks that have come home
        self.recalled: Piece | None = None  # what is left of the piece that was called home at the last boundary
        self._held: dict[str, None] = {}  # why nothing runs here for now
        self.frozen = False  # a repair is under way: admit nobody
        self._expelled: dict[int, None] = {}

    # ------------------------------------------------------------ queries

    def outstanding(self) -> int:
        """Requests waiting (also for a loan) and running."""
        return len(self.waiting) + len(self.running) + self.away

    def refusal(self, seq: Seq) -> str | None:
        """Why this request can never run, or None: the pool counts, not this instance."""
        own, self.num_blocks = self.num_blocks, max(self.num_blocks, self.pool_blocks)
        reason = super().refusal(seq)
        self.num_blocks = own
        return reason

    def needs_loan(self, seq: Seq) -> bool:
        """Is it too large for this instance alone?"""
        if not self.pooled or self.borrowed.blocks(seq.request_id):
            return False
        return self._blocks(seq.known + 1) + self.watermark > self.num_blocks

    def home_blocks(self, seq: Seq) -> int:
        """Full blocks of a decoding request behind its last piece, at the last boundary: what may leave."""
        stored = seq.offset + self.iteration
        return stored // self.config.block_size - self.borrowed.covered(seq.request_id)

    def attended_tokens(self) -> int:
        """KV of decoding requests at home."""
        size = self.config.block_size
        stored = sum(seq.offset + self.iteration for seq in self.running.values() if seq.decoding)
        return stored - size * self.borrowed.total() if self.borrowed.pieces else stored

    def placement(self, request_id: int) -> Placement:
        """Pieces elsewhere, then an open span at home."""
        size, layers, start = self.config.block_size, self.stages[0].layers, 0
        spans: list[Span] = []
        for piece in self.borrowed.pieces.get(request_id, ()):
            end = start + piece.num_blocks * size
            instance, tier = where(piece.creditor)
            if spans and (spans[-1].instance, spans[-1].tier) == (instance, tier):
                spans[-1] = spans[-1]._replace(token_end=end)
            else:
                spans.append(Span(instance, layers, start, end, tier))
            start = end
        return (*spans, Span(self.stages[0].instance, layers, start, None))

    # ------------------------------------------------------------ loans

    def lend(self, blocks: int) -> None:
        """Give free blocks away; only at a boundary, when nothing runs that counts on them."""
        if self.busy or blocks > self.free:
            raise ContractError(f"lane {self.lane}: lends {blocks} of {self.free} blocks, busy: {self.busy}")
        self.free -= blocks
        self.lent += blocks

    def poke(self, out: list[Command]) -> None:
        """Something changed for those who wait."""
        if not self.busy:
            self.schedule(out)
        elif self.waiting and not self.held_back and self._may_start(self.waiting[0]):
            self.interrupt(out)

    def interrupt(self, out: list[Command]) -> None:
        """End the running step at its next boundary."""
        if self.busy and not self.stopping:
            self.stopping = True
            out.append(Interrupt(self.lane))

    def switch(self, request_id: int, piece: Piece) -> None:
        """At the next boundary the request's next blocks at home are those of this piece elsewhere."""
        self._switches.append((request_id, piece))

    def unswitch(self, creditor: int) -> None:
        """A creditor died before its pieces were in use."""
        self.released += [piece for _, piece in self._switches if piece.creditor == creditor]
        self._switches = [item for item in self._switches if item[1].creditor != creditor]

    def switched(self) -> bool:
        """Has every switch been made (or dropped)?"""
        return not self._switches

    def hold(self, why: str, out: list[Command]) -> None:
        """From the next boundary on nothing runs here."""
        self._held[why] = None
        self.interrupt(out)

    def go_on(self, why: str, out: list[Command]) -> None:
        """The end of a hold."""
        if why in self._held:
            del self._held[why]
            if not self.busy:
                self.schedule(out)

    def come_home(self, request_id: int, try_id: int, blocks: int, out: list[Command]) -> None:
        """Blocks of a piece have come home, into blocks set aside: at the next boundary they are the request's."""
        self._recall = request_id, try_id, blocks
        self.interrupt(out)

    def coming_home(self) -> bool:
        """Do recalled blocks wait for the boundary?"""
        return self._recall is not None

    def expel(self, request_id: int) -> None:
        """At the next boundary the request leaves, to be computed anew."""
        self._expelled[request_id] = None

    # ------------------------------------------------------------ events

    def step_done(self, event: StepDone, out: list[Command]) -> list[Seq]:
        """As the base's; pieces of the finished are released."""
        finished = super().step_done(event, out)
        for seq in finished:
            self.released += self.borrowed.drop(seq.request_id)
        return finished

    def creditor_lost(self, event: StepDone, creditor: int, out: list[Command]) -> None:
        """The step failed with a creditor: its requests were dropped at the last boundary, the others run on."""
        self.step_done(event, out)
        for request_id in reversed(list(self.running)):
            if any(where(piece.creditor)[0] == creditor for piece in self.borrowed.pieces.get(request_id, ())):
                self._requeue(self._take_out(request_id))

    def lost(self, event: StepDone | None) -> list[Seq]:
        """The instance died."""
        orphans = super().lost(event)
        orphans += self.homeless
        self.homeless, self.released = [], []
        self.borrowed = BorrowedTable()
        self._switches.clear()
        self._recall = self.recalled = None
        self._held.clear()
        self._expelled.clear()
        for seq in orphans:
            seq.shared = 0
        return orphans

    def _take_out(self, request_id: int) -> Seq:
        """Its blocks at home are free; it starts anew."""
        seq = self.running.pop(request_id)
        stored = charged = seq.computed
        if seq.decoding:
            stored = charged = seq.offset + self.iteration
            self.phase.remove(seq.offset)
            seq.known = stored + 1
        else:
            self.targets.remove(seq)
            charged = seq.target
        self._give_back(seq, charged, max(stored, 0))
        seq.decoding, seq.computed = False, 0
        return seq

    def _requeue(self, seq: Seq) -> None:
        """Back to the head of the queue, or to wait for a loan."""
        self.released += self.borrowed.drop(seq.request_id)
        if self.needs_loan(seq):
            self.homeless.append(seq)
        else:
            self.waiting.appendleft(seq)

    # ------------------------------------------------------------ decisions

    def schedule(self, out: list[Command]) -> None:
        """At a boundary: expel, switch ownership, then as the base; all in one step."""
        if self._held:
            return
        if not self._switches and not self._expelled and self._recall is None:
            super().schedule(out)
            return
        removed = tuple(request_id for request_id in self._expelled if request_id in self.running)
        self._expelled.clear()
        for request_id in reversed(removed):
            self._requeue(self._take_out(request_id))
            self.num_preemptions += 1
        placed: dict[int, None] = {}
        for request_id, piece in self._switches:
            seq = self.running.get(request_id)
            if seq is None or not seq.decoding or self.home_blocks(seq) < piece.num_blocks:
                self.released.append(piece)
                continue
            self.borrowed.add(request_id, piece)
            seq.shared += piece.num_blocks
            self.free += piece.num_blocks
            placed[request_id] = None
        self._switches.clear()
        self._settle_recall(placed)
        commands: list[Command] = []
        super().schedule(commands)
        for index, command in enumerate(commands):
            if isinstance(command, RunStep):
                place = tuple((key, self.placement(key)) for key in placed if key in self.running)
                commands[index] = command._replace(remove=(*removed, *command.remove), place=place)
                break
        else:
            if removed:
                commands.append(RunStep(self._command_id(), self.lane, remove=removed))
                self.busy = True
        out += commands

    def _settle_recall(self, placed: dict[int, None]) -> None:
        """What came home is the request's, which it is charged for; or it is gone, and its blocks are free."""
        if self._recall is None:
            return
        (request_id, try_id, blocks), self._recall = self._recall, None
        seq = self.running.get(request_id)
        if seq is None or not seq.decoding or not self.borrowed.has(request_id, try_id):
            self.free += blocks
            return
        self.recalled = self.borrowed.call_home(request_id, try_id, blocks, self.stages[0].instance)
        seq.shared -= blocks
        placed[request_id] = None

    def _preempt(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        removed, retained = super()._preempt()
        for seq in reversed([self.waiting.popleft() for _ in removed]):  # the base has put them at the head
            self._requeue(seq)
        return removed, retained

    def _hopeless(self, seq: Seq) -> bool:
        return not self.lent

    def _may_start(self, seq: Seq) -> bool:
        if self.index is not None:
            return super()._may_start(seq)
        if len(self.running) >= self.config.max_num_seqs or self.held_back or self.frozen:
            return False
        return self._blocks(seq.known) - self.borrowed.blocks(seq.request_id) + self.watermark <= self.free

    def _admit(self, added: list[Entry], out: list[Command]) -> bool:
        if self.held_back or self.frozen:
            return False
        return super()._admit(added, out)

    def _try(self, seq: Seq, reserve: int, out: list[Command]) -> Entry | None:
        away = self.borrowed.blocks(seq.request_id)
        if not away:
            return super()._try(seq, reserve, out)
        need = self._blocks(seq.known) - away
        if need + reserve > self.free:
            return None
        self.free -= need
        seq.shared = away
        seq.computed, seq.target, seq.decoding = 0, seq.known, False
        self.targets.append(seq)
        return Entry(seq.request_id, 0, seq.known, placement=self.placement(seq.request_id))

    def _limit(self, preempted: bool, blocked_by_budget: bool) -> int | None:
        limit = super()._limit(preempted, blocked_by_budget)
        if self.low and self.free > self.low:
            room = self.free - self.low
            near = max(1, room // (self.phase.num + len(self.targets)) * self.config.block_size)
            limit = near if limit is None else min(limit, near)
        return limit
