"""One instance as its agent sees it: pool, lane, and the requests that are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from common.policy import Gauge
from common.sched.lane import EngineConfig
from common.types import Command, InstanceInfo, Tier
from systems.memserve.channel import Outbox
from systems.memserve.config import DESIGNS, Options
from systems.memserve.job import Job
from systems.memserve.lane import PoolLane
from systems.memserve.mempool import MemPool


class Flow:
    """What a request moved and hit: the counters of the design ladder. Sums over its tries."""

    __slots__ = ("back_bytes", "back_tokens", "decode_at", "expected", "fetched", "hit", "prefill_at", "prompt",
                 "sent_bytes", "sent_tokens", "session", "swapped")  # fmt: skip

    def __init__(self, prompt: int, session: int) -> None:
        self.prompt = prompt
        self.session = session
        self.prefill_at = self.decode_at = -1
        self.hit = 0  # prompt tokens that the prefill read from a cache
        self.expected = 0  # what the scheduler's tree promised
        self.fetched = self.swapped = 0  # of the hits: brought from another instance, or from DRAM
        self.sent_tokens = self.sent_bytes = self.back_tokens = self.back_bytes = 0


class Pending(NamedTuple):
    """A copy under way, and whose."""

    kind: str  # send | back | fetch
    job: Job


class Site:
    """See above. `caches`: does this role of the design insert and match? `start`: how often it was started before."""

    def __init__(self, info: InstanceInfo, role: str, num_blocks: int, lane_id: int, start: int, engine: EngineConfig,
                 options: Options, ids: Callable[[], int]) -> None:  # fmt: skip
        design = DESIGNS[options.design]
        self.instance = info.instance
        self.role = role
        self.caches = design.decode_caches if role == "decode" else design.prefill_caches
        self.pool = MemPool(info, num_blocks, engine.block_size, ids, options.eviction)
        self.lane = PoolLane(lane_id, self.pool, engine, self.caches)
        self.start = start
        self.outbox = Outbox(info.instance, start, keep=options.heartbeat_s > 0)
        self.homed: dict[int, Job] = {}  # whose KV is here, or who waits for it to be
        self.pending: deque[Job] = deque()  # prefilled elsewhere, waiting for room here
        self._swaps = options.swap and self.caches and role != "decode" and self.pool.total[Tier.DRAM] > 0
        self._low, self._high = options.swap_low, options.swap_high

    def tidy(self, out: list[Command]) -> None:
        """In the background: when little is free, cached blocks go to DRAM before they must go for good."""
        pool = self.pool
        if not self._swaps or pool.tree.cached[None]:
            return
        total, free = pool.total[Tier.HBM], pool.free[Tier.HBM]
        if free < self._low * total:
            pool.swap_out(int(self._high * total) - free, out)

    def gauge(self, param_bytes: int) -> Gauge:
        """What it holds now."""
        pool, lane = self.pool, self.lane
        total, evictable = pool.total[Tier.HBM], pool.tree.evictable[Tier.HBM]
        used = total - pool.free[Tier.HBM] - evictable
        return Gauge(self.instance, len(lane.running), len(lane.waiting), used, total, evictable,
                     param_bytes=param_bytes)  # fmt: skip

    def refusal(self, job: Job) -> str | None:
        """Why this request can never run here, or None."""
        lane, pool = self.lane, self.pool
        longest, config = job.prompt + 1, lane.config
        if longest > config.max_model_len:
            return f"prompt of {job.prompt} tokens exceeds max_model_len {config.max_model_len}"
        if pool.blocks(longest) + lane.watermark > pool.total[Tier.HBM]:
            return f"prompt of {job.prompt} tokens exceeds the KV cache of {pool.total[Tier.HBM]} blocks"
        if config.rule.value == "prefill_first" and job.prompt > config.max_num_batched_tokens:
            budget = config.max_num_batched_tokens
            return f"prompt of {job.prompt} tokens exceeds max_num_batched_tokens {budget} (no chunked prefill)"
        return None
