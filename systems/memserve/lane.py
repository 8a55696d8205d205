"""Continuous batching on one instance over its MemPool: prefills that leave, decodes that join with their KV, and both
in one place. Preempt = forget and recompute here, the last admitted first.

A running step gets a *grant*: blocks for the growth of so many iterations, active from the start, the rest given back
at its end. So the pool's free blocks are free at any moment, copies and swaps may take them under a running leap, and
no executor evicts anything by itself (`reclaim` stays 0).
"""

from __future__ import annotations

from collections import deque

from common.sched.compose import iterations_until_room, room_for
from common.sched.lane import EngineConfig
from common.sched.phase import PhaseCounter
from common.types import Abort, Command, Entry, FreeSpan, Interrupt, RunStep, Stage, StepDone, Tier
from systems.memserve.job import Job
from systems.memserve.mempool import MemPool

GRANTS = (256, 64, 16)  # iterations; the last is the least that cached blocks are evicted for


class PoolLane:
    """The lane of one instance."""

    def __init__(self, lane: int, pool: MemPool, config: EngineConfig, caching: bool) -> None:
        self.lane = lane
        self.pool = pool
        self.config = config
        self.caching = caching
        self.stages = (Stage(pool.instance, pool.layers),)
        self.watermark = int(config.watermark * pool.total[Tier.HBM])
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self.targets: list[Job] = []
        self.phase = PhaseCounter(config.block_size)
        self.iteration = 0
        self.busy = False
        self.stopping = False
        self.step = -1
        self.joined: list[Job] = []  # prefills that the last step took in
        self.num_preemptions = 0
        self._grant = 0
        self._started = False

    def reserve(self) -> int:
        """Blocks to leave free for those who are here when another one is to come."""
        if not self.running and not self.waiting:
            return 0
        return self.phase.next_growth(self.iteration) + 1 + self.watermark

    # ------------------------------------------------------------ events

    def submit(self, job: Job, out: list[Command]) -> None:
        """Queue a request; one whose KV is here goes before those to be computed."""
        if job.ready:
            at = next((index for index, other in enumerate(self.waiting) if not other.ready), len(self.waiting))
            self.waiting.insert(at, job)
        else:
            self.waiting.append(job)
        self.kick(out)

    def kick(self, out: list[Command]) -> None:
        """Something may let the queue's head start: schedule, or end the running step."""
        if not self.waiting:
            return
        if not self.busy:
            self.schedule(out)
        elif not self.stopping and self._may_start(self.waiting[0]):
            self.stopping = True
            out.append(Interrupt(self.lane))

    def _may_start(self, job: Job) -> bool:
        if len(self.running) >= self.config.max_num_seqs:
            return False
        if job.ready:
            return True
        budget = self.config.max_num_batched_tokens
        if self.targets and not room_for(self.config.rule, budget, self.phase.num, self.targets, job.known):
            return False
        return self.pool.can(self.pool.blocks(job.known) - self._hit(job) // self.pool.size - job.owned)

    def step_done(self, event: StepDone, out: list[Command]) -> tuple[list[Job], list[Job]]:
        """Settle a step that ended OK; (finished, prefilled and gone). Call `schedule` next."""
        clock = event.lane_iterations
        grown = self.phase.growth(self.iteration, clock - self.iteration)
        self.iteration = clock
        self.busy = self.stopping = False
        left = []
        finished = set(event.finished)
        for request_id, at in event.prefilled:
            job = self.running[request_id]
            self.targets.remove(job)
            job.known, job.computed, job.stored = job.target + 1, job.target, job.target
            if job.leaves and request_id not in finished:
                del self.running[request_id]
                job.owned = self.pool.blocks(job.target) - job.shared // self.pool.size
                left.append(job)
                continue
            job.offset, job.decoding = job.target - at, True
            self.phase.add(job.offset)
            grown += self.pool.blocks(job.offset + clock) - self.pool.blocks(job.target)
        for request_id, computed in event.partial:
            self.running[request_id].computed = computed
        assert grown <= self._grant, "a step grew beyond its grant"
        self.pool.give(self._grant - grown)
        self._grant = 0
        done = []
        for request_id in event.finished:
            job = self.running.pop(request_id)
            self.phase.remove(job.offset)
            job.stored = job.offset + clock
            job.known = job.stored + 1
            job.owned = self.pool.blocks(job.stored) - job.shared // self.pool.size
            done.append(job)
        return done, left

    def lost(self, event: StepDone | None) -> list[Job]:
        """The instance died: every request here, to be computed anew elsewhere."""
        if event is not None:
            self.iteration = event.lane_iterations
            for request_id, at in event.prefilled:
                job = self.running[request_id]
                job.known = job.target + 1
                job.offset, job.decoding = job.target - at, not job.leaves
        for job in self.running.values():
            if job.decoding:
                job.known = job.offset + self.iteration + 1
        orphans = [*self.running.values(), *self.waiting]
        self.running, self.targets, self.busy = {}, [], False
        self.waiting.clear()
        return orphans

    # ------------------------------------------------------------ decisions

    def schedule(self, out: list[Command]) -> None:
        """At a boundary: preempt what no longer fits, admit what does, and run with a grant."""
        removed = self._preempt()
        added: list[Entry] = []
        self.joined = []
        by_budget = self._admit(added, out) if not removed else False
        if not self.running and not removed:
            return
        limit = self._grant_growth(out)
        if by_budget:
            config = self.config
            until = iterations_until_room(config.rule, config.max_num_batched_tokens, self.phase.num, self.targets,
                                          self.waiting[0].known)  # fmt: skip
            limit = min(limit, until)
        if removed and self.waiting:
            limit = 1
        if self.config.max_leap is not None:
            limit = min(limit, self.config.max_leap)
        config, self.busy, self.step = self.config, True, self.pool.ids()
        first = not self._started
        self._started = True
        out.append(RunStep(self.step, self.lane, tuple(added), removed, (), (), (), self.stages if first else None,
                           config.max_num_batched_tokens if first else None, config.rule if first else None,
                           max(limit, 1)))  # fmt: skip

    def _preempt(self) -> tuple[int, ...]:
        """Take the last admitted out until the next iteration's new blocks can be had."""
        removed = []
        while self.running and not self.pool.can(self.phase.next_growth(self.iteration)):
            job = self.running.popitem()[1]
            if job.decoding:
                stored = job.offset + self.iteration
                self.phase.remove(job.offset)
                job.known = stored + 1
            else:
                self.targets.remove(job)
                stored = job.target
            self.pool.give(self.pool.blocks(stored) - job.shared // self.pool.size)
            self._forget(job)
            removed.append(job.request_id)
            self.waiting.appendleft(job)
            self.num_preemptions += 1
        return tuple(removed)

    def _forget(self, job: Job) -> None:
        self.pool.unpin(job.lease)
        job.lease, job.shared, job.computed, job.owned = None, 0, 0, 0
        job.decoding = job.ready = False

    def _admit(self, added: list[Entry], out: list[Command]) -> bool:
        """Admit from the head of the queue; True if the token budget stopped it."""
        config, pool = self.config, self.pool
        while self.waiting and len(self.running) < config.max_num_seqs:
            job = self.waiting[0]
            if job.ready:
                if not pool.can(self.phase.next_growth(self.iteration) + (job.computed % pool.size == 0)):
                    if self.running:
                        return False
                    if not self._relinquish(out):  # not even one block more: what it brought goes, to be recomputed
                        out.append(FreeSpan(pool.instance, job.request_id))
                        pool.give(job.owned)
                        self._forget(job)
                    continue
                added.append(self._join(job))
            elif pool.blocks(job.known) + self.watermark > pool.total[Tier.HBM]:
                self.waiting.popleft()
                pool.give(job.owned)
                self._forget(job)
                reason = f"output outgrew the KV cache of {pool.total[Tier.HBM]} blocks"
                out.append(Abort(job.request_id, reason))
                continue
            elif not room_for(config.rule, config.max_num_batched_tokens, self.phase.num, self.targets, job.known):
                return True
            elif (entry := self._try(job, out)) is not None:
                added.append(entry)
                self.targets.append(job)
                self.joined.append(job)
            else:
                if not self.running and (self._promote() or self._relinquish(out)):
                    continue
                return False
            self.waiting.popleft()
            self.running[job.request_id] = job
        return False

    def _join(self, job: Job) -> Entry:
        """Its KV is here and paid for; the lane takes it over."""
        job.offset, job.decoding, job.ready, job.owned = job.computed - self.iteration, True, False, 0
        self.phase.add(job.offset)
        return Entry(job.request_id, job.computed, job.computed + 1, job.shared, decode=True, keep=self.caching)

    def _hit(self, job: Job) -> int:
        """Tokens that are there without computing them."""
        if job.computed or not self.caching:
            return job.shared
        return self.pool.match(job.text(job.known), job.known - 1).hbm

    def _try(self, job: Job, out: list[Command]) -> Entry | None:
        """Take a request's blocks if they can be had beside the growth of others; a refusal leaves no trace."""
        pool, hit = self.pool, self._hit(job)
        text = job.text(job.known)
        need = pool.blocks(job.known) - hit // pool.size - job.owned
        reserve = self.phase.next_growth(self.iteration) + self.watermark
        if not pool.can(need + reserve):
            return None
        lease = job.lease or (pool.pin(text, hit) if self.caching else None)
        if not pool.can(need + reserve) or not pool.take(need, out):
            if lease is not job.lease:
                pool.unpin(lease, read=False)
            return None
        job.lease, job.shared, job.target, job.owned, job.decoding = lease, hit, job.known, 0, False
        job.computed = job.had = max(job.computed, hit)
        return Entry(job.request_id, job.computed, job.target, hit, leave=job.leaves, keep=self.caching or job.leaves)

    def _promote(self) -> bool:
        """Nothing runs and the head does not fit: somebody whose KV is here goes first."""
        ready = next((job for job in self.waiting if job.ready), None)
        if ready is not None:
            self.waiting.remove(ready)
            self.waiting.appendleft(ready)
        return ready is not None

    def _relinquish(self, out: list[Command]) -> bool:
        """Nothing runs and the head does not fit: what others fetched ahead of their turn goes."""
        for job in reversed(self.waiting):
            if not job.ready and (job.owned or job.lease is not None):
                if job.owned:
                    out.append(FreeSpan(self.pool.instance, job.request_id))
                    self.pool.give(job.owned)
                self._forget(job)
                return True
        return False

    def _grant_growth(self, out: list[Command]) -> int:
        """Blocks for the step's growth, as if every prefill that stays decoded already; how many iterations they do."""
        phase, pool = self.phase, self.pool
        soon = [job.target - self.iteration for job in self.targets if not job.leaves]
        if not phase.num and not soon:
            return 1 << 40
        for offset in soon:
            phase.add(offset)
        growth = 0
        for count in GRANTS:
            growth = phase.growth(self.iteration, count)
            if growth <= pool.free[Tier.HBM]:
                break
        available = pool.free[Tier.HBM] + pool.tree.evictable[Tier.HBM]
        growth = min(growth, available)
        taken = pool.take(growth, out)
        assert taken, "a grant of what can be had was refused"
        self._grant = growth
        limit = phase.iterations_within(self.iteration, growth)
        for offset in soon:
            phase.remove(offset)
        return limit
