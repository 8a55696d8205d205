"""Drawn fleets for the laws: policies, workloads, losses, and the comparison of both ledgers after every event."""

from __future__ import annotations

import random
from itertools import cycle

from bench.mell.restless import Restless
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.sched.plan import FleetConfig
from common.types import CopyDone, RequestStatus, StepDone
from systems.baselines.consolidate import KINDS, make_consolidating
from systems.mell.invariants import violations
from systems.mell.policy import MellConfig, make_mell
from tests.fakes import US, FakeWorkload, cluster

LAYERS = 4
ENDED = (RequestStatus.FINISHED, RequestStatus.REJECTED)


def workload(rng, num, gap_us, prompt, output):
    arrivals, now = [], 0
    for _ in range(num):
        now += rng.choice((0, 0, 1, 2, 5)) * gap_us * US
        arrivals.append(now)
    return FakeWorkload(arrivals, [rng.randint(1, prompt) for _ in range(num)],
                        [rng.randint(1, output) for _ in range(num)])  # fmt: skip


def policy(kind, info, migration="kv", epoch_us=2_000, watermark=0.05, max_leap=None, overflow="preempt", **mell):
    engine = EngineConfig(16, 512, 64, max_leap=max_leap, max_model_len=1 << 20)
    fleet = FleetConfig(epoch_us * US, 5_000 * US, 1, watermark)
    if kind == "mell":
        return make_mell(info, engine, MellConfig(migration=migration, **mell), fleet)
    return make_consolidating(kind, info, engine, fleet, overflow)


