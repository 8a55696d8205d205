"""`system=memserve`: global scheduler, instances with their pools, cluster manager, put together as one state machine.

A request: dispatched by the scheduler, prefilled at P, its KV handed to D, decoded there, its KV retired at its end
(`systems/memserve/README.md` has the sections).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common.policy import Gauge
from common.sched.lane import EngineConfig
from common.types import (
    AgentLost,
    ClusterInfo,
    Command,
    CopyDone,
    Event,
    InstanceLost,
    InstanceUp,
    MessageArrived,
    RequestArrived,
    Status,
    StepDone,
    SwapDone,
    TimerFired,
)  # fmt: skip
from systems.memserve.config import Options
from systems.memserve.dispatch import Dispatch
from systems.memserve.handover import Handover
from systems.memserve.job import Job
from systems.memserve.membership import Membership
from systems.memserve.scheduler import GlobalScheduler
from systems.memserve.site import Flow, Site


class MemServePolicy:
    """See the module docstring."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any] | Options) -> None:
        self.cluster = cluster
        self.options = options if isinstance(options, Options) else Options.of(options)
        self.roles = self.options.role_of(len(cluster.instances))
        self.sites: dict[int, Site] = {}
        info = cluster.instances[0]
        token_bytes = info.cell_bytes * info.num_layers // cluster.block_size
        self.gs = GlobalScheduler(self.options, self.roles, cluster.block_size, token_bytes)
        self.desk = Dispatch(self.options, self.sites, self.gs)
        self.flows: dict[int, Flow] = self.desk.flows
        self.moves = Handover(self.options, self.sites, self.flows, self.desk.adrift)
        self.moves.token_bytes = token_bytes
        self.desk.moves = self.moves
        self.members = Membership(cluster, engine, self.options, self.desk, self.ids)
        self._next_id = 0
        self._handlers: dict[type, Any] = {
            RequestArrived: lambda event, out: self.desk.arrived(event),
            StepDone: self._step_done,
            CopyDone: self.moves.copy_done,
            SwapDone: self.moves.swap_done,
            MessageArrived: self._message,
            TimerFired: self._timer,
            InstanceUp: self.members.up,
            InstanceLost: self._lost,
            AgentLost: self.members.manager_back,
        }

    def ids(self) -> int:
        """A fresh command id."""
        self._next_id += 1
        return self._next_id

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React to one event."""
        out: list[Command] = []
        self.desk.now, self.desk.out = now_ns, out
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event, out)
            self._after(out)
        return out

    def _after(self, out: list[Command]) -> None:
        """What any event may have made possible: copies behind new prefills, prompts that waited for room."""
        for site in list(self.sites.values()):
            if site.pool.dead:
                continue
            if site.pending:
                self.moves.retry(site, out)
            if site.lane.waiting and not site.lane.busy:
                site.lane.schedule(out)
            if site.lane.joined:
                self.moves.sent(site, out)
        self.desk.heed_aborts()
        self.desk.give_up()

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance that is up."""
        for instance, site in self.sites.items():
            if site.pool.dead:
                continue
            info = self.cluster.instances[instance]
            yield site.gauge(info.num_layers * info.layer_param_bytes)

    # ------------------------------------------------------------ work

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        instance = event.lane % len(self.cluster.instances)
        site = self.sites[instance]
        if event.status is not Status.OK:
            site.lane.lost(event)
            self.desk.strand(site)
            return
        site.pool.tree.tick = self.desk.now
        finished, left = site.lane.step_done(event, out)
        for request_id, _ in event.prefilled:
            job = site.homed.get(request_id)
            if job is not None and job.prefill_at == instance:  # a decode instance computes anew what it preempts
                self._note_hit(job)
                if request_id not in event.finished:  # else its response says so too
                    site.outbox.say(("prefilled", request_id), out)
        for job in finished:
            if job.copy is not None:
                job.copy = None  # its only token came with the prompt: what is under way to D is cancelled
            self.moves.finish(site, job, out)
        for job in left:
            self.moves.push(job, out)
        if not site.lane.busy:
            site.lane.schedule(out)
        self.moves.sent(site, out)
        self.moves.retry(site, out)

    def _note_hit(self, job: Job) -> None:
        flow = self.flows[job.request_id]
        if not flow.hit:
            flow.hit = min(job.had, job.prompt)

    # ------------------------------------------------------------ agents

    def _message(self, event: MessageArrived, out: list[Command]) -> None:
        kind, *_ = payload = event.payload
        if kind not in ("prefilled", "response"):
            self.members.heard(payload, out)
            return
        _, instance, start, number, base, request_id, *what = payload
        if not self.gs.hears(instance, start, number, base):
            return
        if kind == "prefilled":
            self.gs.prefilled(instance, request_id)
            return
        (prefill, decode), cached, content = what
        self.gs.prefilled(prefill, request_id)
        self.gs.ended(decode, request_id)
        for where, tokens in cached:
            self.gs.responded(self.desk.now, where, tuple(tuple(piece) for piece in content), tokens)

    def _timer(self, event: TimerFired, out: list[Command]) -> None:
        site = self.members.timer(event, out)
        if site is not None and self.options.local_ttl_s is not None:
            site.pool.expire(self.desk.now - int(self.options.local_ttl_s * 1e9), out)
            self.moves.retry(site, out)
            site.lane.kick(out)

    def _lost(self, event: InstanceLost, out: list[Command]) -> None:
        site = self.members.lost(event)
        if site is None:
            return
        self.moves.drop(event.instance)
        if not site.lane.busy:
            site.lane.lost(None)
            self.desk.strand(site)
