"""A lane whose requests may leave with their KV or without it, and join with KV that has been copied in.

Everything that could be outgrown by a running leap happens at a boundary: `schedule` takes the leaving ones out, lets
those join whose KV is there, and then batches as ever. `reserved` blocks are charged to the ledger: KV on its way in,
and KV parked here. `promised` ones are too, though nothing is in them yet: who comes without KV finds them, ahead of
whoever else waits. Prefix caching is not supported.
"""

from __future__ import annotations

from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.types import Command, Entry, FreeSpan, RunStep, Stage, StepDone


class MigratingLane(LaneScheduler):
    """See the module docstring. `left`, `kept`, `preempted` and `joined` are for the owner to take after each
    `schedule`."""

    def __init__(self, lane: int, stages: tuple[Stage, ...], num_blocks: int, config: EngineConfig) -> None:
        if config.prefix_caching:
            raise ValueError("a lane with migration has no prefix cache")
        super().__init__(lane, stages, num_blocks, config)
        self.reserved: dict[int, int] = {}  # request -> blocks
        self.promised: dict[int, int] = {}  # request -> blocks, until it starts here
        self.joining: list[Seq] = []  # their KV is here; `computed` tokens of it
        self.leaving: dict[int, int | None] = {}  # None: its KV stays parked here; else it is freed, and these blocks
        self.left: list[Seq] = []  # are promised elsewhere
        self.kept: list[int] = []  # they have outgrown what is promised elsewhere, and stay
        self.preempted: list[int] = []
        self.joined: list[int] = []
        self.seen = 0  # the lane's clock by the last report

    # ------------------------------------------------------------ queries

    @property
    def instance(self) -> int:
        """Where it runs."""
        return self.stages[0].instance

    @property
    def empty(self) -> bool:
        """Nobody is here or on the way here."""
        return not (self.running or self.waiting or self.reserved or self.promised or self.joining or self.busy)

    def used_blocks(self) -> int:
        """Those that hold or await KV; promised ones do not yet."""
        return self.num_blocks - self.free - sum(self.promised.values())

    def stored(self, seq: Seq) -> int:
        """Tokens whose KV is here for certain."""
        return seq.offset + max(self.iteration, self.seen) if seq.decoding else seq.computed

    def blocks_of(self, seq: Seq) -> int:
        """Blocks that a request holds by the last report."""
        return self._blocks(self.stored(seq) if seq.decoding else max(seq.target, seq.known))

    # ------------------------------------------------------------ ledger, at boundaries only

    def reserve(self, request_id: int, blocks: int) -> bool:
        """Charge blocks for KV on its way in, if they are free."""
        if blocks > self.free:
            return False
        self.free -= blocks
        self.reserved[request_id] = self.reserved.get(request_id, 0) + blocks
        return True

    def release(self, request_id: int) -> None:
        """Give back what was reserved for a request, or what it had parked here."""
        self.free += self.reserved.pop(request_id, 0)

    def promise(self, request_id: int, blocks: int) -> bool:
        """Keep so many blocks, in all, for a request that is to come without KV, if they are free."""
        more = blocks - self.promised.get(request_id, 0)
        if more > self.free:
            return False
        self.free -= more
        self.promised[request_id] = blocks
        return True

    def retract(self, request_id: int) -> None:
        """It does not come."""
        self.free += self.promised.pop(request_id, 0)

    def submit(self, seq: Seq, out: list[Command]) -> None:
        """As the base; who has a promise is let in at the next boundary."""
        if seq.request_id not in self.promised:
            super().submit(seq, out)
            return
        self.waiting.append(seq)
        if not self.busy:
            self.schedule(out)
        elif not self.stopping and len(self.running) < self.config.max_num_seqs:
            self.stopping = True
            out.append(self._interrupt)

    def step_done(self, event: StepDone, out: list[Command]) -> list[Seq]:
        """As the base, and the clock is seen."""
        done = super().step_done(event, out)
        self.seen = max(self.seen, self.iteration)
        return done

    def lost(self, event: StepDone | None) -> list[Seq]:
        """The instance died: all of its requests, those about to join too."""
        orphans = super().lost(event)
        for seq in self.joining:
            seq.computed = 0
        orphans += self.joining
        self.joining, self.reserved, self.promised, self.leaving = [], {}, {}, {}
        return orphans

    def schedule(self, out: list[Command]) -> None:
        """At a boundary: who leaves, who joins, then as ever."""
        park, remove = self._take_leaving() if self.leaving else ((), ())
        joins = self._take_joining(out) if self.joining else ()
        if self.promised and self.waiting:  # first: blocks that are kept for them help nobody else
            order = sorted(self.waiting, key=lambda seq: seq.request_id not in self.promised)
            self.waiting.clear()
            self.waiting.extend(order)
        mark = len(out)
        super().schedule(out)
        step = out[-1] if len(out) > mark else None
        if isinstance(step, RunStep):
            self.preempted += step.remove
            if park or remove or joins:
                out[-1] = step._replace(add=(*joins, *step.add), remove=(*step.remove, *remove), park=park,
                                        retain=(*step.retain, *(0 for _ in remove)))  # fmt: skip
        elif park or remove:
            out.append(RunStep(self._command_id(), self.lane, remove=remove, park=park))
            self.busy = True

    def _take_leaving(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        park, remove = [], []
        for request_id, promised in list(self.leaving.items()):
            seq = self.running.get(request_id)
            if seq is not None and not seq.decoding:
                continue  # a prompt is finished first
            del self.leaving[request_id]
            if seq is None:
                continue  # it finished, or was preempted
            stored = seq.offset + self.iteration
            if promised is not None and self._blocks(stored + 1) > promised:
                self.kept.append(request_id)
                continue
            del self.running[request_id]
            self.phase.remove(seq.offset)
            seq.known, seq.decoding = stored + 1, False
            seq.computed = stored if promised is None else 0
            if promised is None:
                self.reserved[request_id] = self._blocks(stored)
                park.append(request_id)
            else:
                self.free += self._blocks(stored)
                remove.append(request_id)
            self.left.append(seq)
        return tuple(park), tuple(remove)

    def _take_joining(self, out: list[Command]) -> tuple[Entry, ...]:
        """Those whose next block can be had join; the others wait with their KV."""
        joins: list[Entry] = []
        while self.joining and len(self.running) < self.config.max_num_seqs:
            seq = self.joining[0]
            offset = seq.computed - self.iteration
            self.phase.add(offset)
            if self.phase.next_growth(self.iteration) > self.free:
                self.phase.remove(offset)
                if self.running or self.promised or len(self.reserved) > len(self.joining):
                    break
                self._give_up(self.joining.pop(0), out)
                continue
            self.joining.pop(0)
            del self.reserved[seq.request_id]
            seq.offset, seq.target, seq.decoding = offset, seq.computed, True
            self.running[seq.request_id] = seq
            self.joined.append(seq.request_id)
            joins.append(Entry(seq.request_id, seq.computed, seq.computed + 1, decode=True))
        return tuple(joins)

    def _give_up(self, seq: Seq, out: list[Command]) -> None:
        """Nobody runs, nothing is on its way, and not one block is free: one of those that wait is computed anew."""
        out.append(FreeSpan(self.instance, seq.request_id))
        self.release(seq.request_id)
        seq.computed = 0
        self.waiting.appendleft(seq)

    def _admit(self, added: list[Entry], out: list[Command]) -> bool:
        """What is reserved comes back, what is promised will run: nobody has outgrown the instance on that account."""
        head = self.waiting[0]
        if (self.reserved or self.promised) and not self.running and head.request_id not in self.promised:
            growth = self.phase.next_growth(self.iteration) + self.watermark
            if self._blocks(head.known) + growth > self.free:
                return False
        return super()._admit(added, out)

    def _try(self, seq: Seq, reserve: int, out: list[Command]) -> Entry | None:
        """Who has a promise takes what is kept for it; the watermark is for others."""
        promised = self.promised.get(seq.request_id)
        if promised is None:
            return super()._try(seq, reserve, out)
        self.free += promised
        entry = super()._try(seq, reserve - self.watermark, out)
        if entry is None:
            self.free -= promised
        else:
            del self.promised[seq.request_id]
        return entry
