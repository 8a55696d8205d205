"""Llumnix: requests go to the freest instance, and move live from the fullest to the freest when memory is short there.

`system=llumnix`. Freeness of an instance is F = (M - sum of virtual usage) / B, blocks per request: what is free, less
what those who wait will take. Every poll pairs the least free instances with the freest ones and moves the shortest
running request of each (in stages, `common.sched.moving`): this balances, makes room for a queue's head where the
free memory of the cluster is in pieces (de-fragmentation), and empties an instance that is to stop (drain).

Dispatch and polls look at what is free now, so lanes step every iteration, as Llumnix's instances report every step:
what a leap hides, and only its end or a report would tell, decides nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from common.errors import ConfigError
from common.options import MOST_SECONDS, Kind, Number, Switch, period_ms, refusal
from common.policy import Gauge
from common.sched.lane import EngineConfig, Seq
from common.sched.migrating import MigratingLane
from common.sched.moving import Mover
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    CopyDone,
    Event,
    InstanceLost,
    InstanceUp,
    RequestArrived,
    SetTimer,
    Stage,
    Status,
    StepDone,
    StopInstance,
    TimerFired,
)

OWN_IDS = 1 << 60  # lanes number their commands from lane << 32


class Drains:
    """[[seconds, instance], …]."""

    def read(self, name: str, value: Any) -> list[tuple[float, int]]:
        """Pairs; null is none."""
        given = [] if value is None else value
        if not isinstance(given, list | tuple) or not all(self._is_pair(pair) for pair in given):
            raise refusal(name, value, "give [[seconds, instance], …], or []")
        return [(pair[0], pair[1]) for pair in given]

    def _is_pair(self, pair: Any) -> bool:
        return (isinstance(pair, list | tuple) and len(pair) == 2 and not any(isinstance(one, bool) for one in pair)
                and isinstance(pair[0], int | float) and 0 <= pair[0] <= MOST_SECONDS
                and isinstance(pair[1], int))  # fmt: skip


OPTIONS: dict[str, Kind] = {
    "poll_ms": period_ms(),
    "threshold": Number(high=1e6),
    "migrate": Switch(),
    "drain": Drains(),
}


@dataclass(frozen=True, slots=True)
class LlumnixConfig:
    """`threshold`: blocks per running request below which an instance is a source (and from which on it may be a
    destination); a pair's freeness differs by more than it too. `drain`: (ns, instance that stops then)."""

    poll_ns: int = 100_000_000
    threshold: float = 3.0
    migrate: bool = True
    drain: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(given: Mapping[str, Any]) -> LlumnixConfig:
        """From options that were checked against `OPTIONS`."""
        return LlumnixConfig(
            poll_ns=int(float(given.get("poll_ms", 100)) * 1e6),
            threshold=float(given.get("threshold", 3.0)),
            migrate=given.get("migrate", True),
            drain=tuple((int(seconds * 1e9), instance) for seconds, instance in given.get("drain", ())),
        )


