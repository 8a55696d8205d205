"""Continuous batching on one lane as vLLM does it: admission in order, chunked or prefill-first, preemption by
recompute of the last admitted, optional prefix caching. A pure state machine that policies own, one per lane.

The ledger keeps counts of blocks: free + private to requests + cached = total. `max_iterations` of every step is the
most that nothing here could object to: until blocks run out, until the token budget has room for the queue's head,
or, with prefix caching, until a prompt completes (it may turn misses of the queue's head into hits, and its lease pins
cached blocks). So leaps of any length decide alike.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from common.errors import ContractError
from common.kv.index import Lease, PrefixIndex
from common.sched.compose import iterations_until_reached, iterations_until_room, room_for
from common.sched.phase import PhaseCounter
from common.types import (
    Abort,
    Command,
    Content,
    Entry,
    FreeSpan,
    Interrupt,
    Rule,
    RunStep,
    Stage,
    StepDone,
)

new_tuple = tuple.__new__  # of a NamedTuple, past its Python-level constructor: three times as fast
assert (len(RunStep._fields), len(Entry._fields)) == (12, 11), "LaneScheduler names every field of both"
PLENTY = 1024  # iterations


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine. `watermark`: share of blocks that admissions leave free (vLLM V0: 1%, V1: none)."""

    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    rule: Rule = Rule.CHUNKED
    prefix_caching: bool = False
    watermark: float = 0.0
    max_leap: int | None = None
    max_model_len: int = 1 << 40


class Seq:
    """A request as its lane's scheduler sees it. Tokens known = prompt and generated so far."""

    __slots__ = (
        "computed", "content", "credited", "decoding", "known", "lease", "max_output", "offset", "prompt",
        "request_id", "session", "shared", "target",
    )  # fmt: skip

    def __init__(self, request_id: int, prompt: int, max_output: int, content: Content | None, session: int) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.known = prompt
        self.max_output = max_output
        self.content = content
        self.session = session
        self.computed = 0
        self.target = 0
        self.offset = 0
        self.shared = 0  # blocks read from the cache, charged to nobody
        self.credited = 0  # own blocks that the cache has taken over
        self.lease: Lease | None = None
        self.decoding = False

    def text(self, tokens: int) -> Content:
        """Content of the first `tokens` tokens: the prompt, then the request's own output."""
        own = self.content or ((f"p:{self.request_id}", 0, self.prompt),)
        if tokens <= self.prompt:
            return own
        return (*own, (f"gen:{self.request_id}", 0, tokens - self.prompt))


