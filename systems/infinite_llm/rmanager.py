"""rManager: the agent of one instance. Its scheduler, what it has lent and what it has borrowed; it tells the gManager
by delta heartbeats, and shares no object with any other agent.
"""

from __future__ import annotations

from common.sched.lane import Seq
from common.types import Command, CopyDone, InstanceLost, MessageArrived, Progress, Send, Status, StepDone
from systems.infinite_llm.creditor import Creditor
from systems.infinite_llm.debtor import Debtor
from systems.infinite_llm.hostpool import HOST, HostPool
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.messages import (
    ENTRY_BYTES,
    GMANAGER,
    GMANAGER_INSTANCE,
    HEADER_BYTES,
    Answer,
    Freeze,
    Frozen,
    Heartbeat,
    Load,
    Message,
    MoveKvcache,
    Offer,
    PlacementEntry,
    Recall,
    Recalled,
    Release,
    Renew,
    Renewed,
    Resync,
    Return,
    TryMoveKvcache,
    Unfreeze,
    manager_name,
)
from systems.infinite_llm.settings import Settings


class RManager:
    """With `mode=off` it is its lane and nothing else."""

    def __init__(self, instance: int, lane: SpanLane, settings: Settings, host_blocks: int = 0) -> None:
        self.instance = instance
        self.name = manager_name(instance)
        self.lane = lane
        self.settings = settings
        self.on = settings.mode != "off"
        if self.on:
            lane.pooled = True
            lane.low = max(2, int(settings.low_share * lane.num_blocks))
        cap = int(settings.lend_cap * lane.num_blocks) if settings.mode == "debt" else None
        self.creditor = Creditor(instance, lane, settings.lease_ns, 2 * lane.low, self._tell, cap)
        self.host: Creditor | None = None
        if settings.mode == "debt" and host_blocks:
            self.host = Creditor(HOST + instance, HostPool(host_blocks), settings.lease_ns, 0, self._tell_as_host,
                                 host_blocks)  # fmt: skip
        self.debtor = Debtor(instance, lane, settings, self._tell)
        self._told: dict[int, PlacementEntry] = {}
        self._load: Load | None = None
        self._debts: dict[int, int] = {}
        self._host = (0, 0)
        self._sequence = 0
        self._full = True
        self._freeze: tuple[int, int] | None = None  # repair, when last told
        self._asked: Freeze | None = None
        self._failing: int | None = None  # the creditor that our running step fails with

    def _tell(self, instance: int, message: Message, out: list[Command]) -> None:
        to = GMANAGER if instance == GMANAGER_INSTANCE else manager_name(instance)
        out.append(Send(self.name, to, message, HEADER_BYTES))

    def _tell_as_host(self, instance: int, message: Message, out: list[Command]) -> None:
        out.append(Send(manager_name(HOST + self.instance), manager_name(instance), message, HEADER_BYTES))

    # ------------------------------------------------------------ events

    def submit(self, now_ns: int, seq: Seq, out: list[Command]) -> None:
        """A request of this home."""
        if self.on and self.lane.needs_loan(seq):
            self.debtor.want(now_ns, seq, out)
            return
        self.lane.submit(seq, out)
        self._after(now_ns, out)

    def step_done(self, now_ns: int, event: StepDone, out: list[Command]) -> list[Seq]:
        """A boundary: grant, switch, schedule. Returns the finished."""
        finished: list[Seq] = []
        if event.status is Status.OK:
            finished = self.lane.step_done(event, out)
        else:
            assert self._failing is not None, "a step failed and nobody was lost"
            self.lane.creditor_lost(event, self._failing, out)
            self._failing = None
        if self.on:
            self.creditor.settle(now_ns, out)
            self.debtor.recaller.before(now_ns, out)
        self.lane.schedule(out)
        self._after(now_ns, out)
        return finished

    def copied(self, now_ns: int, event: CopyDone, out: list[Command]) -> None:
        """A copy of ours ended."""
        self.debtor.copied(now_ns, event, out)
        self._after(now_ns, out)

    def message(self, now_ns: int, event: MessageArrived, out: list[Command]) -> None:
        """From another agent; late and doubled ones do no harm."""
        message = event.payload
        creditor = self.creditor if event.to == self.name else self.host
        if creditor is None:
            return
        if isinstance(message, TryMoveKvcache):
            creditor.asked(now_ns, message, out)
        elif isinstance(message, Release):
            creditor.released(now_ns, message.try_ids, out)
        elif isinstance(message, Return):
            creditor.returned(now_ns, message.try_id, message.num_blocks, out)
        elif isinstance(message, Renew):
            creditor.renewed(now_ns, message, out)
        elif isinstance(message, Answer):
            self.debtor.answered(now_ns, message, int(event.sender[2:]), out)
        elif isinstance(message, Renewed):
            self.debtor.leases.renewed(message.creditor, message.sequence)
        elif isinstance(message, Offer):
            self.debtor.offered(now_ns, message, out)
        elif isinstance(message, MoveKvcache):
            self.debtor.ordered(now_ns, message, out)
        elif isinstance(message, Resync):
            self._full = True
            self.heartbeat(out)
        else:
            self._repair(now_ns, message, out)
        self._after(now_ns, out)

    def tick(self, now_ns: int, event: Progress, out: list[Command]) -> None:
        """Every period: leases, repeats, heartbeat."""
        if self._freeze is not None and now_ns - self._freeze[1] > 5 * self.settings.period_ns:
            self._unfreeze(now_ns, out)  # the gManager is dead, or has forgotten us
        self.creditor.tick(now_ns, out)
        if self.host is not None:
            self.host.tick(now_ns, out)
        self.debtor.tick(now_ns, out)
        self._after(now_ns, out)
        clock = dict(event.lanes).get(self.lane.lane, self.lane.iteration)
        self.heartbeat(out, clock)

    def peer_lost(self, now_ns: int, event: InstanceLost, out: list[Command]) -> None:
        """Another instance died. As its debtor we know at once; as its creditor we wait for the lease to end."""
        lane = self.lane
        creditors = event.instance, HOST + event.instance
        if any(request_id in lane.running for creditor in creditors for request_id in lane.borrowed.at(creditor)):
            self._failing = event.instance
        for creditor in creditors:
            self.debtor.creditor_lost(now_ns, creditor, out)
        self._after(now_ns, out)

    def _after(self, now_ns: int, out: list[Command]) -> None:
        if self.on:
            self.debtor.scheduled(now_ns, out)
        if self._asked is not None and self.debtor.move is None:
            asked, self._asked = self._asked, None
            blocks = self.debtor.recaller.recallable(asked.creditor)
            self._tell(GMANAGER_INSTANCE, Frozen(asked.repair, self.instance, blocks, self.lane.free), out)

    # ------------------------------------------------------------ DGFM (v1)

    def _repair(self, now_ns: int, message: Message, out: list[Command]) -> None:
        debtor = self.debtor
        if isinstance(message, Freeze):
            if self._freeze is None or self._freeze[0] == message.repair:
                self._freeze = message.repair, now_ns
                self._stand(True)
                self._asked = message  # answered when the move under way has ended
            else:
                self._tell(GMANAGER_INSTANCE, Frozen(message.repair, self.instance, 0, self.lane.free), out)
        elif isinstance(message, Recall):
            if self._freeze is not None and self._freeze[0] == message.repair:
                debtor.recaller.ordered(now_ns, message, out)
            else:
                self._tell(GMANAGER_INSTANCE, Recalled(message.repair, message.turn, self.instance, 0), out)
        elif isinstance(message, Unfreeze) and self._freeze is not None and self._freeze[0] == message.repair:
            self._unfreeze(now_ns, out)

    def _stand(self, still: bool) -> None:
        self.creditor.frozen = self.debtor.moves.frozen = self.lane.frozen = still
        if self.host is not None:
            self.host.frozen = still

    def _unfreeze(self, now_ns: int, out: list[Command]) -> None:
        self._freeze = self._asked = None
        self._stand(False)
        self.lane.poke(out)
        self.debtor.moves.start(now_ns, out)

    # ------------------------------------------------------------ heartbeats

    def heartbeat(self, out: list[Command], clock: int | None = None) -> None:
        """Tell what changed since the last one; all of it after a resync."""
        entries, load = self._entries(clock), self._now(clock)
        full, self._full = self._full, False
        debts = self._debts_now(full)
        if full:
            changed = list(entries.values())
        else:
            changed = [entry for key, entry in entries.items() if self._told.get(key) != entry]
            changed += [entry._replace(num_blocks=0) for key, entry in self._told.items() if key not in entries]
        idle = not (self.lane.outstanding() or entries)
        host, host_debts = self._host_now()
        if not (full or changed or debts) and (load, host) == (self._load, self._host) and idle:
            return  # else even a heartbeat without news says that none was lost
        self._told, self._load, self._host = entries, load, host
        self._sequence += 1
        message = Heartbeat(self.instance, self._sequence, full, tuple(changed), load, debts, host, host_debts)
        num_entries = len(changed) + len(debts) + len(host_debts)
        out.append(Send(self.name, GMANAGER, message, HEADER_BYTES + ENTRY_BYTES * num_entries))

    def _host_now(self) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]]:
        """v1: CPU rBlocks and free ones; who owes how many."""
        if self.host is None:
            return (0, 0), ()
        return (self.host.lane.num_blocks, self.host.lane.free), tuple(self.host.lent.by_debtor().items())

    def _debts_now(self, full: bool) -> tuple[tuple[int, int], ...]:
        """v1: what each debtor owes, where that changed; all of it in a full heartbeat."""
        if self.settings.mode != "debt":
            return ()
        before, self._debts = self._debts, self.creditor.lent.by_debtor()
        if full:
            return tuple(self._debts.items())
        gone = tuple((debtor, 0) for debtor in before if debtor not in self._debts)
        return tuple(item for item in self._debts.items() if before.get(item[0]) != item[1]) + gone

    def _entries(self, clock: int | None) -> dict[int, PlacementEntry]:
        """Own requests by their id, others' by minus their id minus one."""
        lane, size = self.lane, self.lane.config.block_size
        at = lane.iteration if clock is None else clock
        found: dict[int, PlacementEntry] = {}
        for request_id, seq in lane.running.items():
            if seq.decoding:
                blocks = (seq.offset + at) // size - lane.borrowed.blocks(request_id)
                found[request_id] = PlacementEntry(request_id, self.instance, blocks, True)
        for request_id, blocks in self.creditor.lent.by_request().items():
            found[-1 - request_id] = PlacementEntry(request_id, self.instance, blocks, False)
        return found

    def _now(self, clock: int | None) -> Load:
        lane, size = self.lane, self.lane.config.block_size
        grown = 0 if clock is None else lane.phase.growth(lane.iteration, max(0, clock - lane.iteration))
        waiting = lane.waiting
        needed = sum(-(-seq.known // size) for seq in waiting)
        attended = lane.attended_tokens() + (lane.lent + grown) * size
        return Load(lane.num_blocks, max(0, lane.free - grown), lane.phase.num, len(waiting), needed, attended)
