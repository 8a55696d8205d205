"""KV between instances and tiers: P -> D (steps 1 and 3 of Table 4), D -> P (step 5), a longer prefix from elsewhere
(Eq. 2), and back from DRAM. What is under way is found by its command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.types import Command, CopyDone, FreeSpan, SwapDone
from systems.memserve.config import DESIGNS, Options, num_calls
from systems.memserve.job import Job
from systems.memserve.mempool import MemPool, Transfer
from systems.memserve.site import Flow, Pending, Site
from systems.memserve.tree import Lease


class Handover:
    """See the module docstring. `adrift(instance, job)`: the instance it needs is dead, or not known alive."""

    def __init__(self, options: Options, sites: dict[int, Site], flows: dict[int, Flow],
                 adrift: Callable[[int, Job], None]) -> None:  # fmt: skip
        self.options = options
        self.design = DESIGNS[options.design]
        self.sites = sites
        self.flows = flows
        self.adrift = adrift
        self.copies: dict[int, tuple[Pending, Transfer]] = {}
        self.swaps: dict[int, tuple[MemPool, Job | None]] = {}
        self.token_bytes = 0

    def calls(self, site: Site, tokens: int) -> int:
        """Network calls of so many tokens."""
        pool = site.pool
        return num_calls(self.options.transfer, pool.blocks(tokens), pool.layers[1], self.options.communicators)

    # ------------------------------------------------------------ before a prefill

    def accept(self, site: Site, job: Job, fetch: int, out: list[Command]) -> None:
        """A request comes to its prefill instance: what is not in its HBM is swapped in or fetched if that pays."""
        pool, planner = site.pool, self.options.planner
        if site.caches:
            text = job.text(job.known)
            found = pool.match(text, job.known - 1)
            if found.total > found.hbm:
                wire = planner.swap_ns((found.total - found.hbm) * self.token_bytes)
                gain = planner.exec_ns(job.known, found.hbm) - planner.exec_ns(job.known, found.total)
                swap = pool.swap_in(text, found, out) if wire <= gain else None
                if swap is not None:
                    self.swaps[swap.command_id] = pool, job
                    self.flows[job.request_id].swapped += found.total - found.hbm
                    return
            if fetch >= 0 and self._fetch(site, self.sites[fetch], job, found.hbm, out):
                return
        site.lane.submit(job, out)

    def _fetch(self, site: Site, other: Site, job: Job, have: int, out: list[Command]) -> bool:
        """Eq. 2 with what is really there: the tree may have promised too much."""
        if other.pool.dead or not other.caches or other is site:
            return False
        planner, text = self.options.planner, job.text(job.known)
        there = other.pool.match(text, job.known - 1).hbm
        wire = planner.send_ns((there - have) * self.token_bytes)
        if there <= have or wire > planner.exec_ns(job.known, have) - planner.exec_ns(job.known, there):
            return False
        source, lease = other.pool.pin(text, there), site.pool.pin(text, have)
        move = other.pool.transfer(site.pool, job.request_id, (have, there), out, lease=lease,
                                   num_calls=self.calls(site, there - have))  # fmt: skip
        if move is None:
            other.pool.unpin(source, read=False)
            site.pool.unpin(lease, read=False)
            return False
        move.src_lease = source
        self.copies[move.command_id] = Pending("fetch", job), move
        return True

    def swap_done(self, event: SwapDone, out: list[Command]) -> None:
        """A swap ended; the prefill that waited for it may run."""
        pool, job = self.swaps.pop(event.command_id, (None, None))
        if pool is None:
            for site in self.sites.values():
                if site.pool.swap_done(event.command_id, event.status) is not None:
                    site.lane.kick(out)
                    site.tidy(out)
            return
        swap = pool.swap_done(event.command_id, event.status)
        if swap is not None and job is not None:
            job.lease, job.shared, job.computed = swap.lease, swap.lease.tokens, swap.lease.tokens
            self.sites[pool.instance].lane.submit(job, out)

    # ------------------------------------------------------------ P -> D

    def send(self, job: Job, out: list[Command], after: int | None = None) -> bool:
        """Hand a prompt's KV over, by layer while step `after` computes it. False: no room, or not its turn yet."""
        src, dst = self.sites[job.prefill_at], self.sites[job.decode_at]
        if dst.pool.dead:
            if after is None:
                self.adrift(job.decode_at, job)
            return True
        if self.options.ordered and any(move.src is src.pool for _, move in self.copies.values()):
            return False  # its turn comes when the copy before it has ended
        text, lease, hit = job.text(job.target), None, 0
        if self.design.decode_caches:
            hit = dst.pool.match(text, job.target).hbm
            lease = dst.pool.pin(text, hit)
        if hit == job.target:
            if after is not None:
                dst.pool.unpin(lease, read=False)
                return False  # nothing to send: settled when the prefill is done
            self._received(job, src, dst, None, hit, lease, out)
            return True
        flags: dict[str, Any] = {
            "lease": lease, "after": after, "by_layer": after is not None,
            "reserve": dst.lane.reserve(),
            "num_calls": self.calls(dst, job.target - hit),
        }  # fmt: skip
        if self.design.decode_caches:
            move = src.pool.transfer_with_insert(dst.pool, job.request_id, text, (hit, job.target), out, **flags)
        else:
            move = src.pool.transfer(dst.pool, job.request_id, (hit, job.target), out, **flags)
        if move is None:
            dst.pool.unpin(lease, read=False)
            return False
        job.copy = move
        self.copies[move.command_id] = Pending("send", job), move
        return True

    def sent(self, site: Site, out: list[Command]) -> None:
        """By layer: copies follow the prefills that have just joined."""
        joined, site.lane.joined = site.lane.joined, []
        if self.options.transfer == "by_layer":
            for job in joined:
                if job.leaves and job.copy is None:
                    self.send(job, out, after=site.lane.step)

    def push(self, job: Job, out: list[Command]) -> None:
        """Its prefill is done: send, unless that is under way; wait for room if there is none."""
        if job.copy is None and not self.send(job, out):
            self.sites[job.decode_at].pending.append(job)

    def stay(self, job: Job, out: list[Command]) -> None:
        """No decode instance is left: it is decoded where its prompt is."""
        job.decode_at, job.leaves, job.ready, job.computed = job.prefill_at, False, True, job.target
        self.sites[job.prefill_at].lane.submit(job, out)

    def retry(self, site: Site, out: list[Command]) -> None:
        """There may be room now."""
        while site.pending and self.send(site.pending[0], out):
            site.pending.popleft()

    def copy_done(self, event: CopyDone, out: list[Command]) -> None:
        """A transfer was answered."""
        pending, move = self.copies.pop(event.command_id)
        job, kind = pending.job, pending.kind
        ok = move.dst.arrived(move, event.status, out)
        site = self.sites[move.dst.instance]
        stale = site.pool is not move.dst  # it died, and may be back by now
        if kind == "fetch":
            move.src.unpin(move.src_lease)
            if stale or move.dst.dead or job.request_id not in site.homed:
                return
            if ok:
                job.lease, job.owned = move.lease, move.blocks
                job.shared, job.computed = move.tokens
                self.flows[job.request_id].fetched += job.computed - job.shared
            site.lane.submit(job, out)
        elif kind == "back":
            move.src.unpin(move.src_lease)
            if ok:
                assert move.insert is not None and move.lease is not None
                end = move.dst.retire(job.request_id, move.insert, move.tokens, move.blocks, move.lease, out)
                move.dst.unpin(move.lease)
                flow = self.flows[job.request_id]
                flow.back_tokens += move.tokens[1] - move.tokens[0]
                flow.back_bytes += event.num_bytes
                self.respond(site, job, ((site.instance, end),), out)
        elif job.copy is move:
            job.copy = None
            if ok:
                self.flows[job.request_id].sent_bytes += event.num_bytes
                self._received(job, self.sites[job.prefill_at], site, move, move.tokens[0], move.lease, out)
            elif job.owned and job.request_id in self.sites[job.prefill_at].homed:
                self.push(job, out)  # its prompt is still at P
        if not stale and not site.pool.dead:
            self.retry(site, out)
            site.lane.kick(out)
            site.tidy(out)

    def _received(self, job: Job, src: Site, dst: Site, move: Transfer | None, start: int,
                  lease: Lease | None, out: list[Command]) -> None:  # fmt: skip
        """D has the prompt. P inserts or frees its own; D inserts what came and decodes."""
        if src.caches:
            assert job.lease is not None
            src.pool.retire(job.request_id, job.text(job.target), (job.shared, job.target), job.owned, job.lease, out)
            src.pool.unpin(job.lease)
        else:
            out.append(FreeSpan(src.instance, job.request_id))
            src.pool.give(job.owned)
        del src.homed[job.request_id]
        dst.homed[job.request_id] = job
        self.flows[job.request_id].sent_tokens += job.target - start
        job.lease, job.shared, job.owned, job.computed, job.ready = lease, start, 0, job.target, True
        job.leaves = False
        if move is not None:
            job.owned = move.blocks
            if move.insert is not None:
                self._insert_prompt(job, dst, start, out)
        dst.lane.submit(job, out)
        src.lane.kick(out)
        self.sent(src, out)
        src.tidy(out)

    @staticmethod
    def _insert_prompt(job: Job, dst: Site, start: int, out: list[Command]) -> None:
        pool = dst.pool
        assert job.lease is not None
        done = pool.insert(job.text(job.target), job.target, job.lease, out)
        if done.end > start:
            out.append(FreeSpan(dst.instance, job.request_id, tokens=(start, done.end), retain=done.num_new))
            freed = (done.end - start) // pool.size
            pool.give(freed - done.num_new)
            job.owned -= freed
            job.shared = done.end

    # ------------------------------------------------------------ the end of a request

    def finish(self, site: Site, job: Job, out: list[Command]) -> None:
        """Its KV becomes historical, or is freed; D's part goes back to P under PD-Caching-3."""
        pool, text = site.pool, job.text(job.stored)
        site.homed.pop(job.request_id, None)
        cached: list[tuple[int, int]] = []
        if site.caches:
            assert job.lease is not None
            end = pool.retire(job.request_id, text, (job.shared, job.stored), job.owned, job.lease, out)
            cached.append((site.instance, end))
            home = self.sites.get(job.prefill_at)
            if site.role == "decode" and home is not None and not home.pool.dead and home.role == "prefill":
                if self.design.back and self._back(site, home, job, end, out):
                    job.lease = None  # the copy holds it
                cached.append((home.instance, job.prompt))
            pool.unpin(job.lease)
        else:
            pool.give(job.owned)
            if site.lane.caching or job.leaves:
                out.append(FreeSpan(site.instance, job.request_id))
            home = self.sites.get(job.prefill_at)
            if home is not None and home is not site and home.caches:
                cached.append((job.prefill_at, job.prompt))
        job.lease, job.owned = None, 0
        self.respond(site, job, tuple(cached), out)
        site.tidy(out)

    def _back(self, site: Site, home: Site, job: Job, end: int, out: list[Command]) -> bool:
        """Step 5: what P lacks of the path goes there, read from D's cache."""
        text = job.text(end)
        have = home.pool.match(text, end)
        if have.total >= end or have.total > have.hbm:
            return False
        lease = home.pool.pin(text, have.hbm)
        move = site.pool.transfer_with_insert(home.pool, job.request_id, text, (have.hbm, end), out, lease=lease,
                                              num_calls=self.calls(home, end - have.hbm))  # fmt: skip
        if move is None:
            home.pool.unpin(lease, read=False)
            return False
        move.src_lease = job.lease
        self.copies[move.command_id] = Pending("back", job), move
        return True

    def respond(self, site: Site, job: Job, cached: tuple[tuple[int, int], ...], out: list[Command]) -> None:
        """The scheduler learns from responses only."""
        at = job.prefill_at, job.decode_at
        site.outbox.say(("response", job.request_id, at, cached, job.text(job.stored)), out)

    def drop(self, instance: int) -> None:
        """An instance died: nobody waits for its swaps."""
        self.swaps = {key: (pool, job) for key, (pool, job) in self.swaps.items() if pool.instance != instance}

