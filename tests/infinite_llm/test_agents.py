"""rManager and gManager one by one: duplicates, reordered and lost messages, racing plans, and the death of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.sched.lane import EngineConfig, Seq
from common.types import AgentLost, InstanceLost, MessageArrived, RequestStatus, Send, Stage, Status, StepDone
from systems.infinite_llm.asks import Asker
from systems.infinite_llm.creditor import Creditor
from systems.infinite_llm.gmanager import GManager
from systems.infinite_llm.lane import SpanLane
from systems.infinite_llm.leases import Leases
from systems.infinite_llm.messages import (
    Answer,
    Heartbeat,
    Load,
    MoveKvcache,
    Need,
    Offer,
    PlacementEntry,
    Renew,
    Renewed,
    Resync,
    Settled,
    TryMoveKvcache,
)
from systems.infinite_llm.moves import RELIEF, Moves
from systems.infinite_llm.planner import Planner
from systems.infinite_llm.policy import InfiniteLlmPolicy
from systems.infinite_llm.rmanager import RManager
from systems.infinite_llm.settings import Settings
from systems.infinite_llm.throughput import Throughput
from tests.fakes import US
from tests.infinite_llm.test_laws import assert_all_ended
from tests.infinite_llm.worlds import FAST, World

LEASE_NS = 1000
LOAD = Load(20, 10, 1, 0, 0, 160)


def lane(instance: int = 0, blocks: int = 20) -> SpanLane:
    return SpanLane(instance, Stage(instance, (0, 4)), blocks, EngineConfig(16, 64, 16, max_model_len=1 << 20))


class Creditors:
    """A creditor, and what it said."""

    def __init__(self, cap: int | None = None) -> None:
        self.said: list[object] = []
        self.lane = lane()
        self.creditor = Creditor(0, self.lane, LEASE_NS, 0, lambda to, message, out: self.said.append(message), cap)

    def ask(self, try_id: int, blocks: int, now_ns: int = 0, debtor: int = 1) -> bool:
        self.creditor.asked(now_ns, TryMoveKvcache(try_id, try_id, debtor, 7, blocks, False), [])
        answer = self.said.pop()
        assert isinstance(answer, Answer) and answer.try_id == try_id
        return answer.granted


def gmanager() -> GManager:
    planner = Planner(Throughput(((1, 1e7), (256, 1.5e7)), 200.0), 16)
    return GManager((0, 1), {0: 0, 1: 0}, Settings("reactive"), planner)


def beat(sequence: int, blocks: int, full: bool = False) -> MessageArrived:
    entry = PlacementEntry(sequence, 0, blocks, True)
    return MessageArrived("rm0", "gm", Heartbeat(0, sequence, full, (entry,), LOAD))


def heard(manager: GManager, event: MessageArrived) -> list[object]:
    out: list = []
    manager.message(0, event, out)
    return [command.payload for command in out if isinstance(command, Send)]


# ---------------------------------------------------------------- messages


def test_doubled_and_late_heartbeats_change_nothing() -> None:
    manager = gmanager()
    assert not heard(manager, beat(1, 5)) and not heard(manager, beat(2, 6))
    for event in (beat(2, 99), beat(1, 98)):
        assert not heard(manager, event)
    assert {key: entry.num_blocks for key, entry in manager.map[0].items()} == {1: 5, 2: 6}


def test_a_lost_heartbeat_is_noticed_and_a_full_one_repairs() -> None:
    manager = gmanager()
    heard(manager, beat(1, 5))
    assert heard(manager, beat(3, 7)) == [Resync()] and 3 not in manager.map[0]
    assert not heard(manager, beat(4, 8, full=True))
    assert list(manager.map[0]) == [4], "all there is, and nothing of before"


def test_a_doubled_reservation_is_booked_once() -> None:
    world = Creditors()
    assert world.ask(1, 6) and world.ask(1, 6)
    assert world.lane.free == 14 and world.creditor.lent.total == 6
    world.creditor.released(0, (1,), [])
    world.creditor.released(0, (1,), [])
    assert world.lane.free == 20 and world.lane.lent == 0


def test_a_late_renewal_takes_nothing_away() -> None:
    """Number 5 overtakes number 4, which knew one reservation less."""
    world = Creditors()
    assert world.ask(1, 3) and world.ask(3, 4)
    world.creditor.renewed(10, Renew(1, 5, ((1, 3), (3, 4))), [])
    world.creditor.renewed(11, Renew(1, 4, ((1, 3),)), [])
    assert world.said == [Renewed(0, 5)] and world.creditor.lent.total == 7


def test_a_renewal_repeats_a_lost_release_and_a_lost_return() -> None:
    world = Creditors()
    assert world.ask(1, 3) and world.ask(2, 4)
    world.creditor.renewed(10, Renew(1, 5, ((2, 1),)), [])
    assert world.creditor.lent.total == 1 and world.lane.free == 19


def test_racing_reservations_are_first_come_first_served() -> None:
    world = Creditors()
    assert world.ask(1, 15, debtor=1) and not world.ask(2, 15, debtor=2)
    assert world.creditor.lent.by_debtor() == {1: 15} and world.lane.free == 5, "a refusal leaves no trace"


def test_the_cap_on_lending() -> None:
    world = Creditors(cap=8)
    assert world.ask(1, 5) and not world.ask(2, 4) and world.ask(3, 3)


def test_a_lease_ends_without_renewal() -> None:
    world = Creditors()
    assert world.ask(1, 6)
    world.creditor.tick(LEASE_NS - 1, [])
    assert world.lane.free == 14
    world.creditor.tick(LEASE_NS, [])
    assert world.lane.free == 20 and not world.creditor.lent.grants


def decoding(blocks: int) -> RManager:
    """An rManager whose request 7 decodes, with so many full blocks at home."""
    manager = RManager(0, lane(), replace(FAST, mode="reactive"))
    out: list = []
    manager.submit(0, Seq(7, blocks * 16, 100, None, -1), out)
    step = next(command for command in out if hasattr(command, "stages") and command.stages)
    manager.step_done(1, StepDone(step.command_id, 0, Status.OK, 4, 4, (), ((7, 4),), ()), out)
    return manager


def test_of_two_racing_plans_the_second_sends_only_what_is_left() -> None:
    manager, out = decoding(6), []
    for plan, dst in ((1, 1), (2, 2)):
        manager.message(2, MessageArrived("gm", "rm0", MoveKvcache(7, 5, dst, plan)), out)
    asked = [c.payload for c in out if isinstance(c, Send) and isinstance(c.payload, TryMoveKvcache)]
    assert [(a.num_blocks, c) for a, c in zip(asked, (1,))] == [(5, 1)] and len(asked) == 1, "one after the other"
    out.clear()
    manager.message(3, MessageArrived("rm1", "rm0", Answer(asked[0].try_id, False)), out)
    again = [c.payload for c in out if isinstance(c, Send) and isinstance(c.payload, TryMoveKvcache)]
    assert len(again) == 1 and again[0].try_id != asked[0].try_id
    out.clear()
    manager.message(4, MessageArrived("rm1", "rm0", Answer(asked[0].try_id, True)), out)  # late, and contradicting
    assert [type(c.payload).__name__ for c in out if isinstance(c, Send)] == ["Release"]


def test_an_order_for_a_request_that_is_gone_is_dropped() -> None:
    manager, out = decoding(6), []
    manager.message(2, MessageArrived("gm", "rm0", MoveKvcache(8, 5, 1, 1)), out)
    assert not [c for c in out if isinstance(c, Send)]


# ---------------------------------------------------------------- deaths


@pytest.mark.parametrize("mode", ("proactive", "reactive", "debt"))
def test_decoding_goes_on_without_a_gmanager_and_its_successor_learns_all(mode: str) -> None:
    """It dies while a giant decodes over two instances and is back 4 ms later: full heartbeats fill its map."""
    requests = ((0, 24 * 16, 160), (3000, 60, 100))
    world = World(2, 20, requests, replace(FAST, mode=mode, lend_cap=1.0), lost_gm=((8_000, False), (12_000, True)))
    run, seen = world.start(), {"dark": 0, "full": 0}

    def look(now: int, event: object) -> None:
        if run.policy.gmanager is None:
            seen["dark"] += isinstance(event, StepDone) or type(event).__name__ == "Progress"
        elif now > 12_000 * US and isinstance(event, MessageArrived) and isinstance(event.payload, Heartbeat):
            seen["full"] += event.payload.full

    run.drive(look)
    assert_all_ended(run)
    assert seen["dark"] and seen["full"] >= 2
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 2
    if mode == "debt":
        assert run.policy.gmanager.ledger.rows.keys() == {0, 1}


def owed(run) -> int:
    """Blocks lent to instance 0."""
    return sum(manager.creditor.lent.by_debtor().get(0, 0) for manager in run.policy.managers.values())


@pytest.mark.parametrize("mode", ("reactive", "debt"))
def test_a_dead_debtors_blocks_come_back_when_its_lease_ends(mode: str) -> None:
    """Instance 0 dies with a giant that borrows from 1; the giant is computed anew at home 1 and ends there."""
    settings = replace(FAST, mode=mode, lend_cap=1.0)
    world = World(3, 20, ((0, 24 * 16, 200),), settings, lost_instances=((14_000, 0),))
    run, lost_ns, lent, back_ns = world.start(), None, {}, None

    def look(now: int, event: object) -> None:
        nonlocal lost_ns, lent, back_ns
        if isinstance(event, InstanceLost):
            lost_ns = now
            lent = {i: m.creditor.lent.by_debtor().get(0, 0) for i, m in run.policy.managers.items()}
        elif (
            lost_ns and not back_ns and not any(0 in m.creditor.lent.by_debtor() for m in run.policy.managers.values())
        ):
            back_ns = now

    run.drive(look)
    assert_all_ended(run)
    assert sum(lent.values()) > 0 and run.record.requests.status[0] == RequestStatus.FINISHED
    assert back_ns is None or back_ns - lost_ns >= settings.lease_ns - 2 * settings.period_ns


@pytest.mark.parametrize("mode", ("reactive", "debt"))
def test_a_dead_creditors_requests_are_computed_anew(mode: str) -> None:
    settings = replace(FAST, mode=mode, lend_cap=1.0)
    world = World(3, 20, ((0, 24 * 16, 200), (10, 40, 150)), settings)
    first = world.run()
    creditor = next(c.payload for *_, commands in first.trace for c in commands
                    if isinstance(c, Send) and isinstance(c.payload, TryMoveKvcache))  # fmt: skip
    to = next(c.to for *_, commands in first.trace for c in commands
              if isinstance(c, Send) and c.payload == creditor)  # fmt: skip
    run = replace(world, lost_instances=((14_000, int(to[2:])),)).run()
    assert_all_ended(run)
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 2
    preempted = [played.record.requests.num_preemptions[0] for played in (first, run)]
    assert preempted == [0, 1], "it was computed twice"


def test_relief_goes_to_creditors_that_keep_a_tenth_and_have_nobody_waiting() -> None:
    """Else a full cluster lends in circles, and every loan costs a round trip per layer."""
    made = gmanager()
    made.loads = {0: LOAD, 1: Load(100, 40, 4, 0, 0, 960)}
    need = Need(7, 0, 1, 50, False)
    assert made.divide(need, wait=False) == ((1, 30),)
    made.loads[1] = made.loads[1]._replace(waiting=1, waiting_blocks=60)
    assert made.divide(need, wait=False) == ()
    assert made.divide(need, wait=True) == ((1, 40),), "a giant takes what there is"


def test_a_newer_plan_replaces_what_is_left_of_an_older_one() -> None:
    """An older order that comes late is dropped; relief stays."""
    home = lane()
    leases = Leases(0, LEASE_NS, lambda to, message, out: None)
    moves = Moves(home, FAST, Asker(0, leases, lambda to, message, out: None))
    moves.frozen = True  # so that orders wait
    for request_id, plan in ((1, 1), (2, 1), (3, RELIEF), (4, 2), (5, 2), (6, 1)):
        moves.ordered(0, MoveKvcache(request_id, 5, 1, plan), [])
    assert [order.request_id for order in moves.orders] == [3, 4, 5]


def test_a_successors_plans_replace_its_predecessors() -> None:
    """A restarted gManager counts on: else its first plans would look older than what is left of the dead one's."""
    policy = InfiniteLlmPolicy(World(2, 20, ()).model().info(), EngineConfig(16, 64, 16, max_model_len=1 << 20), FAST)

    def planned() -> int:
        made = policy.gmanager
        assert made is not None
        made.planner = Planner(Throughput(((1, 1e7), (256, 1.5e7)), 1.0), 16, hysteresis=0.0, horizon_iterations=10**6)
        out: list = []
        made.joined(0)
        made.joined(1)
        for instance, load in enumerate((Load(200, 0, 2, 1, 20, 3200), Load(200, 200, 0, 0, 0, 0))):
            entries = (PlacementEntry(7, 0, 100, True),) if instance == 0 else ()
            beat = Heartbeat(instance, 1, True, entries, load)
            made.message(2 * FAST.period_ns, MessageArrived(f"rm{instance}", "gm", beat), out)
        return next(c.payload.plan for c in out if isinstance(c, Send) and isinstance(c.payload, MoveKvcache))

    numbers = [planned()]
    for _ in range(2):
        policy.on_event(0, AgentLost("gm", True))
        numbers.append(planned())
    assert numbers == sorted(set(numbers)), "each newer than those before"


def test_a_giant_that_is_told_twice_is_promised_once() -> None:
    """Its need crossed the offer. What it will not ask for stays free for the next giant; so does what a dead home was
    told to ask for."""
    made = GManager(tuple(range(4)), dict.fromkeys(range(4), 0), Settings("reactive"), gmanager().planner)
    made.loads = {instance: Load(100, 100, 0, 0, 0, 0) for instance in range(4)}

    def told(message: object) -> list[tuple[tuple[int, int], ...]]:
        return [m.parts for m in heard(made, MessageArrived("rm", "gm", message)) if isinstance(m, Offer)]

    giant, other = Need(7, 0, 80, 100, True), Need(8, 1, 80, 100, True)
    first = told(giant)
    assert first == [((3, 100),)] and told(giant) == first, "the same creditor again"
    made.message(0, MessageArrived("rm0", "gm", Settled(7)), [])
    assert told(other) == [((2, 100),)]
    made.left(1)
    assert made.divide(Need(9, 0, 80, 100, True), True) == ((2, 100),)
