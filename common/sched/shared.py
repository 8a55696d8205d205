"""Lanes that share their instances' memory with other lanes: `LaneScheduler` on a common `CellLedger`.

Between events a lane owns the blocks of its requests and a grant, what its running step may grow by; everything else
is the ledger's. A `greedy` lane is alone on its instance: it owns all the memory there, and behaves exactly as a plain
`LaneScheduler`. A request that waits with `computed > 0` has that KV held at the lane's stages; of one that joins, the
first `shared` blocks may be pieces elsewhere (`SpreadTable`), which queries travel to and the lane is not charged for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple, Protocol

from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.sched.ledger import CellLedger
from common.sched.spread import SpreadTable
from common.types import Command, Entry, Rule, RunStep, Stage, StepDone


class Part(NamedTuple):
    """Tokens of a queued request for one micro-batch; `behind`: the lane that is computing those before it."""

    seq: Seq
    start: int
    tokens: int
    behind: int | None


class Feeder(Protocol):
    """Cuts a queue that lanes share into micro-batches."""

    def next_batch(self, lane: int, room: int) -> list[Part]:
        """The next micro-batch, of at most `room` tokens; nothing is taken yet."""
        ...

    def sent(self, lane: int, part: Part) -> None:
        """A part was taken into a lane."""
        ...

    def stop(self) -> None:
        """A part could not be taken: cut anew next time."""
        ...

    def clear(self) -> None:
        """Forget everything: the lanes are gone."""
        ...

    def reached(self, lane: int, request_id: int) -> None:
        """A part that was not its request's last has been computed."""
        ...


