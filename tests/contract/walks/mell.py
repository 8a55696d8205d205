"""MELL: requests gather on a new GPU, live, as KV or as tokens; the old one is emptied and stopped.

Request 0 migrates in stages while it decodes: full blocks, what grew meanwhile, and at a boundary the rest. Request 1
goes as tokens. Request 2 finishes in the middle of its own migration. Then an instance dies under request 3, with a
copy on its way. Request 4 never gets a place.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.types import (
    Abort,
    CopyDone,
    CopySpan,
    Entry,
    FreeSpan,
    InstanceDown,
    InstanceLost,
    InstanceUp,
    Progress,
    SetTimer,
    Stage,
    StartInstance,
    Status,
    StepDone,
    StopInstance,
    Watch,
)
from tests.contract.runtimes import Outcome
from tests.contract.script import Script, Story, World
from tests.fakes import FakeWorkload

US = 1_000
ALL = (0, 4)


class Mell(Script):
    """0, 1 and 2 run on instance 0, and 3 on 1; instance 2 is started for them."""

    world = World(instances=3, blocks=96, running=2)
    workload = FakeWorkload([0, 0, 0, 0, 0], [300, 120, 120, 200, 50], [200, 150, 100, 250, 10])

    def agents(self) -> Iterable[Story]:
        return [self.story()]

    def story(self) -> Story:
        yield self.arrived(0, 1, 2, 3, 4)
        yield self.ask(SetTimer, self.now + 1000 * US)  # the next planning epoch
        self.mark("plan")
        yield self.ask(StartInstance, 2)
        self.mark("up", 2)

        self.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 300), Entry(1, 0, 120), Entry(2, 0, 120)))
        self.change(1, stages=(Stage(1, ALL),), add=(Entry(3, 0, 200),))
        yield self.change(0)
        yield self.reached(0, 1, 2)
        self.do(Watch(0, 50 * US))
        doomed = self.ask(CopySpan, 2, 0, 2, ALL, (0, 112), pace=1)
        done = 0
        for _ in range(2):
            yield self.progress()
            full = self.stored(0) // 16 * 16
            assert full > done and 0 in self.books[0].members, "it decodes on while its full blocks move"
            copied = yield self.ask(CopySpan, 0, 0, 2, ALL, (done, full))
            assert copied.status is Status.OK
            done = full
        yield self.change(0, park=(0,))
        yield self.ask(CopySpan, 0, 0, 2, ALL, (done, self.tokens[0]))
        self.do(FreeSpan(0, 0))
        self.change(2, stages=(Stage(2, ALL),), add=(self.again(0),))
        self.mark("moved as KV", 2)

        yield self.change(0, remove=(1,))
        self.change(2, add=(Entry(1, 0, self.known[1]),))
        self.mark("moved as tokens", 2)
        yield self.finished(2)
        cancelled = yield doomed
        assert cancelled.status is Status.CANCELLED
        self.do(Watch(0, 0))
        yield self.ask(StopInstance, 0)
        self.mark("stopped", 0)

        torn = self.ask(CopySpan, 3, 1, 2, ALL, (0, 208), pace=1)
        self.mark("kill", 1)
        yield self.lost(3)
        failed = yield torn
        assert failed.status is Status.FAILED
        self.change(2, add=(Entry(3, 0, self.known[3]),))
        self.do(Abort(4, "no place in a smaller cluster"))
        yield self.finished(0, 1, 3)


WALK = Mell


def check(outcome: Outcome) -> None:
    """Whatever the clock: this happened, in this order."""
    assert outcome.marks() == ["plan", "up", "moved as KV", "moved as tokens", "stopped", "kill"]
    plan, up = outcome.record.marks[0][0], outcome.record.marks[1][0]
    assert up - plan >= 1000 * US, "a GPU takes its time to start"
    statuses = [event.status for _, event in outcome.events(CopyDone)]
    assert sorted(statuses) == [Status.OK, Status.OK, Status.OK, Status.CANCELLED, Status.FAILED]
    assert [event.instance for _, event in outcome.events(InstanceUp)] == [0, 1, 2]
    assert [event.status for _, event in outcome.events(InstanceDown)] == [Status.OK]
    order = [
        type(item).__name__
        for _, item in outcome.trace
        if isinstance(item, InstanceLost) or getattr(item, "status", Status.OK) is Status.FAILED
    ]
    assert order == ["InstanceLost", *sorted(order[1:])] and order[1:] == [CopyDone.__name__, StepDone.__name__]
    requests = outcome.record.requests
    assert requests.num_migrations[0] == 1 and requests.num_preemptions[1] == 1
    assert [requests.instance[request] for request in range(4)] == [2, 2, 0, 2]
    assert outcome.events(Progress) and outcome.record.up_intervals[1][0][1] < outcome.record.end_ns
