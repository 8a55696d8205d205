"""Instances that come up, are heard of, fall silent and are started anew; and what the scheduler is told of it (4.4).

Each instance sends the cluster manager a heartbeat; the manager's view goes to the scheduler, which acknowledges then
what instances have told it. Without a manager (`heartbeat_s` 0) the call that fails says that its instance is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.sched.lane import EngineConfig
from common.types import (
    AgentLost,
    ClusterInfo,
    Command,
    InstanceLost,
    InstanceUp,
    Mark,
    Send,
    SetTimer,
    StartInstance,
    Status,
    TimerFired,
)
from systems.memserve.config import Options
from systems.memserve.dispatch import Dispatch
from systems.memserve.manager import ClusterManager, Heard
from systems.memserve.site import Site


class Membership:
    """See the module docstring. `ids`: fresh command ids."""

    def __init__(self, cluster: ClusterInfo, engine: EngineConfig, options: Options, desk: Dispatch,
                 ids: Callable[[], int]) -> None:  # fmt: skip
        self.cluster = cluster
        self.engine = engine
        self.options = options
        self.desk = desk
        self.sites = desk.sites
        self.gs = desk.gs
        self.roles = desk.gs.roles
        self.cm = ClusterManager(int(options.timeout_s * 1e9))
        self.ids = ids
        self._beat_ns = int(options.heartbeat_s * 1e9)
        self._starts: dict[int, int] = {}
        self._starting: set[int] = set()
        self._epoch = 0
        self._missing: set[str] = set()  # roles

    # ------------------------------------------------------------ instances

    def up(self, event: InstanceUp, out: list[Command]) -> None:
        """An instance is there, empty: from the start, or because it was started."""
        instance = event.instance
        self._starting.discard(instance)
        if event.status is not Status.OK:
            return
        info = self.cluster.instances[instance]
        start = self._starts[instance] = self._starts.get(instance, -1) + 1
        lane_id = instance + start * len(self.cluster.instances)  # an instance that is back has a new lane
        self.sites[instance] = Site(info, self.roles[instance], event.kv_cells // info.num_layers, lane_id, start,
                                    self.engine, self.options, self.ids)  # fmt: skip
        if event.command_id == -1:  # there from the start: known to everybody
            self.cm.heard[instance] = Heard(self.desk.now, start)
            self.gs.join(instance, start)
            if not self._beat_ns:
                return
            if len(self._starts) == 1:
                out.append(SetTimer(self.ids(), self.desk.now + self._beat_ns, "cm"))
        out.append(Send(f"i{instance}", "cm", ("beat", instance, start)))
        out.append(SetTimer(self.ids(), self.desk.now + self._beat_ns, f"i{instance}"))

    def lost(self, event: InstanceLost) -> Site | None:
        """It is silent from now on; nobody else knows before the manager does. None: it was known dead."""
        site = self.sites.get(event.instance)
        if site is None or site.pool.dead:
            return None
        site.pool.dead = True
        if not self._beat_ns:
            self.gs.leave(event.instance)
            self.desk.died(event.instance)
            self._note_roles(self.desk.out)
        return site

    # ------------------------------------------------------------ timers and messages

    def timer(self, event: TimerFired, out: list[Command]) -> Site | None:
        """The manager looks around; an instance (the answer) sends its heartbeat."""
        if event.to == "cm":
            self.cm.check(self.desk.now, out)
            if self.options.revives:
                self._start_missing(out)
            out.append(SetTimer(self.ids(), self.desk.now + self._beat_ns, "cm"))
            return None
        site = self.sites[int(event.to[1:])]
        if site.pool.dead:
            return None
        out.append(Send(event.to, "cm", ("beat", site.instance, site.start)))
        out.append(SetTimer(self.ids(), self.desk.now + self._beat_ns, event.to))
        site.outbox.beat(out)
        return site

    def manager_back(self, event: AgentLost, out: list[Command]) -> None:
        """The manager is there again, empty. (Nothing is done for other agents: theirs is the state of an instance.)"""
        if event.agent == "cm" and event.restarted and self._beat_ns:
            self.cm.back(self.desk.now)
            out.append(SetTimer(self.ids(), self.desk.now + self._beat_ns, "cm"))

    def _start_missing(self, out: list[Command]) -> None:
        """Who was declared dead, or has never been heard of though it should have been there from the start. A start
        that failed is tried again."""
        if self.desk.now <= max(self.cm.timeout_ns, self.cm.listens_until_ns):
            return
        for instance in range(len(self.cluster.instances)):
            dead = instance not in self.sites or self.sites[instance].pool.dead
            if dead and instance not in self.cm.heard and instance not in self._starting:
                self._starting.add(instance)
                out.append(StartInstance(self.ids(), instance))

    def heard(self, payload: tuple[Any, ...], out: list[Command]) -> None:
        """`beat`: to the manager. `members`: its view, to the scheduler. `ack`: the scheduler's, to an instance."""
        if payload[0] == "beat":
            self.cm.beat(self.desk.now, payload[1], payload[2], out)
        elif payload[0] == "members":
            self._view(payload[1], payload[2], out)
        else:
            _, instance, start, upto, beyond = payload
            if self.sites[instance].start == start:
                self.sites[instance].outbox.acknowledged(upto, tuple(beyond))

    def _view(self, epoch: int, view: tuple[tuple[int, int], ...], out: list[Command]) -> None:
        if epoch <= self._epoch:
            return  # overtaken by a later view
        self._epoch = epoch
        known = dict(view)
        for instance in [one for one, start in self.gs.members.items() if known.get(one, -1) != start]:
            self.gs.leave(instance)
            self.desk.died(instance)
        new = [one for one in known if one not in self.gs.members]
        for instance in new:
            self.gs.join(instance, known[instance])
        if new:
            self.desk.joined()
        self._note_roles(out)
        for instance, inbox in self.gs.inboxes.items():
            if inbox.owed:
                out.append(Send("gs", f"i{instance}", ("ack", instance, self.gs.members[instance],
                                                       *inbox.acknowledge())))  # fmt: skip

    def _note_roles(self, out: list[Command]) -> None:
        """The timeline says when a role dies out, and who takes its work on, and when it is back."""
        gone = {role for role, *stand_in in (("prefill", "both"), ("decode",))
                if role in self.roles and not self.gs.able(role, *stand_in)}  # fmt: skip
        if gone != self._missing and self.gs.members:
            what = " and ".join(sorted(gone))
            text = f"no {what} instance: the others take that on" if gone else "every role is there again"
            out.append(Mark(min(self.gs.members), "makeshift", text))
        self._missing = gone