class FleetRun:
    """One drawn run in the simulator; `run` drives it and checks the laws on the way."""

    def __init__(self, seed: int, num: int = 40) -> None:
        rng = random.Random(seed)
        self.kind = rng.choice(("mell", "mell", "mell", *KINDS))
        self.migration = rng.choice(("kv", "tokens", "hybrid", "off"))
        instances = rng.choice((2, 4, 8))
        self.model = cluster(instances, rng.choice((24, 48, 96)), LAYERS, running=rng.randint(1, min(3, instances)),
                             startup_ns=rng.choice((0, 500, 20_000)) * US,
                             extra=rng.choice(({}, {"nic_bandwidth": 2e8, "nvlink_bandwidth": 1e9,
                                                    "prefill_tokens_per_s": 1e6})))  # fmt: skip
        self.workload = workload(rng, num, rng.choice((200, 1000, 4000)), rng.choice((40, 250)),
                                 rng.choice((30, 120, 400)))  # fmt: skip
        self.policy = policy(self.kind, self.model.info(), self.migration, rng.choice((500, 2_000, 20_000)),
                             rng.choice((0.0, 0.05, 0.2)), rng.choice((None, None, 1, 5)),
                             rng.choice(("preempt", "reserve_max")))  # fmt: skip
        faults = tuple((rng.randint(0, 60_000) * US, rng.randrange(instances)) for _ in range(rng.choice((0, 1, 4))))
        self.faults = faults
        self.record = RunRecord(RequestColumns.empty(num))
        self.executor = SimExecutor(self.model, self.workload, self.record, faults=faults)
        self.trace = []
        self.promised = 0  # requests that left their source as tokens
        self._spy_on_removals()

    def run(self):
        events = 0
        while (item := self.executor.poll()) is not None:
            now, event = item
            events += 1
            assert events < 200_000, "events without end"
            commands = self.policy.on_event(now, event)
            self.trace.append((now, event, commands))
            for command in commands:
                self.executor.submit(command)
            if isinstance(event, StepDone | CopyDone):
                self.check()
        self.check_end()
        return self

    def _spy_on_removals(self):
        """The destination holds room for all of a request before the source frees it: as promised blocks (tokens), or
        as reserved ones that are written (KV; until then both sides hold its KV)."""
        mover = self.policy.mover
        submit, arrived = mover.submit, mover._arrived

        def removed(seq, instance, out):
            lane = self.policy.lanes[instance]
            assert lane.promised[seq.request_id] >= -(-seq.known // 16), f"request {seq.request_id} left too early"
            self.promised += 1
            submit(seq, instance, out)

        def copied(move, now, out):
            seq, stored = move.parked, -(-move.parked.computed // 16)
            assert move.done == seq.computed and move.dst.reserved[seq.request_id] >= stored
            assert move.src.reserved[seq.request_id] == stored, "the source has freed before the copy was acknowledged"
            held = self.executor.state.held[seq.request_id]
            assert {one.instance for one in held} == {move.src.instance, move.dst.instance}
            arrived(move, now, out)

        mover.submit, mover._arrived = removed, copied

    def check(self):
        """Nobody is lost; at boundaries both sides count the same blocks; the plan keeps its invariants."""
        made, status = self.policy, self.record.requests.status
        live = {index for index, value in enumerate(status) if value == RequestStatus.LIVE}
        assert set(made.seqs) == live
        somewhere = set(made.unsent) | set(made._arrived)
        for lane in [*made.lanes.values(), *made._dying.values()]:
            somewhere |= {*lane.running, *(seq.request_id for seq in lane.waiting)}
            somewhere |= {seq.request_id for seq in lane.joining}
        somewhere |= {move.request_id for move in made.mover.by_request.values()}
        assert somewhere == live
        for instance, lane in made.lanes.items():
            served = self.executor.lanes.get(lane.lane)
            assert 0 <= lane.free <= lane.num_blocks
            self.check_promises(lane)
            if served is None or served.command_id is None or served.ran == served.step_from:
                memory = self.executor.state.memory[instance]
                held = lane.num_blocks - lane.free - sum(lane.promised.values())
                assert memory.used == held * LAYERS, f"instance {instance}"
        if self.kind == "mell":
            assert violations(made.planner.groups) == []

    def check_promises(self, lane):
        """Blocks are promised only to who is on the way here as tokens or waits here, and to these until they start."""
        waiting = {seq.request_id for seq in lane.waiting}
        coming = {move.request_id for move in self.policy.mover.by_request.values()
                  if move.dst is lane and move.mode == "tokens"}  # fmt: skip
        assert set(lane.promised) <= waiting | coming
        assert not set(lane.promised) & (set(lane.running) | set(lane.reserved))
        assert all(blocks > 0 for blocks in lane.promised.values())

    def check_end(self):
        """All ended; nothing is left anywhere."""
        assert all(status in ENDED for status in self.record.requests.status)
        for instance, lane in self.policy.lanes.items():
            assert lane.free == lane.num_blocks and lane.empty and not lane.promised, f"instance {instance}"
        assert all(memory.used == 0 for memory in self.executor.state.memory)
        stats, stalls = self.policy.mover.stats, self.record.stalls
        assert set(stats.left_ns) <= set(zip(stalls.request_id, stalls.begin_ns)), "a migration without a stall"
        rejected = sum(status == RequestStatus.REJECTED for status in self.record.requests.status)
        assert 0 <= stats.kv_done + stats.token_done - len(stats.left_ns) <= rejected  # refused while it stood still
        removed = sum(self.record.requests.num_preemptions)
        assert removed <= stats.preempted + self.promised
        assert removed == stats.preempted + self.promised or self.faults  # who is lost is not counted as preempted
        assert not (self.policy.seqs or self.policy.unsent or self.policy.mover.by_request or self.policy.at)


class RestlessRun(FleetRun):
    """The same with a planner that moves everybody all the time, as tokens mostly: promises and copies get in each
    other's way, requests outgrow them, and instances run out of blocks."""

    def __init__(self, seed: int, num: int = 40) -> None:
        super().__init__(seed, num)
        rng = random.Random(~seed)
        self.kind = "restless"
        epoch_us, leap = rng.choice((300, 700, 2_000)), rng.choice((None, None, 1, 5))
        self.policy = policy("mell", self.model.info(), "hybrid", epoch_us, rng.choice((0.0, 0.05)), leap)
        modes = rng.choice((("tokens",), ("kv", "tokens"), ("tokens", "tokens", "kv")))
        self.policy.planner = Restless(rng.randint(2, len(self.model.info().instances)), cycle(modes))
        self._spy_on_removals()
