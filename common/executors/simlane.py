"""A lane of the simulator: a persistent batch whose decoding requests are never touched one by one.

A decoding request is an offset: its stored tokens are `offset + iteration`. Finishes are a heap of iterations. Sums of
contexts and block growth follow from counts, so a leap of any length costs the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from common.executors.cluster import StageCost
from common.sched.phase import PhaseCounter
from common.types import Entry, Placement, Rule, Stage


class Target:
    """A request whose tokens `computed` .. `target` this lane still has to compute."""

    __slots__ = ("computed", "entry", "target")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.computed = entry.computed
        self.target = entry.target


class Member:
    """A decoding request: it stores `offset + iteration` tokens and finishes at the end of iteration `finish`."""

    __slots__ = ("entry", "finish", "offset")

    def __init__(self, entry: Entry, offset: int, finish: int) -> None:
        self.entry = entry
        self.offset = offset
        self.finish = finish


class SimLane:
    """State of one lane; times and events are the executor's.

    `iteration` is the lane's clock: iterations in which decodes advanced (under CHUNKED, all). `ran` counts all.
    """

    __slots__ = (
        "budget", "chunks", "command_id", "contexts", "costs", "due", "durations", "feet", "finishes", "followers",
        "home", "home_layers", "id", "item_iterations", "item_start", "iteration", "leap_context", "leap_prefix",
        "limit", "members", "paced", "phase", "prefilled", "prefix", "ran", "reclaim", "resumed", "rule",
        "runs_decodes", "settled", "shares", "simple", "slowed", "spread", "stage", "stages", "step_from", "stop",
        "sum_offset", "targets",
    )  # fmt: skip

    def __init__(self, lane_id: int, block_size: int) -> None:
        self.id = lane_id
        self.stages: tuple[Stage, ...] = ()
        self.home = -1  # instance of the first stage
        self.home_layers = 0
        self.costs: list[StageCost] = []
        self.rule = Rule.CHUNKED
        self.budget = 2048
        self.simple = True  # one stage and no spread request: may leap when alone
        self.iteration = 0
        self.ran = 0
        self.reclaim = 0
        self.members: dict[int, Member] = {}
        self.targets: list[Target] = []
        self.finishes: list[tuple[int, int]] = []  # (iteration, request), stale entries dropped lazily
        self.contexts: list[tuple[int, int]] = []  # (-offset, request) for the longest context, only with skew
        self.sum_offset = 0
        self.phase = PhaseCounter(block_size)
        self.prefix: dict[int, list[int]] = {}  # by batch size: sums of an iteration's time over contexts
        self.leap_prefix: list[int] = []  # of the leap in progress: its sums ...
        self.leap_context = 0  # ... and where in them it starts
        self.spread: dict[int, Placement] = {}  # requests with KV away from the stages
        self.command_id: int | None = None
        self.step_from = 0
        self.limit = 0
        self.stop = False
        self.stage = 0
        self.item_start = 0
        self.item_iterations = 1
        self.settled = 0  # iterations of the item in progress whose growth is charged already
        self.durations: list[int] = []
        self.shares: list[tuple[int, int, Any]] = []  # of the priced iteration: (stage, layers, work of each creditor)
        self.slowed: tuple[tuple[int, int], ...] = ()  # (instance, ns) that serving others adds to this iteration
        self.chunks: list[int] = []
        self.runs_decodes = True
        self.due = -1
        self.prefilled: list[tuple[int, int]] = []
        self.paced: list[Any] = []  # copies that advance by iterations of this lane
        self.followers: list[Any] = []  # by-layer copies behind the running step
        self.feet: list[Any] = []  # instances of the stages
        self.resumed: list[int] = []  # joined and without a token since

    def effective_context(self, alphas: Sequence[float]) -> int:
        """Mean context, moved towards the longest by the batch size's alpha; it grows by exactly one an iteration."""
        num = self.phase.num
        if not num:
            return 0
        mean = (self.sum_offset + num * self.iteration) // num + 1
        if not alphas or num < 2:
            return mean
        contexts, members = self.contexts, self.members
        while True:
            negative, request_id = contexts[0]
            member = members.get(request_id)
            if member is not None and member.offset == -negative:
                break
            heapq.heappop(contexts)
        alpha = alphas[num] if num < len(alphas) else alphas[-1]
        return mean + int(alpha * (self.iteration + 1 - negative - mean))

    def next_finish(self) -> int:
        """The iteration at whose end the next request finishes."""
        finishes, members = self.finishes, self.members
        while finishes:
            iteration, request_id = finishes[0]
            member = members.get(request_id)
            if member is not None and member.finish == iteration:
                return iteration
            heapq.heappop(finishes)
        return 1 << 60

    def join(self, member: Member, track_longest: bool) -> None:
        """A request decodes from the next iteration on."""
        request_id = member.entry.request_id
        self.members[request_id] = member
        self.sum_offset += member.offset
        heapq.heappush(self.finishes, (member.finish, request_id))
        if track_longest:
            heapq.heappush(self.contexts, (-member.offset, request_id))
        self.phase.add(member.offset)

    def leave(self, request_id: int) -> Member:
        """A decoding request goes; its heap entries die lazily."""
        member = self.members.pop(request_id)
        self.sum_offset -= member.offset
        self.phase.remove(member.offset)
        return member