class SharedLane(LaneScheduler):
    """See the module docstring. Pipelines run chunked iterations; short steps keep grants small."""

    def __init__(
        self,
        lane: int,
        stages: tuple[Stage, ...],
        config: EngineConfig,
        ledger: CellLedger,
        greedy: bool,
        waiting: deque[Seq] | None = None,
        feeder: Feeder | None = None,
        spread: SpreadTable | None = None,
    ) -> None:
        if not greedy:
            leap = min(config.max_leap or config.block_size, config.block_size)
            config = replace(config, rule=Rule.CHUNKED if len(stages) > 1 else config.rule, max_leap=leap)
        super().__init__(lane, stages, ledger.capacity_blocks(stages), config)
        self.ledger = ledger
        self.greedy = greedy
        self.feeder = feeder
        self.spread = spread
        self.closed = False  # admits nothing that waits
        self.short_steps = False
        self.joining: deque[Seq] = deque()  # their KV is held at the stages, ready
        self.pieces: dict[int, Seq] = {}  # stand-ins for parts of prompts that go on elsewhere
        self.free = 0
        if waiting is not None:
            self.waiting = waiting
        if greedy:
            self._draw()

    # ------------------------------------------------------------ the shared account

    def _draw(self) -> None:
        blocks = self.ledger.blocks(self.stages)
        if blocks > 0:
            self.ledger.take(self.stages, blocks)
            self.free += blocks

    def hand_back(self, keep: int = 0) -> None:
        """Free blocks but for `keep` of them return to the ledger."""
        if self.free > keep:
            self.ledger.take(self.stages, keep - self.free)
            self.free = keep

    def resized(self) -> None:
        """The instances' KV ranges have another size."""
        self.num_blocks = self.ledger.capacity_blocks(self.stages)
        self.watermark = int(self.config.watermark * self.num_blocks)

    def own_all(self, config: EngineConfig) -> None:
        """From now on the lane is alone on its instance."""
        self.greedy, self.config, self.short_steps = True, config, False
        self.resized()
        self._draw()

    def held_blocks(self) -> int:
        """Blocks of requests in the lane."""
        total = 0
        for seq in self.running.values():
            total += self._blocks(seq.offset + self.iteration if seq.decoding else seq.target) - seq.shared
        return total + sum(self._blocks(seq.target) - self._blocks(seq.offset) for seq in self.pieces.values())

    def _hopeless(self, seq: Seq) -> bool:
        return self.greedy

    def _may_start(self, seq: Seq) -> bool:
        if self.greedy:
            return super()._may_start(seq)
        need = self._blocks(seq.known) - self._blocks(seq.computed) + self.watermark
        return len(self.running) < self.config.max_num_seqs and need <= self.free + self.ledger.blocks(self.stages)

    # ------------------------------------------------------------ events

    def outstanding(self) -> int:
        """Requests waiting (also those of other lanes that share the queue), joining and running."""
        return len(self.waiting) + len(self.running) + len(self.joining)

    def step_done(self, event: StepDone, out: list[Command]) -> list[Seq]:
        """As the base class; parts of prompts that go on in other lanes leave."""
        return super().step_done(self._without_pieces(event) if self.pieces else event, out)

    def _without_pieces(self, event: StepDone) -> StepDone:
        assert self.feeder is not None
        rest = []
        for request_id, at in event.prefilled:
            piece = self.pieces.pop(request_id, None)
            if piece is None:
                rest.append((request_id, at))
                continue
            self.targets.remove(piece)
            self.feeder.reached(self.lane, request_id)
        return event._replace(prefilled=tuple(rest))

    def lost(self, event: StepDone | None) -> list[Seq]:
        """As the base class; requests that were to join are lost with the rest."""
        if event is not None and self.pieces:
            event = self._without_pieces(event)
        self.pieces = {}
        orphans = [*super().lost(event), *self.joining]
        for seq in self.joining:
            seq.computed = seq.shared = 0
        self.joining.clear()
        if self.spread is not None:
            for seq in orphans:
                self.spread.drop(seq.request_id)
        return orphans

    def _give_back(self, seq: Seq, charged: int, stored: int) -> int:
        if seq.shared and self.spread is not None:
            self.spread.drop(seq.request_id)
        return super()._give_back(seq, charged, stored)

    def leave(self, out: list[Command], park: bool) -> list[Seq]:
        """At a boundary, take everyone out: parked with their KV held (`computed` tokens), or removed without."""
        gone = list(self.running.values())
        for seq in gone:
            charged = seq.target
            if seq.decoding:
                charged = seq.offset + self.iteration
                self.phase.remove(seq.offset)
                seq.known, seq.computed = charged + 1, charged
            if not park:
                seq.computed = 0
                self._give_back(seq, charged, 0)
            else:
                self.free += self._blocks(charged) - self._blocks(seq.computed)
            seq.decoding = False
        if gone:
            ids = tuple(seq.request_id for seq in gone)
            self.busy = True
            out.append(RunStep(self._command_id(), self.lane, park=ids) if park
                       else RunStep(self._command_id(), self.lane, remove=ids))  # fmt: skip
        self.running, self.targets = {}, []
        gone += self.joining
        self.joining.clear()
        self.hand_back()
        return gone

    # ------------------------------------------------------------ decisions

    def schedule(self, out: list[Command]) -> None:
        """As the base class, with the ledger's blocks."""
        if self.greedy:
            super().schedule(out)
            return
        self._draw()
        removed: tuple[int, ...] = ()
        if self.phase.next_growth(self.iteration) > self.free:
            removed = self._preempt()[0]
        added: list[Entry] = []
        blocked = fed = False
        if not removed:
            self._join_held(added)
            if self.waiting and not self.closed:
                if self.feeder is not None:
                    fed = not self.targets and self._admit_fed(added)  # parts take a whole iteration each
                else:
                    blocked = self._admit(added, out)
        if not (self.running or self.pieces):
            if removed:
                out.append(RunStep(self._command_id(), self.lane, (), removed))
                self.busy = True
            self.hand_back()
            return
        limit = self._limit(bool(removed), blocked) or 1
        if fed or self.short_steps:
            limit = 1
        stages = None if self._started else self.stages
        config = self.config
        out.append(RunStep(self._command_id(), self.lane, tuple(added), removed, stages=stages, rule=config.rule,
                           token_budget=config.max_num_batched_tokens, max_iterations=limit))  # fmt: skip
        self._started = self.busy = True
        self.hand_back(min(self.free, self._growth_within(limit)))

    def _growth_within(self, limit: int) -> int:
        """What the step may grow by, as if whoever still prefills decoded already."""
        phase = self.phase
        for seq in self.targets:
            phase.add(seq.target - self.iteration)
        growth = phase.growth(self.iteration, limit)
        for seq in self.targets:
            phase.remove(seq.target - self.iteration)
        return growth

    def _join_held(self, added: list[Entry]) -> None:
        """Whoever's KV is here (or in pieces elsewhere) goes on, as far as the next iteration's growth allows."""
        phase = self.phase
        while self.joining and len(self.running) < self.config.max_num_seqs:
            seq = self.joining[0]
            decode = seq.computed == seq.known - 1 and seq.known > seq.prompt
            offset = seq.computed - self.iteration
            need = 0
            if decode:
                phase.add(offset)
            else:
                need = self._blocks(seq.known) - max(seq.shared, self._blocks(seq.computed))
            if need + phase.next_growth(self.iteration) > self.free:
                if decode:
                    phase.remove(offset)
                return
            self.joining.popleft()
            self.free -= need
            seq.offset, seq.decoding, seq.target = offset, decode, seq.known
            if not decode:
                self.targets.append(seq)
            placement = None
            if seq.shared and self.spread is not None:
                placement = self.spread.placement(seq.request_id, self.stages)
            added.append(Entry(seq.request_id, seq.computed, seq.known, decode=decode, placement=placement))
            self.running[seq.request_id] = seq

    def _try(self, seq: Seq, reserve: int, out: list[Command]) -> Entry | None:
        if not seq.computed:
            return super()._try(seq, reserve, out)
        need = self._blocks(seq.known) - self._blocks(seq.computed)
        if need + reserve > self.free:
            return None
        self.free -= need
        seq.target, seq.decoding = seq.known, False
        self.targets.append(seq)
        return Entry(seq.request_id, seq.computed, seq.known)

    def _admit_fed(self, added: list[Entry]) -> bool:
        """Take the next micro-batch; True if there may be another at the next boundary."""
        assert self.feeder is not None
        room = self.config.max_num_batched_tokens - self.phase.num
        growth = self.phase.next_growth(self.iteration) + self.watermark
        taken = False
        for part in self.feeder.next_batch(self.lane, room):
            seq, end = part.seq, part.start + part.tokens
            need = self._blocks(end) - self._blocks(part.start)
            if need + growth > self.free or len(self.running) >= self.config.max_num_seqs:
                self.feeder.stop()
                return taken
            taken = True
            self.free -= need
            last = end == seq.known
            self.feeder.sent(self.lane, part)
            if last:
                seq.computed, seq.target, seq.decoding = part.start, end, False
                self.running[seq.request_id] = seq
                self.targets.append(seq)
            else:
                piece = Seq(seq.request_id, end, 0, None, -1)
                piece.computed = piece.offset = part.start
                piece.target = end
                self.pieces[seq.request_id] = piece
                self.targets.append(piece)
            added.append(Entry(seq.request_id, part.start, end, sample=last, behind=part.behind))
        return taken
