"""Random clusters, workloads and losses for the laws of the simulator, small and full of ties. No numpy here: the
determinism law also runs on interpreters that lack it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.types import InstanceUp, Progress, RequestArrived, Rule, Stage, StepDone, Watch
from systems.baselines.vllm import VllmPolicy
from tests.fakes import FakeCost, FakeWorkload, cluster

GRID = 10_000  # ns: arrivals, think times, losses and (with `GridCost`) boundaries all lie on it
LAYERS = 4


class GridCost(FakeCost):
    """Every iteration takes a whole number of grid units, which grows with batch and context."""

    def iteration_ns(self, chunks, num_decodes, context, num_logits):
        units = 1 + num_decodes // 3 + num_decodes * context // 48
        units += sum(3 + chunk + (computed > 8) for chunk, computed in chunks) // 6
        return units * GRID * self.layers // LAYERS


@dataclass(frozen=True)
class Request:
    """`parent`: the request whose finish releases this one (its prompt then holds the parent's prompt and reply)."""

    gap: int  # grid units since the request before; think time when there is a parent
    prompt: int  # own tokens: all of the prompt, but for a parent's
    output: int
    document: int = -1  # the prompt's first tokens come from this shared document; -1: from none
    own: int = 0  # tokens of the prompt's tail that nobody shares
    parent: int = -1


@dataclass(frozen=True)
class Scenario:
    """One drawn run: everything but the leap."""

    requests: tuple[Request, ...]
    instances: int = 1
    blocks: int = 16
    block_size: int = 4
    rule: Rule = Rule.CHUNKED
    budget: int = 32
    max_num_seqs: int = 8
    caching: bool = False
    watermark: float = 0.0
    dispatch: str = "least_outstanding"
    alpha: float = 0.0
    grid: bool = True
    concurrency: int | None = None
    losses: tuple[tuple[int, int], ...] = ()  # (grid units, instance)
    watch: int = 0  # grid units between progress reports, 0: none
    wake: int | None = None  # grid units of idleness after which an iteration takes twice as long
    routes: tuple[int, ...] = field(default=())  # of the lanes of `SharedLanes`: instances of the stages, in digits

    def config(self, max_leap: int | None = None) -> EngineConfig:
        return EngineConfig(self.block_size, self.budget, self.max_num_seqs, self.rule, self.caching, self.watermark,
                            max_leap, 1 << 20)  # fmt: skip

    def workload(self) -> FakeWorkload:
        now, arrivals, contents, lengths = 0, [], [], []
        for index, request in enumerate(self.requests):
            content = ()
            if request.parent >= 0:
                before = self.requests[request.parent]
                content = (*contents[request.parent], (f"gen:{request.parent}", 0, before.output))
                arrivals.append(-1)
            else:
                now += request.gap * GRID
                arrivals.append(now)
            if request.document >= 0 and request.prompt > request.own:
                content += ((f"doc:{request.document}", 0, request.prompt - request.own),)
                tail = request.own
            else:
                tail = request.prompt
            if tail:
                content += ((f"own:{index}", 0, tail),)
            contents.append(content)
            lengths.append(sum(piece[2] for piece in content))
        sessions = any(request.parent >= 0 for request in self.requests) and self.concurrency is None
        return FakeWorkload(
            arrivals,
            lengths,
            [request.output for request in self.requests],
            contents,
            None,
            [request.parent for request in self.requests] if sessions else None,
            [request.gap * GRID for request in self.requests] if sessions else None,
            self.concurrency,
        )

    def model(self):
        kind = GridCost if self.grid else FakeCost
        cost = lambda layers, first, last: kind(layers, first, last, self.alpha)  # noqa: E731
        model = cluster(self.instances, self.blocks, LAYERS, self.block_size, cost=cost)
        return model if self.wake is None else replace(model, wake_share=1.0, wake_after_ns=self.wake * GRID)

    def policy(self, max_leap: int | None = None):
        if self.routes:
            return SharedLanes(self, self.config(max_leap))
        return VllmPolicy(self.model().info(), self.config(max_leap), self.dispatch)

    def executor(self, **options: object) -> SimExecutor:
        record = RunRecord(RequestColumns.empty(len(self.requests)))
        losses = tuple((units * GRID, instance) for units, instance in self.losses)
        return SimExecutor(self.model(), self.workload(), record, faults=losses, **options)

    def run(self, max_leap: int | None = None, **options: object) -> Outcome:
        """Drive it to the end; every event and command is kept."""
        executor = self.executor(**options)
        policy = self.policy(max_leap)
        outcome = Outcome(executor, policy)
        if self.watch:
            policy = Watcher(policy, self.watch * GRID)
        outcome.drive(policy)
        return outcome


class Outcome:
    """A run and its trace: (time, event, commands)."""

    def __init__(self, executor: SimExecutor, policy) -> None:
        self.executor = executor
        self.policy = policy
        self.record = executor.record
        self.trace: list[tuple[int, object, list]] = []

    def drive(self, policy, after=None) -> None:
        """As `common.driver.drive`; `after(now, event)` sees the world once the commands are in."""
        poll, submit = self.executor.poll, self.executor.submit
        while (item := poll()) is not None:
            now, event = item
            assert len(self.trace) < 100_000, "events without end"
            commands = policy.on_event(now, event)
            self.trace.append((now, event, commands))
            for command in commands:
                submit(command)
            if after is not None:
                after(now, event)
        self.record.segments.flush()

    def times(self) -> dict[str, object]:
        """What the leap law says is the same for leaps of any size."""
        columns, segments = self.record.requests, self.record.segments
        work: dict[int, list[int]] = {}
        for row, lane in enumerate(segments.lane):
            total = work.setdefault(lane, [0, 0, 0, 0])
            iterations = segments.iterations[row]
            total[0] += iterations
            total[1] += segments.decodes[row] * iterations
            total[2] += segments.prefill_tokens[row]
            total[3] += segments.end_ns[row] - segments.start_ns[row]
        return {
            **{name: list(getattr(columns, name)) for name in (
                "arrival_ns", "first_token_ns", "finish_ns", "status", "num_preemptions", "cached_tokens", "instance",
                "output_tokens")},
            "reasons": columns.reasons,
            "iterations": self.record.num_iterations,
            "stalls": sorted(zip(*(getattr(self.record.stalls, name) for name in self.record.stalls.__slots__))),
            "work": work,
            "progress": [(now, event) for now, event, _ in self.trace if isinstance(event, Progress)],
        }  # fmt: skip


class Watcher:
    """Asks for progress of every instance; the reports go to nobody."""

    def __init__(self, policy, period_ns: int) -> None:
        self.policy = policy
        self.period_ns = period_ns

    def on_event(self, now_ns, event):
        if isinstance(event, Progress):
            return []
        commands = self.policy.on_event(now_ns, event)
        if isinstance(event, InstanceUp):
            commands = [*commands, Watch(event.instance, self.period_ns)]
        return commands

    def gauges(self):
        return self.policy.gauges()


class SharedLanes:
    """Several lanes that share instances (some in a pipeline over two): requests go to them in turn."""

    def __init__(self, scenario: Scenario, config: EngineConfig) -> None:
        self.lanes = {}
        blocks = scenario.blocks // len(scenario.routes)
        for lane, route in enumerate(scenario.routes):
            hops = [int(digit) for digit in str(route)]
            cuts = [LAYERS * place // len(hops) for place in range(len(hops) + 1)]
            stages = tuple(Stage(hop, (cuts[place], cuts[place + 1])) for place, hop in enumerate(hops))
            self.lanes[lane] = LaneScheduler(lane, stages, blocks, config)

    def on_event(self, now_ns, event):
        out = []
        if isinstance(event, RequestArrived):
            lane = self.lanes[event.request_id % len(self.lanes)]
            seq = Seq(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
            lane.submit(seq, out)
        elif isinstance(event, StepDone):
            lane = self.lanes[event.lane]
            lane.step_done(event, out)
            lane.schedule(out)
        return out

    def gauges(self):
        return ()


def doubled(scenario: Scenario, factor: int = 2) -> Scenario:
    """The same requests with longer replies."""
    requests = tuple(replace(request, output=request.output * factor) for request in scenario.requests)
    return replace(scenario, requests=requests)


def prefix_sums(values) -> list[int]:
    return [0, *accumulate(values)]
