"""Random multi-turn schedules for `system=memserve`, and the laws that hold after every event."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from common.driver import drive
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import RequestStatus, Rule, Tier
from systems.memserve.config import DESIGNS, EVICTIONS, MODES, POLICIES, Options, Planner
from systems.memserve.job import Job
from systems.memserve.mempool import MemPool
from systems.memserve.node import Lease
from systems.memserve.policy import MemServePolicy
from tests.fakes import FakeWorkload, cluster

MS = 1_000_000
PLANNER = Planner(0.05, 1.0, 0.01, 1.0, 1.0)  # near the made-up costs of `tests.fakes`


@dataclass(frozen=True)
class Turn:
    session: int
    gap: int  # x 100 us, after the turn before (a first turn: after the first turn before it)
    user: int
    output: int


@dataclass(frozen=True)
class Scenario:
    turns: tuple[Turn, ...]
    document: tuple[int, ...]  # by session: tokens of the shared document that its first prompt starts with
    options: Options
    instances: int
    blocks: int
    host_blocks: int
    rule: Rule = Rule.CHUNKED
    budget: int = 64
    max_num_seqs: int = 8
    losses: tuple[tuple[int, int], ...] = ()  # (x 100 us, instance)
    message_seed: int = -1
    max_leap: int | None = None
    layers: int = 4

    def workload(self) -> FakeWorkload:
        last: dict[int, int] = {}
        history: dict[int, tuple] = {}
        columns: list[tuple] = []
        now = 0
        for index, turn in enumerate(self.turns):
            before = last.get(turn.session, -1)
            if before < 0:
                now += turn.gap * MS // 10
                content = (("doc", 0, self.document[turn.session]),) if self.document[turn.session] else ()
            else:
                content = (*history[turn.session], (f"gen:{before}", 0, self.turns[before].output))
            content = (*content, (f"s{turn.session}:{index}", 0, turn.user))
            history[turn.session], last[turn.session] = content, index
            columns.append((now if before < 0 else -1, sum(piece[2] for piece in content), turn.output, content,
                            turn.session, before, turn.gap * MS // 10))  # fmt: skip
        arrival, prompt, output, contents, session, after, think = map(list, zip(*columns))
        return FakeWorkload(arrival, prompt, output, contents, session, after, think)

    def engine(self) -> EngineConfig:
        return EngineConfig(16, self.budget, self.max_num_seqs, self.rule, False, 0.0, self.max_leap, 1 << 20)

    def model(self):
        return cluster(self.instances, self.blocks, self.layers, 16, host_blocks=self.host_blocks, startup_ns=3 * MS)

    def policy(self) -> MemServePolicy:
        return MemServePolicy(self.model().info(), self.engine(), self.options)

    def parts(self):
        faults = tuple((units * MS // 10, instance) for units, instance in self.losses)
        messages = Messages(self.message_seed) if self.message_seed >= 0 else None
        return self.workload(), RunRecord(RequestColumns.empty(len(self.turns))), faults, messages


class Messages:
    """Delays, loses and doubles messages."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def deliveries(self, now_ns, message):
        return [self.random.randrange(MS) for _ in range(self.random.choice((0, 1, 1, 1, 2)))]


class Judge:
    """A policy seen through the laws: `check` runs after every event's commands are in."""

    def __init__(self, policy: MemServePolicy, executor: SimExecutor) -> None:
        self.policy = policy
        self.executor = executor
        self.events = 0

    def on_event(self, now_ns, event):
        self.check()
        self.events += 1
        assert self.events < 50_000, "events without end"
        return self.policy.on_event(now_ns, event)

    def gauges(self):
        return self.policy.gauges()

    def check(self) -> None:
        """Before an event: everything submitted so far has taken effect."""
        state = self.executor.state
        for instance, site in self.policy.sites.items():
            pool, memory = site.pool, state.memory[instance]
            if pool.dead or not state.up[instance]:
                continue
            pool.check()
            for job in site.homed.values():
                self._readable(pool, job, job.lease)
            if state.ready or self._answers_under_way():
                continue
            cells = pool.layers[1]  # of a block
            used = cells * (pool.total[Tier.HBM] - pool.free[Tier.HBM])
            assert memory.cached == cells * pool.tree.cached[Tier.HBM], "cached blocks"
            assert used - cells * site.lane._grant <= memory.used <= used, "used blocks"
            assert memory.host_used == cells * (pool.total[Tier.DRAM] - pool.free[Tier.DRAM]), "host blocks"
            assert memory.host_cached == cells * pool.tree.cached[Tier.DRAM], "cached host blocks"

        self._load()
        for pending, move in self.policy.moves.copies.values():
            if not move.dst.dead and self.policy.sites[move.dst.instance].pool is move.dst:
                self._readable(move.dst, pending.job, move.lease)

    def _load(self) -> None:
        """A request that has ended is in the scheduler's load only while its end is still being told, or who should
        tell it is dead and that is not known yet."""
        gs, sites = self.policy.gs, self.policy.sites
        if not self.policy.options.heartbeat_s or self.executor.state.ready:
            return
        status = self.executor.record.requests.status
        for instance in gs.members:
            for request_id in (*gs.queue[instance], *gs.decodes[instance]):
                if status[request_id] in (RequestStatus.FINISHED, RequestStatus.REJECTED):
                    told = any(message[1] == request_id for site in sites.values() if not site.pool.dead
                               for _, message in site.outbox._kept.values())  # fmt: skip
                    homes = {instance, self.policy.flows[request_id].prefill_at}
                    unknown = any(sites[home].pool.dead and home in gs.members for home in homes)
                    assert told or unknown, f"request {request_id} has ended and weighs on {instance}"

    @staticmethod
    def _readable(pool: MemPool, job: Job, lease: Lease | None) -> None:
        """No block of a live match is evicted or swapped out."""
        if lease is not None and lease.node is not None:
            found = pool.match(job.text(max(lease.tokens, job.known)), lease.tokens).hbm
            assert found == lease.tokens, f"request {job.request_id}: {found} of {lease.tokens} pinned tokens are there"

    def _answers_under_way(self) -> bool:
        """The event about to be told has already changed the executor's counts."""
        return False


