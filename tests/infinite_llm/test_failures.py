"""Failures as laws: lost creditors, debtors and gManagers, lost and late heartbeats, racing plans; nobody waits for
ever, every token is attended to exactly once, and with real tensors nobody's text changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.types import AgentLost, InstanceLost, MessageArrived, Progress, RequestStatus, RunStep, Send, StepDone
from systems.infinite_llm.messages import Heartbeat, MoveKvcache, TryMoveKvcache
from tests.fakes import US
from tests.infinite_llm.test_laws import LAW, assert_all_ended
from tests.infinite_llm.test_local import QUICK, run_local
from tests.infinite_llm.worlds import CYCLE, FAST, MS, Run, World, crowded, worlds

GIANT = ((0, 24 * 16, 120), (10, 40, 90), (3000, 60, 60))  # over two of three instances of 20 blocks; and others
LOSSES = ("creditor", "debtor", "gmanager", "both")


class HeartbeatFate:
    """Heartbeats are lost or late within some times; everything else arrives."""

    def __init__(self, dark: tuple[tuple[int, int], ...], delay_ns: int = 0) -> None:
        self.dark = dark
        self.delay_ns = delay_ns
        self.num_lost = self.num_late = 0

    def deliveries(self, now_ns: int, message: Send) -> list[int]:
        if not isinstance(message.payload, Heartbeat):
            return [0]
        if any(low <= now_ns < high for low, high in self.dark):
            self.num_lost += 1
            return []
        self.num_late += self.delay_ns > 0
        return [self.delay_ns]


# ---------------------------------------------------------------- exactly once


def attended(executor, lane, request_id: int, stored: int) -> list[tuple[int, int]]:
    """Token ranges of a request's KV up to `stored` that its placement names, each backed by KV held there."""
    found = []
    placement = lane.spread.get(request_id)
    if placement is None:
        return [(0, stored)]
    for span in placement:
        end = stored if span.token_end is None else min(span.token_end, stored)
        if end <= span.token_start:
            continue
        found.append((span.token_start, end))
        if span.instance != lane.stages[0].instance:
            area = executor.state.area(request_id, span.instance, span.tier, span.layers, (span.token_start, end))
            layers = span.layers[1] - span.layers[0]
            assert area == (end - span.token_start) * layers, f"request {request_id}: {span} is not held there"
    return sorted(found)


def assert_attended_once(run: Run) -> None:
    for lane in run.executor.lanes.values():
        for request_id, member in lane.members.items():
            stored, reached = member.offset + lane.iteration, 0
            for low, high in attended(run.executor, lane, request_id, stored):
                assert low == reached, f"request {request_id}: tokens {reached} .. {low} are read twice or never"
                reached = high
            assert reached == stored


@LAW
@given(st.one_of(worlds(), worlds(debt=True), crowded()))
def test_every_token_is_attended_to_exactly_once(world: World) -> None:
    run = world.start()
    run.drive(lambda now, event: assert_attended_once(run))
    assert_all_ended(run)


def test_every_token_is_attended_to_exactly_once_while_debt_is_recalled() -> None:
    run, recalled = CYCLE.start(), 0

    def look(now: int, event: object) -> None:
        nonlocal recalled
        recalled = max(recalled, sum(m.debtor.recaller.num_recalled for m in run.policy.managers.values()))
        assert_attended_once(run)

    run.drive(look)
    assert_all_ended(run)
    assert recalled


# ---------------------------------------------------------------- racing plans


class Racing:
    """Orders that nobody planned, or that are out of date: random requests, blocks and destinations at random times."""

    def __init__(self, run: Run, seed: int, share: float) -> None:
        self.run = run
        self.random = random.Random(seed)
        self.share = share
        self.num_orders = 0

    def look(self, now: int, event: object) -> None:
        if isinstance(event, MessageArrived) or self.random.random() > self.share or not self.run.policy.managers:
            return
        homes = list(self.run.policy.managers)
        for plan in (1001, 1002):  # two plans at once, of the same request
            request = self.random.randrange(len(self.run.world.requests))
            order = MoveKvcache(request, self.random.randint(0, 12), self.random.choice(homes), plan)
            for home in homes:
                self.num_orders += 1
                commands = self.run.deliver(now, MessageArrived("gm", f"rm{home}", order))
                self.run.flying += sum(isinstance(command, Send) for command in commands)


@LAW
@given(worlds(faults=False), st.integers(0, 99), st.sampled_from((0.05, 0.5)))
def test_racing_and_stale_plans_harm_nobody(world: World, seed: int, share: float) -> None:
    run = world.start()
    racing = Racing(run, seed, share)

    def look(now: int, event: object) -> None:
        racing.look(now, event)
        assert_attended_once(run)

    run.drive(look)
    assert_all_ended(run)


def test_two_debtors_race_for_one_creditor() -> None:
    """Both are told to move to the only free instance more than it can take in all: one is refused."""
    world = World(3, 20, ((0, 200, 200), (1, 200, 200)), replace(FAST, mode="reactive", low_share=0.02, pace=64))
    run, told, answers = world.start(), [], []

    def look(now: int, event: object) -> None:
        lanes = {i: m.lane for i, m in run.policy.managers.items()}
        ready = all(any(seq.decoding and lanes[i].home_blocks(seq) > 11 for seq in lanes[i].running.values())
                    for i in (0, 1)) if len(lanes) == 3 else False  # fmt: skip
        if ready and not told:
            for home in (0, 1):
                request = next(iter(lanes[home].running))
                told.extend(run.deliver(now, MessageArrived("gm", f"rm{home}", MoveKvcache(request, 11, 2, 1))))
            run.flying += sum(isinstance(command, Send) for command in told)
        if isinstance(event, MessageArrived) and event.sender == "rm2" and hasattr(event.payload, "granted"):
            answers.append(event.payload.granted)

    run.drive(look)
    assert_all_ended(run)
    assert told and answers[:2] == [True, False], "first come, first served"


