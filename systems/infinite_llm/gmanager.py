"""gManager: the request placement map, fed by heartbeats, and the two kinds of advice drawn from it: plans
(`planner`) and offers. It may be out of date and may die: rManagers reserve before they send, and decode without it.
"""

from __future__ import annotations

from collections import deque

from common.marks import PLANNED
from common.types import Command, Mark, MessageArrived, Send
from systems.infinite_llm.messages import (
    GMANAGER,
    HEADER_BYTES,
    Heartbeat,
    Load,
    Message,
    MoveKvcache,
    Need,
    Offer,
    PlacementEntry,
    Resync,
    Settled,
    manager_name,
)
from systems.infinite_llm.planner import Planner, View, planned_text, scatter
from systems.infinite_llm.settings import Settings


class GManager:
    """One admission of a giant at a time holds the token, so two of them cannot each wait for the other's memory."""

    def __init__(
        self, instances: tuple[int, ...], nodes: dict[int, int], settings: Settings, planner: Planner, epoch: int = 1
    ) -> None:
        self.members: dict[int, None] = dict.fromkeys(instances)
        self.nodes = nodes
        self.settings = settings
        self.planner = planner
        self.map: dict[int, dict[int, PlacementEntry]] = {}  # instance -> request -> entry of its own requests
        self.lent: dict[int, dict[int, PlacementEntry]] = {}
        self.loads: dict[int, Load] = {}
        self.needs: deque[Need] = deque()
        self.token: tuple[int, int, int] | None = None  # request, instance, when last heard of
        self.num_plans = 0
        self._before = (epoch - 1) << 32  # a successor's plans are newer than all of its predecessor's
        # blocks that a giant (request, home) was told to ask of an instance, until that one's next heartbeat tells
        self.promised: dict[tuple[int, int], dict[int, int]] = {}
        self._sequence: dict[int, int] = {}
        self._planned_ns = 0
        self._choices = 0
        self._fresh: dict[int, None] = {}

    def start(self, out: list[Command]) -> None:
        """After a restart: ask for full heartbeats."""
        for instance in self.members:
            self._tell(instance, Resync(), out)

    def _tell(self, instance: int, message: Message, out: list[Command]) -> None:
        out.append(Send(GMANAGER, manager_name(instance), message, HEADER_BYTES))

    # ------------------------------------------------------------ events

    def message(self, now_ns: int, event: MessageArrived, out: list[Command]) -> None:
        """From an rManager."""
        message = event.payload
        if isinstance(message, Heartbeat):
            self._heartbeat(now_ns, message, out)
        elif isinstance(message, Need):
            self._need(now_ns, message, out)
        elif isinstance(message, Settled):
            self.needs = deque(need for need in self.needs if need.request_id != message.request_id)
            if self.token is not None and self.token[0] == message.request_id:
                self.token = None
        self._next_admission(now_ns, out)

    def joined(self, instance: int) -> None:
        """An instance is up: its heartbeats count from 1 again."""
        self.left(instance)
        self.members[instance] = None

    def left(self, instance: int) -> None:
        """An instance died."""
        for table in (self.members, self.map, self.lent, self.loads, self._sequence, self._fresh):
            table.pop(instance, None)
        self._told_itself(instance)
        self.promised = {giant: parts for giant, parts in self.promised.items() if giant[1] != instance}
        self.needs = deque(need for need in self.needs if need.instance != instance)
        if self.token is not None and self.token[1] == instance:
            self.token = None

    def _heartbeat(self, now_ns: int, message: Heartbeat, out: list[Command]) -> None:
        instance, last = message.instance, self._sequence.get(message.instance, 0)
        if instance not in self.members or message.sequence <= last:
            return
        if not message.full and message.sequence != last + 1:
            self._tell(instance, Resync(), out)  # a delta is missing: this one says nothing without it
            return
        self._sequence[instance] = message.sequence
        own, lent = self.map.setdefault(instance, {}), self.lent.setdefault(instance, {})
        if message.full:
            own.clear()
            lent.clear()
        for entry in message.entries:
            table = own if entry.local else lent
            if entry.num_blocks:
                table[entry.request_id] = entry
            else:
                table.pop(entry.request_id, None)
        self.loads[instance] = message.load
        self._told_itself(instance)
        self._fresh[instance] = None
        self.took(now_ns, message)
        self._plan(now_ns, out)

    def took(self, now_ns: int, message: Heartbeat) -> None:
        """A heartbeat has been taken in (v1 keeps its ledger by it)."""

    # ------------------------------------------------------------ advice

    def _plan(self, now_ns: int, out: list[Command]) -> None:
        """After a round of updates, or of three periods; at most once a period."""
        settings = self.settings
        quiet = now_ns - self._planned_ns
        waits = len(self._fresh) < len(self.members) and quiet < 3 * settings.period_ns
        if settings.mode != "proactive" or self.token is not None or quiet < settings.period_ns // 2 or waits:
            return
        if settings.plan_limit is not None and self.num_plans >= settings.plan_limit:
            return
        self._planned_ns = now_ns
        self._fresh.clear()
        view = View(self.loads, {key: {r: e.num_blocks for r, e in own.items()} for key, own in self.map.items()})
        moves = self.planner.plan(view)
        if moves:
            self.num_plans += 1
        number = self._before + self.num_plans
        for move in moves:
            order = MoveKvcache(move.request_id, move.num_blocks, move.dst, number)
            out.append(Mark(move.src, PLANNED, planned_text(number, move, settings.verify_ns)))
            self._tell(move.src, order, out)

    def _need(self, now_ns: int, need: Need, out: list[Command]) -> None:
        if not need.admission:
            self.offer_relief(now_ns, need, out)
        elif self.token is not None and self.token[0] == need.request_id:
            self.token = (need.request_id, need.instance, now_ns)
            if not need.holding:
                self.token = None  # it was told, and has heard nothing or given up: tell it again
                self.needs.appendleft(need)
        elif need.holding:
            self.token = self.token or (need.request_id, need.instance, now_ns)
        else:
            known = [other.request_id for other in self.needs]
            if need.request_id in known:
                self.needs[known.index(need.request_id)] = need
            else:
                self.needs.append(need)
            for instance in self.members:
                if instance not in self.loads:
                    self._tell(instance, Resync(), out)  # its first heartbeat was lost

    def offer_relief(self, now_ns: int, need: Need, out: list[Command]) -> None:
        """Where blocks of a running request could go."""
        self._tell(need.instance, Offer(need.request_id, False, self.divide(need, False)), out)

    def _next_admission(self, now_ns: int, out: list[Command]) -> None:
        if self.token is not None and now_ns - self.token[2] > 5 * self.settings.period_ns:
            self.token = None
        while self.token is None and self.needs and len(self.loads) == len(self.members):
            need = self.needs.popleft()
            self.promised.pop((need.request_id, need.instance), None)  # told again, it asks once
            parts = self.divide(need, True)
            if parts:
                self.token = (need.request_id, need.instance, now_ns)
                self._promise(need, parts)
                self._tell(need.instance, Offer(need.request_id, True, parts), out)

    def _promise(self, need: Need, parts: tuple[tuple[int, int], ...]) -> None:
        """Else the next giant is sent to the same creditors, and waits for the first to end."""
        home = self.loads.get(need.instance)
        self.promised[need.request_id, need.instance] = {**dict(parts), need.instance: home.capacity if home else 0}

    def _told_itself(self, instance: int) -> None:
        """What it holds for giants is in its heartbeat, or died with it."""
        for parts in self.promised.values():
            parts.pop(instance, None)
        self.promised = {giant: parts for giant, parts in self.promised.items() if parts}

    def divide(self, need: Need, wait: bool) -> tuple[tuple[int, int], ...]:
        """Creditors and blocks: free memory first, most free first; with `wait` also what will come free. () if the
        least cannot be had."""
        order = self.ranked_for_giant(need.instance) if wait else self.ranked(need.instance)
        parts: dict[int, int] = {}
        left = need.best
        for instance in order:
            load = self.loads[instance]
            spare = self._unpromised(instance) if wait else self.planner.spare(load)
            take = min(left, spare)
            if take > 0:
                parts[instance] = take
                left -= take
        short = need.least - (need.best - left)
        if short > 0 and wait:
            for instance in order:
                take = min(short, self.loads[instance].capacity - parts.get(instance, 0))
                if take > 0:
                    parts[instance] = parts.get(instance, 0) + take
                    short -= take
        return tuple(parts.items()) if short <= 0 else ()

    def ranked(self, debtor: int) -> list[int]:
        """Possible creditors, most free first; with `locality` those of its node before the others."""
        others = [instance for instance in self.loads if instance != debtor]
        node = self.nodes[debtor]
        if self.settings.creditor == "random":
            self._choices += 1
            return sorted(others, key=lambda i: scatter(i, self._choices))
        far = self.settings.locality
        return sorted(others, key=lambda i: (far and self.nodes[i] != node, -self.loads[i].free, i))

    def ranked_for_giant(self, debtor: int) -> list[int]:
        """As `ranked`; but homes of giants that wait come last (they need their memory themselves), what was promised
        counts as gone, and of equals the last comes first (the dispatcher makes the first ones homes)."""
        homes = {need.instance for need in self.needs}
        order = self.ranked(debtor)
        if self.settings.creditor != "random":
            far, node = self.settings.locality, self.nodes[debtor]
            order.sort(key=lambda i: (far and self.nodes[i] != node, -self._unpromised(i), -i))
        return sorted(order, key=lambda i: i in homes)

    def _unpromised(self, instance: int) -> int:
        promised = sum(parts.get(instance, 0) for parts in self.promised.values())
        return max(0, self.loads[instance].free - promised)
