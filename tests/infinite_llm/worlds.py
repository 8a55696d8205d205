"""Random small clusters for Infinite-LLM, and a driver that sees every message, fault and table."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from common.executors.sim import SimExecutor
from common.policy import Executor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import AgentLost, MessageArrived, Send
from systems.infinite_llm.hostpool import HOST
from systems.infinite_llm.policy import InfiniteLlmPolicy
from systems.infinite_llm.settings import Settings
from tests.fakes import US, FakeWorkload, cluster

MS = 1_000_000
FAST = Settings(period_ns=2 * MS, lease_ns=400 * MS, margin_ns=200 * MS, low_share=0.1, hysteresis=0.0)


class Fate:
    """Messages are delayed, lost or doubled, by a seed."""

    def __init__(self, seed: int, lost: float, doubled: float, delay_ns: int) -> None:
        self.random = random.Random(seed)
        self.lost, self.doubled, self.delay_ns = lost, doubled, delay_ns

    def deliveries(self, now_ns: int, message: Send) -> list[int]:
        if self.random.random() < self.lost:
            return []
        copies = 2 if self.random.random() < self.doubled else 1
        return [self.random.randrange(self.delay_ns + 1) for _ in range(copies)]


@dataclass(frozen=True)
class World:
    """One drawn run."""

    instances: int
    blocks: int
    requests: tuple[tuple[int, int, int], ...]  # (gap in us, prompt, output)
    settings: Settings = FAST
    lost_instances: tuple[tuple[int, int], ...] = ()  # (us, instance)
    lost_gm: tuple[tuple[int, bool], ...] = ()  # (us, restarted): the gManager dies, or is back
    fate: tuple[int, float, float, int] | None = None  # seed, lost, doubled, delay in ns
    budget: int = 64
    alpha: float = 0.0
    host_blocks: int = 0

    def model(self, **changes):
        return cluster(self.instances, self.blocks, alpha=self.alpha, max_model_len=1 << 20,
                       host_blocks=self.host_blocks, **changes)

    def workload(self) -> FakeWorkload:
        now, arrivals = 0, []
        for gap, _, _ in self.requests:
            now += gap * US
            arrivals.append(now)
        return FakeWorkload(arrivals, [r[1] for r in self.requests], [r[2] for r in self.requests],
                            max_output_tokens=1 << 10)  # fmt: skip

    def policy(self, model) -> InfiniteLlmPolicy:
        config = EngineConfig(16, self.budget, 16, max_model_len=1 << 20)
        return InfiniteLlmPolicy(model.info(), config, self.settings)

    def options(self) -> dict[str, object]:
        faults = tuple((at * US, instance) for at, instance in self.lost_instances)
        return {"faults": faults, "message_faults": Fate(*self.fate) if self.fate else None}

    def run(self) -> Run:
        """To its end."""
        run = self.start()
        run.drive()
        return run

    def start(self) -> Run:
        """Not driven yet."""
        model = self.model()
        record = RunRecord(RequestColumns.empty(len(self.requests)))
        return Run(self, SimExecutor(model, self.workload(), record, **self.options()), self.policy(model))


class Run:
    """A run, its trace, and what is checked after every event."""

    def __init__(self, world: World, executor: Executor, policy: InfiniteLlmPolicy) -> None:
        self.world = world
        self.executor = executor
        self.policy = policy
        self.record = executor.record
        self.trace: list[tuple[int, object, list]] = []
        self.flying = 0
        self.drained = 0  # events after which no message was under way

    def drive(self, check=None) -> None:
        faults = [(at * US, AgentLost("gm", back)) for at, back in self.world.lost_gm]
        while (item := self.executor.poll()) is not None:
            now, event = item
            assert len(self.trace) < 100_000, "events without end"  # four giants in turn: 23,000, mostly heartbeats
            commands = []
            while faults and faults[0][0] <= now:
                commands += self.deliver(now, faults.pop(0)[1])
            commands += self.deliver(now, event)
            self.flying += sum(isinstance(c, Send) for c in commands) - isinstance(event, MessageArrived)
            self.check_ledgers()
            if check is not None:
                check(now, event)

    def deliver(self, now, event) -> list:
        commands = self.policy.on_event(now, event)
        self.trace.append((now, event, commands))
        for command in commands:
            self.executor.submit(command)
        return commands

    def check_ledgers(self) -> None:
        """Counts add up; the creditor never thinks free what a debtor uses; drained: lent = borrowed."""
        borrowed: dict[int, int] = {}
        named: dict[int, set[int]] = {}
        for manager in self.policy.managers.values():
            lane = manager.lane
            assert lane.free >= 0 and lane.lent == manager.creditor.lent.total
            assert lane.free + lane.lent <= lane.num_blocks
            for pieces in lane.borrowed.pieces.values():
                for piece in pieces:
                    if not piece.try_id:
                        continue  # called home
                    borrowed[piece.creditor] = borrowed.get(piece.creditor, 0) + piece.num_blocks
                    named.setdefault(piece.creditor, set()).add(piece.try_id)
        for instance, manager in self.policy.managers.items():
            assert named.get(instance, set()) <= set(manager.creditor.lent.grants), "in use, and not lent"
            self.check_host(manager, named.get(HOST + instance, set()))
        quiet = self.flying == 0 and not self.world.fate and not self.world.lost_instances
        busy = any(m.debtor.move or any(loan.asks for loan in m.debtor.loans.values())
                   for m in self.policy.managers.values())  # fmt: skip
        if quiet and not busy:
            self.drained += 1
            for instance, manager in self.policy.managers.items():
                assert manager.lane.lent == borrowed.get(instance, 0), "lent = borrowed"
                if manager.host is not None:
                    assert manager.host.lent.total == borrowed.get(HOST + instance, 0), "lent = borrowed, CPU rBlocks"

    def check_host(self, manager, named: set[int]) -> None:
        """Conservation in host memory: free + lent = all, and nobody stores there what is not lent."""
        memory = self.executor.state.memory[manager.instance]
        if manager.host is None:
            assert not named and not memory.host_used
            return
        pool = manager.host.lane
        assert pool.free >= 0 and pool.free + pool.lent == pool.num_blocks and pool.lent == manager.host.lent.total
        assert named <= set(manager.host.lent.grants), "in use, and not lent"
        assert memory.host_used <= pool.lent * memory.info.num_layers, "KV in host memory that nobody has lent"


@st.composite
def worlds(draw, faults: bool = True, gm: bool = True, losses: bool = True, debt: bool = False) -> World:
    instances = draw(st.integers(2, 5))
    blocks = draw(st.integers(8, 24))
    pool = instances * blocks * 16
    sizes = st.one_of(st.integers(1, blocks * 8), st.integers(blocks * 8, blocks * 24), st.integers(1, pool + 40))
    requests = tuple(draw(st.lists(st.tuples(st.integers(0, 3000), sizes, st.integers(1, 90)), min_size=1,
                                   max_size=12)))  # fmt: skip
    settings = FAST
    if draw(st.booleans()):
        settings = Settings(mode=draw(st.sampled_from(("reactive", "proactive"))), period_ns=draw(
            st.integers(1, 4)) * MS, lease_ns=400 * MS, margin_ns=200 * MS, pace=draw(st.sampled_from((0, 8, 16, 64))),
            low_share=draw(st.sampled_from((0.02, 0.2))), hysteresis=0.0, locality=draw(st.booleans()))  # fmt: skip
    if debt:
        settings = replace(settings, mode="debt", lend_cap=draw(st.sampled_from((0.25, 0.5, 1.0))),
                           dgfm=draw(st.booleans()), dgfm_threshold=draw(st.integers(1, 4)), low_share=draw(
            st.sampled_from((0.1, 0.3))), pace=draw(st.sampled_from((16, 64))))  # fmt: skip
    host_blocks = draw(st.sampled_from((0, 6, 40))) if debt else 0
    if host_blocks:
        settings = replace(settings, cpu_share=draw(st.sampled_from((0.5, 1.0))))
    lost = ()
    if losses and draw(st.booleans()):
        count = draw(st.integers(1, instances - 1))
        lost = tuple((draw(st.integers(0, 40_000)), index) for index in range(count))
    lost_gm = ()
    if gm and draw(st.booleans()):
        at = draw(st.integers(0, 20_000))
        lost_gm = ((at, False), (at + draw(st.integers(1, 20_000)), True))
    fate = None
    if faults and draw(st.booleans()):
        fate = (draw(st.integers(0, 99)), draw(st.sampled_from((0.0, 0.1, 0.3))), draw(st.sampled_from((0.0, 0.3))),
                draw(st.sampled_from((0, 100_000, 5 * MS))))  # fmt: skip
    return World(instances, blocks, requests, settings, lost, lost_gm, fate, draw(st.sampled_from((32, 64, 512))),
                 host_blocks=host_blocks)  # fmt: skip


CYCLE = World(3, 16, ((5611, 142, 100), (3389, 259, 79), (11014, 229, 105), (14158, 230, 25), (14199, 160, 87),
                      (19599, 185, 72)), replace(FAST, mode="debt", lend_cap=1.0, dgfm_threshold=1, pace=64,
                                                 low_share=0.3), budget=512)  # fmt: skip


@st.composite
def crowded(draw) -> World:
    """v1, with long outputs that come and go, so that who lent yesterday borrows today: cycles of debt arise."""
    instances, blocks = draw(st.integers(2, 4)), draw(st.integers(16, 24))
    requests = tuple(draw(st.lists(st.tuples(st.integers(0, 20_000), st.integers(16, blocks * 18),
                                             st.integers(20, 250)), min_size=4, max_size=12)))  # fmt: skip
    made = replace(FAST, mode="debt", lend_cap=1.0, dgfm_threshold=draw(st.integers(1, 2)), pace=64,
                   low_share=draw(st.sampled_from((0.15, 0.3))))  # fmt: skip
    return World(instances, blocks, requests, made, budget=draw(st.sampled_from((64, 512))))
