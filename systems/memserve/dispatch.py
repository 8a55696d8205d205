"""Requests on their way to an instance: dispatched when they arrive, and again when the instance they were at dies.

Whatever a dead instance had waits, adrift, until its death is known; then it goes on elsewhere with all it has said. If
no instance of a role is left, those of the other take its work on. If no instance is left at all, requests wait for a
start that is coming, or are refused: the timeline says which (`nobody left`).
"""

from __future__ import annotations

from common.types import Abort, Command, Mark, RequestArrived
from systems.memserve.config import Options
from systems.memserve.handover import Handover
from systems.memserve.job import Job
from systems.memserve.limbo import Limbo
from systems.memserve.scheduler import Decision, GlobalScheduler
from systems.memserve.site import Flow, Site

NOBODY = "no instance is left, and none will be started (system.restart)"


class Dispatch:
    """See the module docstring. `now` and `out` are those of the event at hand."""

    moves: Handover  # set by the policy: it needs `adrift`

    def __init__(self, options: Options, sites: dict[int, Site], gs: GlobalScheduler) -> None:
        self.options = options
        self.sites = sites
        self.gs = gs
        self.flows: dict[int, Flow] = {}
        self.limbo = Limbo()
        self.now = 0
        self.out: list[Command] = []
        self._said: set[str] = set()  # in the timeline, since somebody was there last

    # ------------------------------------------------------------ to an instance

    def arrived(self, event: RequestArrived) -> None:
        """A new request."""
        job = Job(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
        self.flows[job.request_id] = Flow(job.prompt, job.session)
        self.send(job)

    def send(self, job: Job) -> None:
        """To the instance that the scheduler names."""
        decision = self.gs.route(self.now, job.request_id, job.text(job.known), job.known, job.session)
        if decision is None:
            self._orphan(job)
            return
        job.prefill_at, job.decode_at = decision.prefill, decision.decode
        job.leaves = decision.prefill != decision.decode
        site = self.sites[decision.prefill]
        reason = site.refusal(job) or self.sites[decision.decode].refusal(job)
        if reason is not None:
            self._answered(job)
            self.out.append(Abort(job.request_id, reason))
            return
        self._note(job, decision)
        if site.pool.dead:
            self.adrift(site.instance, job)
            return
        site.homed[job.request_id] = job
        site.pool.tree.tick = self.now
        self.moves.accept(site, job, decision.fetch, self.out)

    def _note(self, job: Job, decision: Decision) -> None:
        flow = self.flows[job.request_id]
        flow.prefill_at, flow.decode_at, flow.expected = decision.prefill, decision.decode, decision.cached

    def _answered(self, job: Job) -> None:
        """Neither its prefill nor its decode is waited for where it was sent."""
        self.gs.prefilled(job.prefill_at, job.request_id)
        self.gs.ended(job.decode_at, job.request_id)

    def heed_aborts(self) -> None:
        """What a lane has given up is answered."""
        for command in self.out:
            if type(command) is Abort:
                for site in self.sites.values():
                    job = site.homed.pop(command.request_id, None)
                    if job is not None:
                        self._answered(job)

    # ------------------------------------------------------------ when instances die

    def strand(self, site: Site) -> None:
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
            self.adrift(site.instance, job)

    def adrift(self, instance: int, job: Job) -> None:
        """The instance that it needs is dead, or not known alive."""
        self.limbo.forget(job)
        if instance in self.gs.members:
            self.limbo.wait_for(instance, job)
        else:
            self._go_on(job)

    def died(self, instance: int) -> None:
        """A death is known: who waited for it may go on."""
        for job in self.limbo.died(instance):
            self._go_on(job)

    def joined(self) -> None:
        """There is a new member: who waited for one may go on."""
        self._said.clear()
        for job in self.limbo.joined():
            self._go_on(job)

    def _go_on(self, job: Job) -> None:
        """To another D if its prompt is still at P (or on at P, if there is no D), else from the start."""
        self._answered(job)
        home = self.sites.get(job.prefill_at)
        if home is None or home.homed.get(job.request_id) is not job or not job.owned:
            self.send(job)
            return
        decode = self.gs.pick_decode(self.now, job.text(job.target), job.target)
        if decode < 0:
            self.moves.stay(job, self.out)
        else:
            job.decode_at = decode
        self.gs.decodes.get(job.decode_at, {})[job.request_id] = job.target
        if decode >= 0:
            self.moves.push(job, self.out)

    # ------------------------------------------------------------ when nobody is left

    def _orphan(self, job: Job) -> None:
        self._say(f"request {job.request_id} waits for an instance")
        self.limbo.orphan(job)

    def give_up(self) -> None:
        """Requests that wait for an instance are refused once there can be none."""
        if self.limbo.orphans and not self.options.revives and all(site.pool.dead for site in self.sites.values()):
            self._say(NOBODY)
            self.out += [Abort(job.request_id, NOBODY) for job in self.limbo.joined()]

    def _say(self, text: str) -> None:
        kind = text.partition(" ")[0]
        if kind not in self._said:
            self._said.add(kind)
            self.out.append(Mark(0, "nobody left", text))
