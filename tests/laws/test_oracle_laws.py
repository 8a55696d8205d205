"""The oracle boundary: a policy cannot know how long a reply will be before it ends."""

from __future__ import annotations

import gc
import types
from dataclasses import replace
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from common.executors.sim import SimExecutor
from common.executors.source import Client
from common.record import RunRecord
from common.types import Progress, RequestArrived, StepDone
from tests.fakes import FakeWorkload
from tests.laws.lawlib import Request, Scenario
from tests.laws.strategies import law, scenarios

SECRET = 7_919  # tokens: no other number of these runs comes near it


def numbers(value):
    """All integers inside an event."""
    if isinstance(value, tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int):
        yield int(value)


@law(60)
@given(scenarios())
def test_no_arrival_carries_its_true_length(scenario):
    for _, event, _ in scenario.run().trace:
        if isinstance(event, RequestArrived):
            assert event.oracle_output_tokens is None
            assert event.max_output_tokens == 1 << 20


def test_oracle_arrivals_carry_it_and_nobody_else_may():
    scenario = Scenario((Request(0, 8, 5), Request(2, 4, 9)))
    arrivals = [event for _, event, _ in scenario.run(oracle=True).trace if isinstance(event, RequestArrived)]
    assert [event.oracle_output_tokens for event in arrivals] == [5, 9]


def test_no_event_before_a_finish_contains_the_length():
    """Every number in every event is looked at. Only the finish of the request lets its lane's clock get there."""
    requests = (Request(0, 8, 30), Request(1, 8, SECRET), Request(40, 5, 20), Request(9, 3, 70))
    outcome = Scenario(requests, 2, 9_000, watch=50, grid=False).run()
    finish = outcome.record.requests.finish_ns[1]
    for now, event, commands in outcome.trace:
        if now < finish:
            near = [number for item in (event, *commands) for number in numbers(item) if abs(number - SECRET) < 12]
            clocks = {event.lane_iterations} if isinstance(event, StepDone) else set()
            if isinstance(event, Progress):
                clocks = {clock for _, clock in event.lanes}
            assert not set(near) - clocks, f"{event} or {commands} at {now} knows"


@law(150)
@given(scenarios(), st.sampled_from((1, 5, 60)), st.data())
def test_what_comes_after_a_finish_cannot_be_told_before_it(scenario, more, data):
    """Some replies grow longer. Until the first of them would have ended, a policy sees and does the very same."""
    chosen = data.draw(st.sets(st.sampled_from(range(len(scenario.requests))), min_size=1))
    requests = tuple(replace(request, output=request.output + more) if index in chosen else request
                     for index, request in enumerate(scenario.requests))  # fmt: skip
    # Sessions put replies into later prompts: those arrive only after the finish, but are named before. None here.
    short = replace(scenario, requests=tuple(replace(request, parent=-1) for request in scenario.requests))
    long = replace(scenario, requests=tuple(replace(request, parent=-1) for request in requests))
    before, after = short.run(), long.run()
    finishes = [before.record.requests.finish_ns[index] for index in chosen]
    horizon = min((finish for finish in finishes if finish >= 0), default=1 << 62)
    seen = [list(takewhile(lambda row: row[0] < horizon, outcome.trace)) for outcome in (before, after)]
    assert seen[0] == seen[1]


def test_a_policy_holds_no_reference_to_where_the_lengths_are():
    """Nothing that is reachable from a policy in mid-run belongs to the executor, its client or the workload."""
    scenario = Scenario(tuple(Request(1, 8, 20 + index) for index in range(6)), 2, 40, caching=True)
    outcome = scenario.run()
    forbidden = (SimExecutor, Client, FakeWorkload, RunRecord)
    closed = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    seen, todo = set(), [outcome.policy]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, closed):
            continue
        seen.add(id(value))
        assert not isinstance(value, forbidden), f"the policy reaches a {type(value).__name__}"
        todo += gc.get_referents(value)
    assert len(seen) > 50