class Late(Judge):
    """As above, right after the commands are in."""

    def on_event(self, now_ns, event):
        self.events += 1
        assert self.events < 50_000, "events without end"
        return self.policy.on_event(now_ns, event)


def run(scenario: Scenario, executor: SimExecutor | None = None, record: RunRecord | None = None):
    """Drive it to the end under the laws; returns policy and executor."""
    if executor is None:
        workload, record, faults, messages = scenario.parts()
        executor = SimExecutor(scenario.model(), workload, record, faults=faults, message_faults=messages)
    policy = scenario.policy()
    judge = Late(policy, executor)
    poll = executor.poll

    def checked():
        judge.check()
        return poll()

    executor.poll = checked
    drive(judge, executor, record)
    finish(policy, executor)
    return policy, executor


def finish(policy: MemServePolicy, executor: SimExecutor) -> None:
    """At the end: every request has ended, nobody holds or pins anything."""
    status = executor.record.requests.status
    assert all(one in (RequestStatus.FINISHED, RequestStatus.REJECTED, RequestStatus.PENDING) for one in status)
    for site in policy.sites.values():
        if not site.pool.dead:
            pool = site.pool
            assert not pool.tree.num_leases and not pool.tree.cached[None], "a lease or a swap is left"
            assert not any(pool.active.values()) and not any(pool.moving.values()), "blocks are left"
            assert not site.homed and not site.pending and not site.lane.waiting
    assert not policy.moves.copies and not len(policy.desk.limbo)


@st.composite
def scenarios(draw, losses=False, designs=tuple(DESIGNS), max_turns=12, pressure=False, layers=4):
    sessions = draw(st.integers(3 if pressure else 1, 4))
    opening = (0, 1, 0) if pressure else ()  # two sessions of one document, one of them with a second turn
    gaps = (0, 0, 0, 1, 5) if pressure else (0, 0, 1, 5, 20)
    replies = (1, 5, 16, 33, 40) if pressure else (1, 2, 5, 16, 20, 33)
    turns = tuple(
        Turn(opening[place] if place < len(opening) else draw(st.integers(0, sessions - 1)),
             draw(st.sampled_from(gaps)), draw(st.sampled_from((1, 5, 15, 16, 17, 40))), draw(st.sampled_from(replies)))
        for place in range(draw(st.integers(6 if pressure else 1, max_turns)))
    )  # fmt: skip
    document = tuple(draw(st.sampled_from((16, 48, 50) if pressure and session < 2 else (0, 0, 16, 48, 50)))
                     for session in range(sessions))  # fmt: skip
    design = draw(st.sampled_from(designs))
    instances = draw(st.integers(2, 4))
    roles = None
    if DESIGNS[design].split:
        roles = draw(st.sampled_from(
            ["1P1D", "1P2D", "2P1D", "1C1P1D"] if instances > 2 else ["1P1D"]))
        if roles == "2P1D" and instances < 3:
            roles = "1P1D"
    options = Options(
        design=design, roles=roles, transfer=draw(st.sampled_from(MODES)), policy=draw(st.sampled_from(POLICIES)),
        fetch=draw(st.booleans()), guard_s=draw(st.sampled_from((None, 0.0001))),
        swap=draw(st.sampled_from((True, True, False) if pressure else (True, False))),
        swap_low=draw(st.sampled_from((0.1, 0.5))), swap_high=draw(st.sampled_from((0.6, 0.9))),
        local_ttl_s=draw(st.sampled_from((None, None, 0.002))), eviction=draw(st.sampled_from(EVICTIONS)),
        tree_ttl_s=draw(st.sampled_from((0.001, 10.0, 10.0) if pressure else (0.001, 10.0))),
        heartbeat_s=0.0005, timeout_s=0.0015, planner=PLANNER, ordered=len(turns) % 2 == 0,
        restart=losses and draw(st.sampled_from((True, True, False))),
    )  # fmt: skip
    longest = _longest(turns, document)
    blocks = longest + draw(st.sampled_from((1, 2, 3) if pressure else (1, 2, 4, 10, 60)))
    scenario = Scenario(
        turns, document, options, instances, blocks, draw(st.sampled_from((2, 40, 40) if pressure else (0, 2, 40))),
        draw(st.sampled_from((Rule.CHUNKED, Rule.CHUNKED, Rule.PREFILL_FIRST, Rule.SARATHI))),
        draw(st.sampled_from((24, 64, 1024))), draw(st.sampled_from((1, 3, 8))), layers=layers,
    )  # fmt: skip
    if scenario.rule is Rule.PREFILL_FIRST:
        scenario = replace(scenario, budget=1024)
    if losses:
        pairs = st.tuples(st.integers(0, 120), st.integers(0, instances - 1))
        scenario = replace(
            scenario, losses=tuple(draw(st.lists(pairs, max_size=3, unique_by=lambda pair: pair[1]))),
            message_seed=draw(st.sampled_from((-1, 1, 2, 3))),
        )  # fmt: skip
    return scenario


def _longest(turns, document) -> int:
    tokens = dict(enumerate(document))
    for turn in turns:
        tokens[turn.session] += turn.user + turn.output
    return max(-(-num // 16) for num in tokens.values())
