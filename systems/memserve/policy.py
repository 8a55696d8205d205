"""`system=memserve`: global scheduler, instances with their pools, cluster manager, put together as one state machine.

A request: dispatched by the scheduler, prefilled at P, its KV handed to D, decoded there, its KV retired at its end
(`systems/memserve/README.md` has the sections). Whatever a dead instance had waits, adrift, until the cluster manager
has declared it dead; then it goes on elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common.policy import Gauge
from common.sched.lane import EngineConfig
from common.types import (
    Abort,
    ClusterInfo,
    Command,
    CopyDone,
    Event,
    InstanceLost,
    InstanceUp,
    MessageArrived,
    RequestArrived,
    Send,
    SetTimer,
    StartInstance,
    Status,
    StepDone,
    SwapDone,
    TimerFired,
)  # fmt: skip
from systems.memserve.config import Options
from systems.memserve.handover import Handover
from systems.memserve.job import Job
from systems.memserve.limbo import Limbo
from systems.memserve.manager import ClusterManager, Heard
from systems.memserve.scheduler import GlobalScheduler
from systems.memserve.site import Flow, Site


class MemServePolicy:
    """See the module docstring."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any] | Options) -> None:
        self.cluster = cluster
        self.engine = engine
        self.options = options if isinstance(options, Options) else Options.of(options)
        self.roles = self.options.role_of(len(cluster.instances))
        self.sites: dict[int, Site] = {}
        self.flows: dict[int, Flow] = {}
        info = cluster.instances[0]
        token_bytes = info.cell_bytes * info.num_layers // cluster.block_size
        self.gs = GlobalScheduler(self.options, self.roles, cluster.block_size, token_bytes)
        self.cm = ClusterManager(int(self.options.timeout_s * 1e9))
        self.moves = Handover(self.options, self.sites, self.flows, self._adrift)
        self.moves.token_bytes = token_bytes
        self._beat_ns = int(self.options.heartbeat_s * 1e9)
        self._next_id = 0
        self._starts: dict[int, int] = {}
        self._starting: set[int] = set()
        self.limbo = Limbo()
        self._epoch = 0
        self._now = 0
        self._out: list[Command] = []
        self._handlers: dict[type, Any] = {
            RequestArrived: self._arrived,
            StepDone: self._step_done,
            CopyDone: self.moves.copy_done,
            SwapDone: self.moves.swap_done,
            MessageArrived: self._message,
            TimerFired: self._timer,
            InstanceUp: self._up,
            InstanceLost: self._lost,
        }

    def ids(self) -> int:
        """A fresh command id."""
        self._next_id += 1
        return self._next_id

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React to one event."""
        self._now = now_ns
        out: list[Command] = []
        self._out = out
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
        self._heed_aborts(out)

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance that is up."""
        for instance, site in self.sites.items():
            if site.pool.dead:
                continue
            info = self.cluster.instances[instance]
            yield site.gauge(info.num_layers * info.layer_param_bytes)

    # ------------------------------------------------------------ dispatch

    def _arrived(self, event: RequestArrived, out: list[Command]) -> None:
        job = Job(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
        self.flows[job.request_id] = Flow(job.prompt, job.session)
        self._dispatch(job, out)

    def _dispatch(self, job: Job, out: list[Command]) -> None:
        decision = self.gs.route(self._now, job.request_id, job.text(job.known), job.known, job.session)
        if decision is None:
            self.limbo.orphan(job)
            return
        job.prefill_at, job.decode_at = decision.prefill, decision.decode
        job.leaves = decision.prefill != decision.decode
        site = self.sites[decision.prefill]
        reason = site.refusal(job) or self.sites[decision.decode].refusal(job)
        if reason is not None:
            self._answered(job)
            out.append(Abort(job.request_id, reason))
            return
        flow = self.flows[job.request_id]
        flow.prefill_at, flow.decode_at, flow.expected = decision.prefill, decision.decode, decision.cached
        if site.pool.dead:
            self._adrift(site.instance, job)
            return
        site.homed[job.request_id] = job
        site.pool.tree.tick = self._now
        self.moves.accept(site, job, decision.fetch, out)

    def _answered(self, job: Job) -> None:
        """Neither its prefill nor its decode is waited for where it was sent."""
        self.gs.prefilled(job.prefill_at, job.request_id)
        self.gs.ended(job.decode_at, job.request_id)

    # ------------------------------------------------------------ work

    def _step_done(self, event: StepDone, out: list[Command]) -> None:
        instance = event.lane % len(self.cluster.instances)
        site = self.sites[instance]
        if event.status is not Status.OK:
            site.lane.lost(event)
            self._strand(site)
            return
        site.pool.tree.tick = self._now
        finished, left = site.lane.step_done(event, out)
        for request_id, _ in event.prefilled:
            if site.role != "decode" and request_id in site.homed:
                self._prompt_done(site, site.homed[request_id], out)
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

    def _prompt_done(self, site: Site, job: Job, out: list[Command]) -> None:
        flow = self.flows[job.request_id]
        if not flow.hit:
            flow.hit = min(job.shared + flow.fetched, job.prompt)
        out.append(Send(f"i{site.instance}", "gs", ("prefilled", job.request_id, site.instance)))

    def _heed_aborts(self, out: list[Command]) -> None:
        """What a lane has given up is answered."""
        for command in out:
            if type(command) is Abort:
                for site in self.sites.values():
                    job = site.homed.pop(command.request_id, None)
                    if job is not None:
                        self._answered(job)

    # ------------------------------------------------------------ agents

    def _message(self, event: MessageArrived, out: list[Command]) -> None:
        kind = event.payload[0]
        if kind == "beat":
            self.cm.beat(self._now, event.payload[1], event.payload[2], out)
        elif kind == "members":
            self._members(event.payload[1], event.payload[2], out)
        elif kind == "prefilled":
            self.gs.prefilled(event.payload[2], event.payload[1])
        elif kind == "response":
            _, request_id, instance, cached, content = event.payload
            self.gs.ended(instance, request_id)
            for where, tokens in cached:
                self.gs.responded(self._now, where, tuple(tuple(piece) for piece in content), tokens)

    def _timer(self, event: TimerFired, out: list[Command]) -> None:
        if event.to == "cm":
            for instance in (*self.cm.check(self._now, out), *self._never_up()):
                dead = instance not in self.sites or self.sites[instance].pool.dead
                if self.options.restart and dead and instance not in self._starting:
                    self._starting.add(instance)
                    out.append(StartInstance(self.ids(), instance))
            out.append(SetTimer(self.ids(), self._now + self._beat_ns, "cm"))
            return
        instance = int(event.to[1:])
        site = self.sites[instance]
        if site.pool.dead:
            return
        out.append(Send(event.to, "cm", ("beat", instance, self._starts[instance])))
        out.append(SetTimer(self.ids(), self._now + self._beat_ns, event.to))
        if self.options.local_ttl_s is not None:
            site.pool.expire(self._now - int(self.options.local_ttl_s * 1e9), out)
            self.moves.retry(site, out)
            site.lane.kick(out)

    def _never_up(self) -> list[int]:
        """Instances that should have been there from the start and died before anybody heard of them."""
        if self._now <= self.cm.timeout_ns:
            return []
        return [instance for instance in range(len(self.cluster.instances)) if instance not in self.sites]

    def _members(self, epoch: int, view: tuple[tuple[int, int], ...], out: list[Command]) -> None:
        if epoch <= self._epoch:
            return  # overtaken by a later view
        self._epoch = epoch
        known = dict(view)
        for instance in [one for one, start in self.gs.members.items() if known.get(one, -1) != start]:
            self.gs.leave(instance)
            for job in self.limbo.died(instance):
                self._go_on(job, out)
        new = [one for one in known if one not in self.gs.members]
        for instance in new:
            self.gs.join(instance, known[instance])
        if new:
            for job in self.limbo.joined():
                self._go_on(job, out)

    # ------------------------------------------------------------ membership

    def _up(self, event: InstanceUp, out: list[Command]) -> None:
        instance = event.instance
        self._starting.discard(instance)
        if event.status is not Status.OK:
            return
        info = self.cluster.instances[instance]
        start = self._starts[instance] = self._starts.get(instance, -1) + 1
        lane_id = instance + start * len(self.cluster.instances)  # an instance that is back has a new lane
        self.sites[instance] = Site(info, self.roles[instance], event.kv_cells // info.num_layers, lane_id,
                                    self.engine, self.options, self.ids)  # fmt: skip
        if event.command_id == -1:  # there from the start: known to everybody
            self.cm.heard[instance] = Heard(self._now, start)
            self.gs.join(instance, start)
            if not self._beat_ns:
                return
            if len(self._starts) == 1:
                out.append(SetTimer(self.ids(), self._now + self._beat_ns, "cm"))
        out.append(Send(f"i{instance}", "cm", ("beat", instance, start)))
        out.append(SetTimer(self.ids(), self._now + self._beat_ns, f"i{instance}"))

    def _lost(self, event: InstanceLost, out: list[Command]) -> None:
        """It is silent from now on. Nobody but its own clients' calls, which fail, knows before the manager does."""
        site = self.sites.get(event.instance)
        if site is None or site.pool.dead:
            return
        site.pool.dead = True
        self.moves.drop(event.instance)
        if not site.lane.busy:
            site.lane.lost(None)
            self._strand(site)

    def _strand(self, site: Site) -> None:
        """Everything that was at a dead instance, or was to come there, waits for its death to be known."""
        jobs = [*site.homed.values(), *site.pending]
        site.homed, waiting = {}, set(site.pending)
        site.pending.clear()
        for other in self.sites.values():  # prompts of its that waited for room elsewhere are gone
            if other is not site:
                other.pending = type(other.pending)(job for job in other.pending if job not in jobs)
        for job in jobs:
            if job not in waiting:
                job.restart()
            self._adrift(site.instance, job)

    def _adrift(self, instance: int, job: Job) -> None:
        self.limbo.forget(job)
        if instance in self.gs.members:
            self.limbo.wait_for(instance, job)
        else:
            self._go_on(job, self._out)

    def _go_on(self, job: Job, out: list[Command]) -> None:
        """The dead instance is known: to another D if its prompt is still at P, else from the start."""
        self._answered(job)
        home = self.sites.get(job.prefill_at)
        if home is None or home.homed.get(job.request_id) is not job or not job.owned:
            self._dispatch(job, out)
            return
        decode = self.gs.pick_decode(self._now, job.text(job.target), job.target)
        if decode < 0:
            self.limbo.orphan(job)
            return
        job.decode_at = decode
        self.gs.decodes[decode][job.request_id] = job.target
        self.moves.push(job, out)
