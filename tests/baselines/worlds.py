"""Small random loads for the baselines: requests that overflow their instances, losses, and what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import InstanceLost, RequestStatus, StartInstance
from tests.fakes import US, FakeWorkload, cluster

ENDED = (RequestStatus.FINISHED, RequestStatus.REJECTED)


@dataclass(frozen=True)
class Load:
    """`requests`: (gap in us, prompt, output); `losses`: (us, instance), which come back if `back`."""

    requests: tuple[tuple[int, int, int], ...]
    instances: int = 2
    blocks: int = 24
    layers: int = 4
    losses: tuple[tuple[int, int], ...] = ()
    back: bool = False
    budget: int = 256
    max_num_seqs: int = 64
    host_blocks: int = 0
    max_leap: int | None = None

    def workload(self) -> FakeWorkload:
        now, arrivals = 0, []
        for gap, _, _ in self.requests:
            now += gap * US
            arrivals.append(now)
        return FakeWorkload(arrivals, [one[1] for one in self.requests], [one[2] for one in self.requests])

    def model(self, **changes):
        return cluster(self.instances, self.blocks, self.layers, 16, host_blocks=self.host_blocks, **changes)

    def engine(self, **changes) -> EngineConfig:
        settings = {"max_leap": self.max_leap, "max_model_len": 1 << 20, **changes}
        return EngineConfig(16, self.budget, self.max_num_seqs, **settings)


class Run:
    """Drives a load through any executor; `check` is called after every event with the run."""

    def __init__(self, load: Load, policy: Any, make: Any = SimExecutor, model: Any = None,
                 check: Callable[[Run], None] | None = None, **options: Any) -> None:  # fmt: skip
        self.load = load
        self.policy = policy
        self.model = model or load.model()
        self.record = RunRecord(RequestColumns.empty(len(load.requests)))
        losses = tuple((us * US, instance) for us, instance in load.losses)
        self.executor = make(self.model, load.workload(), self.record, faults=losses, **options)
        self.check = check
        self.trace: list[Any] = []

    def drive(self) -> Run:
        restarts = 1 << 40
        while (item := self.executor.poll()) is not None:
            now, event = item
            assert len(self.trace) < 60_000, "events without end"
            commands = list(self.policy.on_event(now, event))
            if self.load.back and isinstance(event, InstanceLost):
                commands.append(StartInstance(restarts, event.instance))
                restarts += 1
            self.trace.append((now, event, commands))
            for command in commands:
                self.executor.submit(command)
            if self.check is not None and not self.executor.state.ready:  # else something is owed at this instant
                self.check(self)
            list(self.policy.gauges())
        self.record.segments.flush()
        self.ended()
        return self

    def live(self) -> set[int]:
        return {index for index, value in enumerate(self.record.requests.status) if value == RequestStatus.LIVE}

    def ended(self) -> None:
        columns = self.record.requests
        for index, (_, _, output) in enumerate(self.load.requests):
            assert columns.status[index] in ENDED, f"request {index} never ended"
            if columns.status[index] == RequestStatus.FINISHED:
                assert columns.output_tokens[index] == output
                assert columns.arrival_ns[index] < columns.first_token_ns[index] <= columns.finish_ns[index]
        state = self.executor.state
        assert not state.held
        assert all(memory.used == 0 and memory.host_used == 0 for memory in state.memory)

    def commands(self, kind: type) -> list[Any]:
        return [command for *_, commands in self.trace for command in commands if isinstance(command, kind)]

    def finished(self) -> int:
        return sum(status == RequestStatus.FINISHED for status in self.record.requests.status)


def same_times(one: RunRecord, other: RunRecord) -> bool:
    """Every request alike, to the nanosecond."""
    names = ("first_token_ns", "finish_ns", "instance", "num_preemptions", "status")
    return all(list(getattr(one.requests, name)) == list(getattr(other.requests, name)) for name in names)


def leap_matters(load: Load, play: Callable[[Load], Run]) -> bool:
    """Do steps of one iteration and of any length give other times?"""
    one, other = (play(replace(load, max_leap=leap)).record for leap in (1, None))
    return not same_times(one, other)


@st.composite
def loads(draw, small=False, instances=(2, 4), losses=True, host=False, most_blocks=40):
    """Requests that arrive together or apart; together they overflow. Small: what real tensors can follow."""
    gaps = st.sampled_from((0, 0, 50, 200, 1000) if small else (0, 0, 50, 200, 1000, 4000))
    prompts = st.sampled_from((16, 33, 64, 100) if small else (1, 8, 16, 33, 64, 100, 150, 200, 300))
    outputs = st.sampled_from((2, 10, 24, 40) if small else (1, 2, 10, 30, 60, 120))
    num = draw(st.sampled_from(instances))
    least, most = (3 * num, 4 * num) if small else (2, 30)
    requests = tuple(draw(st.lists(st.tuples(gaps, prompts, outputs), min_size=least, max_size=most)))
    lost: list[tuple[int, int]] = []
    if losses and draw(st.booleans()):
        when = st.integers(100, 8_000 if small else 20_000)
        lost = draw(st.lists(st.tuples(when, st.integers(0, num - 1)), max_size=2, unique_by=lambda one: one[1]))
    sizes = (10, 12, 16) if small else [size for size in (12, 20, 24, 40) if size <= most_blocks]
    blocks = draw(st.sampled_from(sizes))
    hosts = draw(st.sampled_from((0, 2, 8, 200))) if host else 0
    leap = draw(st.sampled_from((None, None, 1, 7)))
    return Load(requests, num, blocks, 4 if small else draw(st.sampled_from((4, 6))), tuple(lost), bool(lost),
                host_blocks=hosts, max_leap=leap)  # fmt: skip


def play_local(load: Load, make_policy: Any, check: Callable[[Run], None] | None = None) -> Run:
    """The same with real tensors (fp32, CPU): every reply is that of a dense decoder which knows no paging."""
    import torch

    from common.executors.local import LocalExecutor
    from tests.engine.worlds import check_tokens, tiny_world

    torch.set_num_threads(1)
    model = load.model()
    world = tiny_world(model)
    run = Run(load, make_policy(model.info(), load.engine()), LocalExecutor, model, check, world=world).drive()
    if run.finished():
        check_tokens(run.executor)
    world.close()
    return run