class LlumnixPolicy:
    """Global scheduler and migration; each lane is a local scheduler."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, config: LlumnixConfig) -> None:
        num, told = len(cluster.instances), [[at_ns / 1e9, instance] for at_ns, instance in config.drain]
        if engine.prefix_caching:
            raise ConfigError("system=llumnix does not cache prefixes: use engine.prefix_caching=false")
        if any(not 0 <= instance < num for _, instance in config.drain):
            raise refusal("system.drain", told, f"give [[seconds, instance], …] of the {num} instances, or []")
        if len({instance for _, instance in config.drain}) == num:
            raise refusal("system.drain", told, "leave an instance that serves")
        self.cluster = cluster
        self.engine = replace(engine, max_leap=1)
        self.config = config
        self.lanes: dict[int, MigratingLane] = {}  # by instance
        self.draining: set[int] = set()
        self.at: dict[int, int] = {}  # request -> instance
        self.seqs: dict[int, Seq] = {}
        self.orphans: list[Seq] = []  # while no instance serves
        self.mover = Mover(cluster.instances[0].num_layers, self.at, self._command_id, self._submit)
        self.now_ns = 0
        self._next_id = OWN_IDS
        self._starts: dict[int, int] = {}
        self._chosen: dict[int, int] = {}
        self._picks = 0
        self._dying: dict[int, MigratingLane] = {}
        self._polls: int | None = None  # the timer that is set
        self._drains: dict[int, int] | None = None  # timer -> instance

    def _command_id(self) -> int:
        self._next_id += 1
        return self._next_id

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React to one event."""
        out: list[Command] = []
        self.now_ns = now_ns
        self._plan_drains(out)
        if isinstance(event, StepDone):
            self._step_done(event, out)
        elif isinstance(event, RequestArrived):
            seq = Seq(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
            self.seqs[seq.request_id] = seq
            self._route(seq, out)
        elif isinstance(event, CopyDone):
            self.mover.copied(event, now_ns, out)
        elif isinstance(event, TimerFired):
            self._fired(event.command_id, out)
        elif isinstance(event, InstanceUp):
            if event.status is Status.OK:
                self._up(event, out)
        elif isinstance(event, InstanceLost):
            self._lost(event.instance, out)
        self.mover.wake(now_ns, out)
        for command in list(out):
            if isinstance(command, Abort):
                self._gone(command.request_id, out)
        self._stop_drained(out)
        self._arm(out)
        return out

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance that serves."""
        infos = self.cluster.instances
        for instance, lane in self.lanes.items():
            yield Gauge(instance, len(lane.running), len(lane.waiting), lane.used_blocks(), lane.num_blocks,
                        param_bytes=infos[instance].num_layers * infos[instance].layer_param_bytes)  # fmt: skip

    # ------------------------------------------------------------ freeness

    def dispatch_freeness(self, lane: MigratingLane) -> float:
        """F for dispatching: everybody who waits counts as if admitted."""
        requests = len(lane.running) + len(lane.waiting) + len(lane.joining)
        if not requests:
            return inf
        return (lane.free - sum(lane._blocks(seq.known) for seq in lane.waiting)) / requests

    def freeness(self, lane: MigratingLane) -> float:
        """F for migrating: of those who wait only the head of the line counts; who is to stop has none."""
        if lane.instance in self.draining:
            return -inf
        head = lane._blocks(lane.waiting[0].known) if lane.waiting else 0
        requests = len(lane.running) + len(lane.joining)
        if not requests:
            return inf if not head else 0.0
        return (lane.free - head) / requests

    # ------------------------------------------------------------ requests

    def _route(self, seq: Seq, out: list[Command]) -> None:
        open_to = [lane for lane in self.lanes.values() if lane.instance not in self.draining]
        open_to = open_to or list(self.lanes.values())
        if not open_to:
            self.orphans.append(seq)
            return
        chosen = self._chosen
        best = min(open_to, key=lambda lane: (-self.dispatch_freeness(lane), chosen[lane.instance]))
        self._picks += 1
        chosen[best.instance] = self._picks
        reason = best.refusal(seq)
        if reason is not None:
            out.append(Abort(seq.request_id, reason))
        else:
            self._submit(seq, best.instance, out)

    def _submit(self, seq: Seq, instance: int, out: list[Command]) -> None:
        lane = self.lanes[instance]
        self.at[seq.request_id] = instance
        lane.submit(seq, out)
        self.mover.settle(lane, self.now_ns, out)

    def _gone(self, request_id: int, out: list[Command]) -> None:
        """Finished or refused."""
        if self.seqs.pop(request_id, None) is not None:
            self.mover.drop(request_id, out)
            self.at.pop(request_id, None)

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        if event.status is not Status.OK:
            self._reroute(self._dying.pop(event.lane).lost(event), out)
            return
        lane = self.lanes[event.lane % len(self.cluster.instances)]
        for request_id, _ in event.prefilled:
            self.mover.prefilled(request_id, self.now_ns)
        for seq in lane.step_done(event, out):
            self._gone(seq.request_id, out)
        self.mover.boundary(lane, self.now_ns, out)

    # ------------------------------------------------------------ membership

    def _up(self, event: InstanceUp, out: list[Command]) -> None:
        instance = event.instance
        start = self._starts[instance] = self._starts.get(instance, -1) + 1
        lane_id = instance + start * len(self.cluster.instances)  # an instance that is back has a new lane
        layers = self.cluster.instances[instance].num_layers
        route = (Stage(instance, (0, layers)),)
        self.lanes[instance] = MigratingLane(lane_id, route, event.kv_cells // layers, self.engine)
        self._chosen.setdefault(instance, 0)
        orphans, self.orphans = self.orphans, []
        self._reroute(orphans, out)

    def _lost(self, instance: int, out: list[Command]) -> None:
        """Its requests are computed anew elsewhere, once the failed step has told how far they got."""
        self.draining.discard(instance)
        lane = self.lanes.pop(instance, None)
        if lane is None:
            return
        orphans = self.mover.lost(lane, self.now_ns, out)
        if lane.busy:
            self._dying[lane.lane] = lane
        else:
            orphans += lane.lost(None)
        self._reroute(orphans, out)

    def _reroute(self, seqs: list[Seq], out: list[Command]) -> None:
        for seq in seqs:
            if seq.request_id in self.seqs:
                self.at.pop(seq.request_id, None)
                self._route(seq, out)

    def _plan_drains(self, out: list[Command]) -> None:
        if self._drains is None:
            self._drains = {}
            for at_ns, instance in self.config.drain:
                out.append(SetTimer(self._command_id(), max(at_ns, self.now_ns)))
                self._drains[self._next_id] = instance

    def _drain(self, instance: int, out: list[Command]) -> None:
        """It takes nothing in any more; who waits there goes elsewhere at once, who runs migrates at the polls."""
        lane = self.lanes.get(instance)
        if lane is None or not any(one not in self.draining for one in self.lanes if one != instance):
            return
        self.draining.add(instance)
        queue = list(lane.waiting)
        lane.waiting.clear()
        self._reroute(queue, out)

    def _stop_drained(self, out: list[Command]) -> None:
        awaited = {move.dst.instance for move in self.mover.by_request.values()}
        for instance in sorted(self.draining - awaited):
            if self.lanes[instance].empty:
                del self.lanes[instance]
                self.draining.discard(instance)
                out.append(StopInstance(self._command_id(), instance))

    # ------------------------------------------------------------ migration

    def _arm(self, out: list[Command]) -> None:
        if self._polls is None and self.seqs and (self.config.migrate or self.draining):
            self._polls = self._command_id()
            period = self.config.poll_ns
            out.append(SetTimer(self._polls, (self.now_ns // period + 1) * period))

    def _fired(self, command_id: int, out: list[Command]) -> None:
        assert self._drains is not None
        if command_id == self._polls:
            self._polls = None
            self._poll(out)
        elif command_id in self._drains:
            self._drain(self._drains.pop(command_id), out)

    def _poll(self, out: list[Command]) -> None:
        """The least free with the freest, the next with the next, while they differ enough."""
        ranked = sorted((self.freeness(lane), instance) for instance, lane in self.lanes.items())
        limit, moving = self.config.threshold, {move.src.instance for move in self.mover.by_request.values()}
        sources = [(free, instance) for free, instance in ranked if free < limit and instance not in moving]
        goals = [(free, instance) for free, instance in reversed(ranked) if free >= limit]
        for (low, source), (high, goal) in zip(sources, goals):
            if high - low > limit and (self.config.migrate or source in self.draining):
                self._migrate(self.lanes[source], self.lanes[goal], out)

    def _migrate(self, src: MigratingLane, dst: MigratingLane, out: list[Command]) -> None:
        """The shortest decoding request, if it fits there and leaves room to grow."""
        able = [seq for seq in src.running.values()
                if seq.decoding and seq.request_id not in self.mover.by_request]  # fmt: skip
        if not able:
            return
        shortest = min(able, key=lambda seq: (src.stored(seq), seq.request_id))
        queued = sum(dst._blocks(seq.known) for seq in dst.waiting)
        if dst.free - queued >= src.blocks_of(shortest) + len(dst.running) + 1:
            self.mover.start(shortest, src, dst, "kv", self.now_ns, out)