class LaneScheduler:
    """Owns one lane and the KV ledger of its instance (a lane over several stages: of each)."""

    def __init__(self, lane: int, stages: tuple[Stage, ...], num_blocks: int, config: EngineConfig) -> None:
        self.lane = lane
        self.stages = stages
        self.config = config
        self.block_size = config.block_size
        self.num_blocks = num_blocks
        self.free = num_blocks
        self.watermark = int(config.watermark * num_blocks)
        self.index = PrefixIndex(config.block_size) if config.prefix_caching else None
        self.waiting: deque[Seq] = deque()
        self.running: dict[int, Seq] = {}  # in order of admission
        self.targets: list[Seq] = []  # those still prefilling, in order
        self.phase = PhaseCounter(config.block_size)
        self.iteration = 0
        self.busy = False
        self.stopping = False
        self.num_preemptions = 0
        self._started = False
        self._next_id = lane << 32
        self._interrupt = Interrupt(lane)
        self._taken_over = 0  # cached blocks that this step's joins take over

    # ------------------------------------------------------------ queries

    def outstanding(self) -> int:
        """Requests waiting and running."""
        return len(self.waiting) + len(self.running)

    def available(self) -> int:
        """Blocks that can be had: free ones and unpinned cached ones."""
        return self.free + self.index.evictable_blocks if self.index is not None else self.free

    def used_blocks(self) -> int:
        """Blocks that requests hold or pin."""
        return self.num_blocks - self.available()

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def refusal(self, seq: Seq) -> str | None:
        """Why this request can never run here, or None."""
        longest = seq.prompt + 1
        if longest > self.config.max_model_len:
            return f"prompt of {seq.prompt} tokens exceeds max_model_len {self.config.max_model_len}"
        if self._blocks(longest) + self.watermark > self.num_blocks:
            return f"prompt of {seq.prompt} tokens exceeds the KV cache of {self.num_blocks} blocks"
        budget = self.config.max_num_batched_tokens
        if self.config.rule is Rule.PREFILL_FIRST and seq.prompt > budget:
            return f"prompt of {seq.prompt} tokens exceeds max_num_batched_tokens {budget} (no chunked prefill)"
        return None

    # ------------------------------------------------------------ events

    def submit(self, seq: Seq, out: list[Command]) -> None:
        """Queue a request; start or interrupt the lane if it could run at the next boundary."""
        waiting = self.waiting
        waiting.append(seq)
        if not self.busy:
            self.schedule(out)
        elif not self.stopping and len(waiting) == 1 and self._may_start(seq):
            self.stopping = True
            out.append(self._interrupt)

    def _may_start(self, seq: Seq) -> bool:
        """Optimistic: blocks that the running leap has taken since its start are not known yet."""
        if len(self.running) >= self.config.max_num_seqs:
            return False
        if self.index is not None:
            return True
        return -(-seq.known // self.block_size) + self.watermark <= self.free

    def step_done(self, event: StepDone, out: list[Command]) -> list[Seq]:
        """Settle a step that ended OK and return the finished requests; call `schedule` next."""
        _, _, _, _, clock, finished, prefilled, partial, _ = event
        grown = self.phase.growth(self.iteration, clock - self.iteration)
        self.iteration = clock
        self.busy = self.stopping = False
        self._charge_growth(grown)  # first: what a new prompt's lease pins can be evicted no more
        running = self.running
        if prefilled:
            grown = 0
            for request_id, at in prefilled:
                grown += self._prefilled(running[request_id], at)
            self._charge_growth(grown)
        for request_id, computed in partial:
            running[request_id].computed = computed
        return [self._finish(request_id, out) for request_id in finished] if finished else []

    def _prefilled(self, seq: Seq, at: int) -> int:
        """A target was reached: it decodes from then on. Returns the blocks it has grown by since."""
        seq.known = seq.target + 1
        seq.computed = seq.target
        seq.offset = seq.target - at
        seq.decoding = True
        self.targets.remove(seq)
        self.phase.add(seq.offset)
        if self.index is not None and seq.lease is not None:
            seq.credited += self.index.extend(seq.lease, seq.text(seq.target), seq.target)
        return self._blocks(seq.offset + self.iteration) - self._blocks(seq.target)

    def _charge_growth(self, blocks: int) -> None:
        """The executor took these as its iterations needed them, the last of them out of the cache."""
        if blocks > self.free:
            if self.index is None:
                raise ContractError(f"lane {self.lane}: grew by {blocks} blocks of {self.free} free")
            self.index.evict(blocks - self.free)
            self.free = 0
        else:
            self.free -= blocks

    def _finish(self, request_id: int, out: list[Command]) -> Seq:
        seq = self.running.pop(request_id)
        stored = seq.offset + self.iteration
        self.phase.remove(seq.offset)
        retained = self._give_back(seq, stored, stored)
        seq.known = stored + 1
        if self.index is not None:
            for stage in self.stages:
                out.append(FreeSpan(stage.instance, request_id, retain=retained))
        return seq

    def _give_back(self, seq: Seq, charged: int, stored: int) -> int:
        """Return a request's blocks to the ledger; with caching its full blocks stay. Returns blocks retained."""
        if self.index is not None and seq.lease is not None:
            seq.credited += self.index.extend(seq.lease, seq.text(stored), stored)
            self.index.release(seq.lease)
            seq.lease = None
        self.free += self._blocks(charged) - seq.shared - seq.credited
        retained, seq.credited, seq.shared = seq.credited, 0, 0
        return retained

    def lost(self, event: StepDone | None) -> list[Seq]:
        """The instance died (`event`: the step that failed with it): every request, to be computed anew elsewhere."""
        if event is not None:
            self.iteration = event.lane_iterations
            for request_id, at in event.prefilled:
                seq = self.running[request_id]
                seq.offset, seq.decoding = seq.target - at, True
        for seq in self.running.values():
            if seq.decoding:
                seq.known = seq.offset + self.iteration + 1
            seq.decoding, seq.computed, seq.lease, seq.shared, seq.credited = False, 0, None, 0, 0
        orphans = [*self.running.values(), *self.waiting]
        self.running, self.targets = {}, []
        self.waiting.clear()
        self.phase = PhaseCounter(self.config.block_size)
        return orphans

    # ------------------------------------------------------------ decisions

    def schedule(self, out: list[Command]) -> None:
        """At a boundary: preempt what no longer fits, admit what does, and run."""
        phase = self.phase
        removed: tuple[int, ...] = ()
        retained: tuple[int, ...] = ()
        if phase.num > self.free and phase.next_growth(self.iteration) > self.available():
            removed, retained = self._preempt()
        added: list[Entry] = []
        blocked_by_budget = False
        self._taken_over = 0
        if self.waiting and not removed:
            blocked_by_budget = self._admit(added, out)
        if not self.running:
            if removed:
                out.append(RunStep(self._command_id(), self.lane, (), removed, retained))
                self.busy = True
            return
        limit = self._limit(bool(removed), blocked_by_budget)
        reclaim = self.index.evictable_blocks + self._taken_over if self.index is not None else 0
        if self._started:
            self._next_id += 1
            step = new_tuple(RunStep, (self._next_id, self.lane, tuple(added), removed, retained, (), (), None, None,
                                       None, limit, reclaim))  # fmt: skip
        else:
            self._started = True
            config = self.config
            step = RunStep(self._command_id(), self.lane, tuple(added), removed, retained, (), (), self.stages,
                           config.max_num_batched_tokens, config.rule, limit, reclaim)  # fmt: skip
        self.busy = True
        out.append(step)

    def _command_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _preempt(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Take the last admitted out of the lane until the next iteration's new blocks are there."""
        phase = self.phase
        removed, retained = [], []
        while self.running and phase.next_growth(self.iteration) > self.available():
            seq = self.running.popitem()[1]
            if seq.decoding:
                stored = seq.offset + self.iteration
                phase.remove(seq.offset)
                charged = stored
                seq.known = stored + 1
            else:
                self.targets.remove(seq)
                stored, charged = seq.computed, seq.target
            removed.append(seq.request_id)
            retained.append(self._give_back(seq, charged, max(stored, 0)))
            seq.decoding, seq.computed = False, 0
            self.waiting.appendleft(seq)
            self.num_preemptions += 1
        return tuple(removed), tuple(retained)

    def _admit(self, added: list[Entry], out: list[Command]) -> bool:
        """Admit from the head of the queue; True if the token budget stopped it.

        Whoever would not fit if it were alone has outgrown the instance: no order of events could finish it.
        """
        config, waiting = self.config, self.waiting
        growth = self.phase.next_growth(self.iteration) + self.watermark
        while waiting and len(self.running) < config.max_num_seqs:
            seq = waiting[0]
            if not room_for(config.rule, config.max_num_batched_tokens, self.phase.num, self.targets, seq.known):
                return True
            entry = self._try(seq, growth, out)
            if entry is None and (self.running or not self._hopeless(seq)):
                return False
            waiting.popleft()
            if entry is None:
                out.append(Abort(seq.request_id, f"output outgrew the KV cache of {self.num_blocks} blocks"))
                continue
            added.append(entry)
            self.running[seq.request_id] = seq
        return False

    def _hopeless(self, seq: Seq) -> bool:
        """Does not even an otherwise empty lane help? Not so where others hold some of its memory for a while."""
        return True

    def _try(self, seq: Seq, reserve: int, out: list[Command]) -> Entry | None:
        """Take a request's blocks if they can be had beside `reserve` others; a refusal leaves no trace."""
        need = self._blocks(seq.known)
        index = self.index
        if index is None:
            if need + reserve > self.free:
                return None
            hit = 0
        else:
            text = seq.text(seq.known)
            hit = index.match(text, seq.known - 1)
            cached = hit // self.config.block_size
            need -= cached
            spare = self.free + index.evictable_blocks - need - reserve
            if spare < 0 or (spare < cached and spare < index.would_pin(text, hit)):
                return None  # what it reads cannot be evicted for it
            lease = index.acquire(text, hit)
            seq.lease = lease
            if need > self.free:  # the join takes them over: `reclaim` covers it
                index.evict(need - self.free)
                self._taken_over += need - self.free
                self.free = need
        self.free -= need
        seq.shared = hit // self.config.block_size
        seq.computed, seq.target, seq.decoding = hit, seq.known, False
        self.targets.append(seq)
        caching = index is not None
        return new_tuple(Entry, (seq.request_id, hit, seq.known, hit, True, False, caching, False, None, None, caching))

    def _limit(self, preempted: bool, blocked_by_budget: bool) -> int | None:
        """Iterations after which something may have to be decided (at least one)."""
        config, phase, targets = self.config, self.phase, self.targets
        if preempted and self.waiting:
            return 1
        available = self.available()
        # Where memory is plentiful a bound from below does: the step may end early, and is then only resubmitted.
        limit = available // (phase.num + len(targets)) * self.block_size
        if limit < PLENTY:
            for seq in targets:  # as if they decoded already: never too late
                phase.add(seq.target - self.iteration)
            limit = phase.iterations_within(self.iteration, available)
            for seq in targets:
                phase.remove(seq.target - self.iteration)
        if blocked_by_budget:
            head = self.waiting[0].known
            until = iterations_until_room(config.rule, config.max_num_batched_tokens, phase.num, targets, head)
            limit = min(limit, until)
        if targets and self.index is not None:
            until = iterations_until_reached(config.rule, config.max_num_batched_tokens, phase.num, targets)
            limit = min(limit, until)
        if config.max_leap is not None:
            limit = min(limit, config.max_leap)
        return limit if limit > 1 else 1
