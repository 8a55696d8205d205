"""Agents that die and come back, and messages that go astray, on a policy of two agents that keep each other's time."""

from __future__ import annotations

import numpy as np
import pytest

from common.executors.simfaults import RandomMessageFaults
from common.rng import stream
from common.types import (
    AgentLost,
    Entry,
    MessageArrived,
    Progress,
    RequestArrived,
    RunStep,
    Send,
    SetTimer,
    Stage,
    TimerFired,
    Watch,
)
from tests.fakes import US, FakeWorkload, cluster, run

PING, PONG = "ping", "pong"


class Pair:
    """`ping` tells `pong` the time every 100 us; `pong` watches the instance and has a timer of its own."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, object]] = []
        self.next_id = 0

    def timer(self, at_us: int, to: str) -> SetTimer:
        self.next_id += 1
        return SetTimer(self.next_id, at_us * US, to)

    def on_event(self, now_ns, event):
        if isinstance(event, RequestArrived):
            step = RunStep(0, 0, (Entry(0, 0, 8),), stages=(Stage(0, (0, 4)),))
            return [step, self.timer(100, PING), self.timer(1_020, PONG), Watch(0, 150 * US, PONG)]
        self.seen.append((now_ns, event))
        if isinstance(event, TimerFired) and event.to == PING:
            return [Send(PING, PONG, now_ns // US), self.timer(now_ns // US + 100, PING)]
        if isinstance(event, AgentLost):
            if event.restarted:
                return [Watch(0, 200 * US, PONG)]
            ghost = [Send(PONG, PING, "ghost"), self.timer(950, PONG), Watch(0, 10 * US, PONG)]
            return [*ghost, Send(PING, PONG, "too soon")]
        return []

    def gauges(self):
        return ()

    def times(self, kind, **wanted):
        """When events of a kind came, in us."""
        return [
            now // US
            for now, event in self.seen
            if isinstance(event, kind) and all(getattr(event, key) == value for key, value in wanted.items())
        ]


WORKLOAD = FakeWorkload([0], [8], [25])


def play(**faults) -> Pair:
    policy = Pair()
    record, _ = run(policy, cluster(1), WORKLOAD, **faults)
    assert record.requests.output_tokens[0] == 25 and record.end_ns > 1_050 * US
    return policy


def test_nothing_reaches_or_leaves_a_dead_agent():
    policy = play(agent_faults=((495 * US, PONG, 402 * US),))
    assert [(now // US, event) for now, event in policy.seen if isinstance(event, AgentLost)] == [
        (495, AgentLost(PONG, restarted=False)), (897, AgentLost(PONG, restarted=True))]  # fmt: skip
    # Of ten ticks those that would have come while it was dead are lost.
    assert policy.times(MessageArrived, to=PONG)[:6] == [110, 210, 310, 410, 910, 1_010]
    assert policy.times(MessageArrived, to=PING) == []  # no word of a ghost
    # Its watch of 150 us and its timer for 1,020 us are gone with it, and what was asked for meanwhile never was.
    assert policy.times(Progress)[:4] == [150, 300, 450, 1_097]
    assert policy.times(TimerFired, to=PONG) == []
    assert policy.times(TimerFired, to=PING)[:11] == [*range(100, 1_100, 100), 1_100]  # the other lives on


def test_a_message_under_way_at_the_restart_arrives():
    """Sent at 800 us, 10 us on its way; back at 805 us."""
    policy = play(agent_faults=((495 * US, PONG, 310 * US),))
    assert policy.times(MessageArrived, to=PONG)[4] == 810


def test_without_faults_all_of_it_comes():
    policy = play()
    assert policy.times(TimerFired, to=PONG) == [1_020]
    assert policy.times(Progress)[:3] == [150, 300, 450]


def test_a_death_of_the_dead_and_one_after_the_end_change_nothing():
    once = play(agent_faults=((495 * US, PONG, 402 * US),))
    again = play(agent_faults=((495 * US, PONG, 402 * US), (600 * US, PONG, 1), (10**12, PING, 1)))
    assert once.seen == again.seen


def test_random_faults_have_the_shares_and_the_mean_that_were_asked_for():
    faults = RandomMessageFaults(stream(3, "message faults"), 1_000.0, 0.2, 0.1)
    fates = [faults.deliveries(0, Send("a", "b", None)) for _ in range(20_000)]
    assert np.mean([not fate for fate in fates]) == pytest.approx(0.2, abs=0.01)
    assert np.mean([len(fate) == 2 for fate in fates]) == pytest.approx(0.08, abs=0.01)
    assert np.mean([delay for fate in fates for delay in fate]) == pytest.approx(1_000, rel=0.03)


def test_faults_of_one_kind_leave_the_others_where_they_were():
    def fates(*plan):
        faults = RandomMessageFaults(stream(3, "message faults"), *plan)
        return [faults.deliveries(0, Send("a", "b", None)) for _ in range(200)]

    late, late_and_lost = fates(500.0, 0.0, 0.0), fates(500.0, 0.3, 0.0)
    assert all(some in (all_, []) for all_, some in zip(late, late_and_lost)) and [] in late_and_lost
    assert fates(0.0, 0.0, 0.0) == [[0]] * 200 and fates(0.0, 1.0, 1.0) == [[]] * 200
