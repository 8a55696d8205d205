"""A lane that preserves, swaps or discards each request that it preempts, whichever wastes the least memory-time.

Preserved requests are parked where they are and join again when the next iteration has a block for them; swapped ones
go to host DRAM and come back, ahead of new ones, when there is room. All of it happens at boundaries.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from math import inf

from common.sched.lane import EngineConfig, Seq
from common.sched.migrating import MigratingLane
from common.types import Command, Entry, FreeSpan, Interrupt, RunStep, Stage, Status, StepDone, SwapDone, SwapSpan, Tier
from systems.baselines.waste import Action, Rates

SMOOTHING = 0.125  # of the observed time between two finishes


class InterceptLane(MigratingLane):
    """See the module docstring. `now_ns` is its owner's to set before each call. `host_free`: blocks of DRAM."""

    def __init__(self, lane: int, stages: tuple[Stage, ...], num_blocks: int, config: EngineConfig, host_blocks: int,
                 rates: Rates, actions: Collection[Action]) -> None:  # fmt: skip
        super().__init__(lane, stages, num_blocks, config)
        self.rates = rates
        self.actions = actions
        self.host_free = host_blocks
        self.swapped: deque[Seq] = deque()  # their KV is in DRAM
        self.moving: dict[int, tuple[Seq, bool]] = {}  # swap command -> (request, out?)
        self.taken: Counter[Action] = Counter()
        self.now_ns = 0
        self._parks: list[tuple[Seq, Action]] = []  # of this boundary
        self._gap_ns = inf  # between two finishes
        self._finished_ns = -1

    # ------------------------------------------------------------ queries

    def paused(self) -> int:
        """Requests that have KV and do not run."""
        return len(self.joining) + len(self.swapped) + len(self.moving)

    def outstanding(self) -> int:
        """Waiting, running and paused."""
        return super().outstanding() + self.paused()

    def _may_start(self, seq: Seq) -> bool:
        return not self.paused() and super()._may_start(seq)

    def _leaving_tokens(self) -> int:
        return sum(seq.computed for seq, out in self.moving.values() if out)

    # ------------------------------------------------------------ events

    def step_done(self, event: StepDone, out: list[Command]) -> list[Seq]:
        """As the base; finishes tell how soon memory comes free."""
        done = super().step_done(event, out)
        if done:
            if self._finished_ns >= 0:
                gap = (self.now_ns - self._finished_ns) / len(done)
                self._gap_ns = gap if self._gap_ns == inf else self._gap_ns + SMOOTHING * (gap - self._gap_ns)
            self._finished_ns = self.now_ns
        return done

    def swap_done(self, event: SwapDone, out: list[Command]) -> None:
        """KV has changed its tier, or has stayed where it was."""
        seq, outwards = self.moving.pop(event.command_id)
        blocks = self._blocks(seq.computed)
        if outwards == (event.status is Status.OK):  # it is in DRAM now
            self.release(seq.request_id)
            self.swapped.appendleft(seq)
        else:
            self.host_free += blocks
            self.joining.insert(0, seq)
        if not self.busy:
            self.schedule(out)
        elif not self.stopping:
            self.stopping = True
            out.append(Interrupt(self.lane))

    def lost(self, event: StepDone | None) -> list[Seq]:
        """The instance died, its DRAM too."""
        orphans = super().lost(event)
        elsewhere = [*self.swapped, *(seq for seq, _ in self.moving.values())]
        for seq in elsewhere:
            seq.computed = 0
        self.swapped.clear()
        self.moving.clear()
        return orphans + elsewhere

    # ------------------------------------------------------------ decisions

    def schedule(self, out: list[Command]) -> None:
        """At a boundary: bring back what fits, then as the base, and let the victims of this boundary leave."""
        self._bring_back(out)
        mark = len(out)
        super().schedule(out)
        parks, self._parks = self._parks, []
        self.left.clear()
        self.preempted.clear()
        self.joined.clear()
        if not parks:
            return
        ids = tuple(seq.request_id for seq, _ in parks)
        step = out[-1] if len(out) > mark else None
        if isinstance(step, RunStep):
            out[-1] = step._replace(park=(*step.park, *ids))
        else:
            out.append(RunStep(self._command_id(), self.lane, park=ids))
            self.busy = True
        for seq, action in parks:
            if action is Action.SWAP:
                self._swap(seq, True, out)

    def _swap(self, seq: Seq, outwards: bool, out: list[Command]) -> None:
        command_id = self._command_id()
        self.moving[command_id] = (seq, outwards)
        stage = self.stages[0]
        out.append(SwapSpan(command_id, seq.request_id, stage.instance, stage.layers, (0, seq.computed), outwards))

    def _bring_back(self, out: list[Command]) -> None:
        """From DRAM, while each who runs would still find a block; who fits no empty instance is computed anew."""
        while self.swapped and not self.joining and len(self.running) + len(self.moving) < self.config.max_num_seqs:
            seq = self.swapped[0]
            blocks = self._blocks(seq.computed)
            if blocks + len(self.running) + 1 <= self.free:
                self.swapped.popleft()
                self.reserve(seq.request_id, blocks)
                self._swap(seq, False, out)
                continue
            if self.running or self.reserved:
                return
            self.swapped.popleft()
            out.append(FreeSpan(self.instance, seq.request_id, tier=Tier.DRAM))
            self.host_free += blocks
            seq.computed = 0
            self.waiting.appendleft(seq)

    def _admit(self, added: list[Entry], out: list[Command]) -> bool:
        """Those who have KV come first."""
        if self.paused() or self._parks:
            return False
        return super()._admit(added, out)

    def _preempt(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """From the last admitted on; once enough is on its way to DRAM, those who would grow now wait for it."""
        phase, removed = self.phase, []
        leaving = sum(self._blocks(seq.computed) for seq, out in self.moving.values() if out)
        under_way = self._leaving_tokens()
        while self.running and phase.next_growth(self.iteration) > self.free:
            lacking = phase.next_growth(self.iteration) - self.free
            if leaving >= lacking:
                self._park(next(seq for seq in reversed(self.running.values()) if self._grows(seq)), Action.PRESERVE)
                continue
            seq = next(reversed(self.running.values()))
            action = self._choose(seq, under_way)
            if action is Action.DISCARD:
                removed.append(self._discard(seq))
                continue
            self._park(seq, action)
            if action is Action.SWAP:
                leaving += self._blocks(seq.computed)
                under_way += seq.computed
        return tuple(removed), (0,) * len(removed)

    def _grows(self, seq: Seq) -> bool:
        """Does its next iteration need a block?"""
        return seq.decoding and (seq.offset + self.iteration) % self.config.block_size == 0

    def _choose(self, seq: Seq, under_way: int) -> Action:
        """The least waste of what is possible; ties to discarding."""
        if not seq.decoding:
            return Action.DISCARD
        tokens = self.stored(seq)
        others = sum(self.stored(one) for one in self.running.values()) - tokens
        wait_ns = self._gap_ns * (1 + self.paused() + len(self._parks))
        wastes = self.rates.wastes(tokens, others, wait_ns, under_way)
        able = {Action.DISCARD}
        if self._grows(seq) and len(self.running) > 1:
            able.add(Action.PRESERVE)
        if self._blocks(tokens) <= self.host_free:
            able.add(Action.SWAP)
        return min((action for action in Action if action in able and action in self.actions), key=wastes.__getitem__)

    def _discard(self, seq: Seq) -> int:
        self.taken[Action.DISCARD] += 1
        del self.running[seq.request_id]
        if seq.decoding:
            charged = seq.offset + self.iteration
            self.phase.remove(seq.offset)
            seq.known = charged + 1
        else:
            self.targets.remove(seq)
            charged = seq.target
        self.free += self._blocks(charged)
        seq.decoding, seq.computed = False, 0
        self.waiting.appendleft(seq)
        self.num_preemptions += 1
        return seq.request_id

    def _park(self, seq: Seq, action: Action) -> None:
        """It leaves the batch with its KV: to wait here, or for DRAM."""
        self.taken[action] += 1
        del self.running[seq.request_id]
        stored = seq.offset + self.iteration
        self.phase.remove(seq.offset)
        seq.known, seq.computed, seq.decoding = stored + 1, stored, False
        self.reserved[seq.request_id] = self._blocks(stored)
        self._parks.append((seq, action))
        if action is Action.SWAP:
            self.host_free -= self._blocks(stored)
        else:
            self.joining.insert(0, seq)
