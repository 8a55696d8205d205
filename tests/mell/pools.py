"""Drawn clusters of several models over one stock of GPUs, and what must hold after every event."""

from __future__ import annotations

import random

from common.executors.cluster import pooled
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.sched.plan import FleetConfig
from common.sched.pools import PoolsPolicy
from common.sched.pools import pooled as make_pools
from common.types import RequestStatus, StepDone
from systems.baselines.consolidate import KINDS, make_consolidating
from systems.mell.invariants import violations
from systems.mell.policy import MellConfig, make_mell
from tests.fakes import US, FakeWorkload, cluster

ENDED = (RequestStatus.FINISHED, RequestStatus.REJECTED)


def stock(gpus, blocks, running, startup_us=(500, 3_000), layers=(4, 6)):
    """A cluster of `len(blocks)` models: other layers, other room, other start-up times."""
    return pooled([cluster(gpus, room, layers[index % 2], running=running, startup_ns=startup_us[index % 2] * US)
                   for index, room in enumerate(blocks)])  # fmt: skip


def pools(info, kind="mell", migration="hybrid", epoch_us=2_000, cooldown_us=5_000, min_instances=1) -> PoolsPolicy:
    engine = EngineConfig(16, 512, 64, max_model_len=1 << 20)
    fleet = FleetConfig(epoch_us * US, cooldown_us * US, min_instances, 0.05)
    if kind == "mell":
        return make_pools(info, fleet, lambda pool, gpus: make_mell(pool, engine, MellConfig(migration=migration),
                                                                    fleet, gpus))  # fmt: skip
    return make_pools(info, fleet,
                      lambda pool, gpus: make_consolidating(kind, pool, engine, fleet, "preempt", gpus))  # fmt: skip


class PoolsRun:
    """One drawn run in the simulator; laws are checked on the way."""

    def __init__(self, seed: int, num: int = 40) -> None:
        rng = random.Random(seed)
        self.models = rng.choice((2, 2, 3))
        self.gpus = rng.choice((3, 4, 6))
        blocks = [rng.choice((24, 48, 96)) for _ in range(self.models)]
        self.cluster = stock(self.gpus, blocks, rng.randint(1, self.gpus), rng.choice(((0, 0), (500, 3_000))))
        arrivals, now = [], 0
        for _ in range(num):
            now += rng.choice((0, 1, 2, 5, 20)) * rng.choice((200, 1000)) * US
            arrivals.append(now)
        turn = rng.choice((num, 10))  # models ask by turns, or at random
        model = [index // turn % self.models if turn < num else rng.randrange(self.models) for index in range(num)]
        self.workload = FakeWorkload(arrivals, [rng.randint(1, 200) for _ in range(num)],
                                     [rng.randint(1, 150) for _ in range(num)], model=model)  # fmt: skip
        self.kind = rng.choice(("mell", "mell", *KINDS))
        self.policy = pools(self.cluster.info(), self.kind, rng.choice(("kv", "tokens", "hybrid")),
                            rng.choice((500, 2_000)), rng.choice((0, 5_000, 100_000)))  # fmt: skip
        lost = [(rng.randint(0, 60_000) * US, rng.randrange(self.gpus)) for _ in range(rng.choice((0, 0, 2)))]
        faults = tuple((at, gpu + self.gpus * one) for at, gpu in lost for one in range(self.models))
        self.record = RunRecord(RequestColumns.empty(num))
        self.executor = SimExecutor(self.cluster, self.workload, self.record, faults=faults)
        self.trace: list[object] = []
        self.most = 0

    def run(self) -> PoolsRun:
        while (item := self.executor.poll()) is not None:
            now, event = item
            commands = self.policy.on_event(now, event)
            self.trace.append((now, event, commands))
            assert len(self.trace) < 200_000, "events without end"
            for command in commands:
                self.executor.submit(command)
            self.check()
            if isinstance(event, StepDone) and self.kind == "mell":
                for pool in self.policy.pools:
                    assert violations(pool.planner.groups) == []
        assert all(status in ENDED for status in self.record.requests.status)
        assert all(memory.used == 0 for memory in self.executor.state.memory)
        return self

    def check(self) -> None:
        """GPUs in use over all pools are at most the stock, no GPU runs two models, and both sides agree on who has
        which; no request is with an instance of another model."""
        infos, state, control = self.cluster.instances, self.executor.state, self.executor.control
        taken = [infos[index].gpu for index, up in enumerate(state.up) if up]
        taken += [infos[index].gpu for index in control._starting]
        assert len(taken) == len(set(taken)) <= self.gpus
        self.most = max(self.most, len(taken))
        assert set(taken) <= {self.policy.stock._gpu[one] for one in self.policy.stock._holder.values()}
        asked = self.workload.model
        for lane in self.executor.lanes.values():
            for request_id in lane.members:
                assert asked[request_id] == infos[lane.stages[0].instance].model
        for index, pool in enumerate(self.policy.pools):
            assert all(asked[request_id] == index for request_id in pool.seqs)
        for request_id, held in state.held.items():
            assert all(infos[one.instance].model == asked[request_id] for one in held)
