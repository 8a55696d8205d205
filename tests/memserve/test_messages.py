"""Responses are numbered and said again until they are acknowledged: lost ones leave no load behind in the scheduler's
view, doubled ones and those of an earlier start change nothing."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.executors.sim import SimExecutor
from common.types import RequestStatus, Send
from systems.memserve.channel import Inbox, Outbox
from systems.memserve.config import Options
from systems.memserve.scheduler import GlobalScheduler
from tests.laws.strategies import law
from tests.memserve.lib import PLANNER, Scenario, Turn, run


class Deaf:
    """Loses every message of a kind until a time; all others arrive at once."""

    def __init__(self, kinds: tuple[str, ...], until_ns: int) -> None:
        self.kinds, self.until_ns, self.lost = kinds, until_ns, 0

    def deliveries(self, now_ns, message):
        gone = now_ns < self.until_ns and message.payload[0] in self.kinds
        self.lost += gone
        return [] if gone else [0]


def scenario(design="pd_caching_3", roles="1P1D", instances=2, **more):
    """Requests close together, then one so late that all has been said again by then."""
    options = Options(design=design, roles=roles, heartbeat_s=0.0005, timeout_s=0.0015, planner=PLANNER, **more)
    turns = (*(Turn(index, 1, 40, 20) for index in range(6)), Turn(6, 300, 40, 20))
    return Scenario(turns, (48,) * 7, options, instances, 80, 0)


@pytest.mark.parametrize("kinds", [("prefilled",), ("response",), ("prefilled", "response"), ("response", "ack")])
@pytest.mark.parametrize("design", ["colocated_caching", "pd_basic", "pd_caching_3"])
def test_lost_responses_leave_no_load(design, kinds, monkeypatch):
    """Every message of the first requests is lost; when the last one arrives the tables hold that one alone."""
    seen = {}
    route = GlobalScheduler.route

    def watched(gs, now_ns, request_id, *rest):
        seen[request_id] = [len(book) for one in gs.members for book in (gs.queue[one], gs.decodes[one])]
        return route(gs, now_ns, request_id, *rest)

    monkeypatch.setattr(GlobalScheduler, "route", watched)
    base = scenario(design, None if design == "colocated_caching" else "1P1D")
    workload, record, _, _ = base.parts()
    deaf = Deaf(kinds, 8_000_000)
    policy, executor = run(base, SimExecutor(base.model(), workload, record, message_faults=deaf), record)
    assert all(status == RequestStatus.FINISHED for status in executor.record.requests.status)
    assert deaf.lost, "nothing was lost"
    assert sum(seen[5]), "the table was empty while requests were there"
    assert not sum(seen[6]), f"load is left: {seen[6]}"
    said_again = sum(site.outbox.num_again for site in policy.sites.values())
    assert said_again, "nothing was said again"


def test_a_lost_response_is_in_the_trees_after_all():
    """What the scheduler knows of caches recovers with it."""
    base = scenario()
    workload, record, _, _ = base.parts()
    executor = SimExecutor(base.model(), workload, record, message_faults=Deaf(("response",), 8_000_000))
    policy, _ = run(base, executor, record)
    for index in range(6):
        content = (("doc", 0, 48), (f"s{index}:{index}", 0, 40))
        assert policy.gs.trees[0].match(content, 88) == 80, f"request {index}"


def test_a_reply_of_one_token_settles_its_decode_instance():
    """It ends at P; D had been told to expect it."""
    options = Options(design="pd_caching_3", planner=PLANNER)
    policy, _ = run(Scenario((Turn(0, 0, 40, 1), Turn(1, 40, 40, 5)), (0, 0), options, 2, 60, 0))
    assert not any(policy.gs.decodes.values()) and not any(policy.gs.queue.values())


def test_nothing_is_said_again_without_losses():
    policy, _ = run(scenario(roles="2P2D", instances=4))
    assert not any(site.outbox.num_again for site in policy.sites.values())
    assert all(len(site.outbox) <= 2 for site in policy.sites.values()), "the last period's at most"


@law(200)
@given(st.integers(0, 1 << 20), st.integers(1, 30), st.sampled_from((0.1, 0.5, 0.9)))
def test_the_channel_delivers_once_whatever_is_lost(seed, count, loss):
    """Any loss, doubling and order of messages and of acknowledgements; the scheduler may forget and learn anew."""
    rng = random.Random(seed)
    outbox, inbox, heard = Outbox(3, 0, keep=True), Inbox(), []
    wire: list[tuple] = []
    for beat in itertools.count():
        out: list[Send] = []
        if beat < count:
            outbox.say(("response", beat), out)
        outbox.beat(out)
        wire += [command.payload for command in out for _ in range(rng.choice((1, 2))) if rng.random() > loss]
        rng.shuffle(wire)
        for _ in range(rng.randrange(len(wire) + 1)):
            kind, _, _, number, base, what = wire.pop()
            assert kind == "response"
            if inbox.hear(number, base):
                heard.append(what)
        if inbox.owed and rng.random() > loss:
            outbox.acknowledged(*inbox.acknowledge())
        if beat == count // 2 and rng.random() < 0.3:
            inbox = Inbox()  # it had taken the instance for dead
            wire.clear()
        if beat >= count and not len(outbox):
            break
        assert beat < 5_000, "never all heard"
    assert set(heard) == set(range(count))
    assert len(heard) - count <= count // 2 + 1, "only what was not acknowledged before it forgot is heard twice"
    assert not inbox.beyond or max(inbox.beyond) < count


def test_a_scheduler_that_forgot_catches_up():
    """It took the instance for dead; what had been acknowledged before will not come again."""
    inbox = Inbox()
    assert inbox.hear(7, 5) and not inbox.hear(7, 5)
    assert inbox.acknowledge() == (5, (7,))
    assert inbox.hear(6, 5) and inbox.hear(5, 5) and not inbox.hear(3, 3)
    assert inbox.acknowledge() == (8, ())


def test_messages_of_an_earlier_start_do_not_count():
    """What an instance had said in an earlier life takes nothing off the load of this one."""
    gs = GlobalScheduler(Options(planner=PLANNER), ["prefill", "decode"], 16, 100)
    gs.join(0, 0)
    gs.leave(0)
    assert not gs.hears(0, 0, 0, 0), "dead"
    gs.join(0, 1)
    assert not gs.hears(0, 0, 0, 0), "an earlier start"
    assert not gs.hears(0, 2, 0, 0), "a start that the manager has not told of yet: it will be said again"
    assert gs.hears(0, 1, 0, 0) and not gs.hears(0, 1, 0, 0)


def test_a_prefill_instance_dies_before_its_last_word_is_heard():
    """A reply of one token ends at P, whose response is lost, and P with it: D must not be taken for busy."""
    turns = (Turn(0, 0, 40, 1), Turn(1, 300, 40, 20))
    base = replace(scenario(roles="2P1D", instances=3), turns=turns, losses=((12, 0), (12, 1)))
    workload, record, faults, _ = base.parts()
    executor = SimExecutor(base.model(), workload, record, faults=faults,
                           message_faults=Deaf(("response",), 8_000_000))  # fmt: skip
    run(base, executor, record)  # its law: what has ended weighs on nobody
    assert record.requests.finish_ns[0] < 1_200_000 and list(record.requests.status) == [RequestStatus.FINISHED] * 2


def test_deaths_and_lost_messages_together():
    base = scenario(restart=True)
    for seed in range(6):
        for when in (4, 8, 12):
            _, executor = run(replace(base, losses=((when, 1),), message_seed=seed))
            assert all(status == RequestStatus.FINISHED for status in executor.record.requests.status)