# ---------------------------------------------------------------- heartbeats


@pytest.mark.parametrize("mode", ("proactive", "reactive", "debt"))
@pytest.mark.parametrize("fate", ("lost", "late", "all lost"))
def test_heartbeats_lost_or_late_delay_advice_and_nothing_else(mode: str, fate: str) -> None:
    """A giant is admitted once heartbeats are heard again; with none at all whoever fits a home runs to its end."""
    dark = {"lost": ((0, 30 * MS),), "late": (), "all lost": ((0, 1 << 60),)}[fate]
    gap = HeartbeatFate(dark, 7 * MS if fate == "late" else 0)
    requests = GIANT[1:] if fate == "all lost" else GIANT
    world = World(3, 20, requests, replace(FAST, mode=mode, lend_cap=1.0))
    run = world.start()
    run.executor.control.faults = gap
    run.drive(lambda now, event: assert_attended_once(run))
    assert_all_ended(run)
    assert gap.num_lost or gap.num_late
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * len(requests)
    if fate == "lost":
        assert run.record.requests.first_token_ns[0] > 30 * MS
        others = world.run().record.requests
        assert run.record.requests.finish_ns[1] <= 1.2 * others.finish_ns[1], "decoding did not wait"


# ---------------------------------------------------------------- nobody waits for ever


def test_a_giant_is_not_starved_by_a_stream_of_small_ones() -> None:
    """Small requests keep arriving at a load that fills every instance; the giant that came first ends among them."""
    small = tuple((150, 100, 40) for _ in range(120))
    run = World(3, 20, ((500, 24 * 16, 30), *small), FAST, budget=512).run()
    requests = run.record.requests
    assert_all_ended(run)
    assert list(requests.status) == [RequestStatus.FINISHED] * 121
    assert requests.finish_ns[0] < sorted(requests.finish_ns[1:])[100]


def test_two_giants_do_not_wait_for_each_other() -> None:
    """Each needs more than half of the pool: one after the other, whatever the order of their arrival."""
    for gap in (0, 1, 300):
        run = World(3, 20, ((0, 38 * 16, 20), (gap, 38 * 16, 20), (gap, 38 * 16, 20)), FAST, budget=512).run()
        assert_all_ended(run)
        assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 3


# ---------------------------------------------------------------- real tensors


def roles(world: World) -> tuple[int, int]:
    """Of an undisturbed run: the giant's home, and the first creditor that it asked."""
    run = world.run()
    for *_, commands in run.trace:
        for command in commands:
            if isinstance(command, Send) and isinstance(command.payload, TryMoveKvcache):
                return command.payload.debtor, int(command.to[2:])
    raise AssertionError("nobody borrowed")


def admissions(run) -> int:
    """How often the giant joined a lane."""
    return sum(entry.request_id == 0 for *_, commands in run.trace for command in commands
               if isinstance(command, RunStep) for entry in command.add)  # fmt: skip


@pytest.mark.parametrize("mode", ("proactive", "debt"))
@pytest.mark.parametrize("lost", LOSSES)
def test_tokens_survive_losses(mode: str, lost: str) -> None:
    """The giant's creditor, its home, the gManager, or gManager and creditor die while it decodes: same tokens."""
    settings = replace(QUICK, mode=mode, lend_cap=1.0, low_share=0.1)
    world = World(3, 20, GIANT, settings, budget=512)
    home, creditor = roles(world)
    whole = world.run()
    middle = (whole.record.requests.first_token_ns[0] + whole.record.requests.finish_ns[0]) // 2 // US
    instance = {"creditor": creditor, "both": creditor, "debtor": home}.get(lost)
    dead = ((middle, instance),) if instance is not None else ()
    gm = ((middle - 500, False), (middle + 2500, True)) if lost in ("gmanager", "both") else ()
    run = run_local(replace(world, lost_instances=dead, lost_gm=gm))
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 3
    seen = {type(event) for _, event, _ in run.trace}
    assert (InstanceLost in seen) == bool(dead) and (AgentLost in seen) == bool(gm)
    if dead:
        assert admissions(run) > admissions(whole), "it was computed anew"


def test_decoding_does_not_wait_for_a_dead_gmanager() -> None:
    """While it is dead, steps of the giant go on at the pace of an undisturbed run."""
    world = World(3, 20, ((0, 24 * 16, 60),), replace(FAST, mode="reactive"))
    whole = world.run()
    first = whole.record.requests.first_token_ns[0] // US
    run = replace(world, lost_gm=((first + 100, False), (1 << 40, True))).run()
    assert run.record.requests.finish_ns[0] == whole.record.requests.finish_ns[0]
    assert run.policy.gmanager is None and any(isinstance(event, StepDone | Progress) for _, event, _ in run.trace)


@pytest.mark.parametrize("mode", ("proactive", "reactive"))
def test_giants_at_once_are_served_at_once(mode: str) -> None:
    """Four giants of one and a half instances each, on eight: nobody's home is lent away to another of them, so each is
    about as fast as a lone one."""
    settings = replace(FAST, mode=mode)
    giant = (0, 30 * 16, 20)
    alone = World(8, 20, (giant,), settings, budget=64).run().record.requests.finish_ns[0]
    together = World(8, 20, (giant,) * 4, settings, budget=64).run().record.requests.finish_ns
    assert max(together) < 1.6 * alone
