"""The four walks in every runtime that there is: mechanisms really happen, and nothing is lost on the way."""

from __future__ import annotations

import inspect
import json
import typing

import pytest

from common import types
from common.driver import drive
from common.executors.replay import ReplayExecutor
from common.log import Delivered, Submitted, decode, encode
from common.record import RequestColumns, RunRecord
from common.types import RequestStatus
from tests.contract.runtimes import RUNTIMES, Outcome
from tests.contract.walks import infinite_llm, kunserve, mell, memserve

WALKS = {module.WALK.__name__: module for module in (kunserve, infinite_llm, memserve, mell)}


@pytest.fixture(params=sorted(RUNTIMES))
def runtime(request):
    """Every runtime walks; `local` and `dist` join by adding themselves to `RUNTIMES`."""
    return RUNTIMES[request.param]


def check_books(outcome: Outcome) -> None:
    """What holds after any walk: all ended, every token counted once, every block back."""
    policy, requests, segments = outcome.policy, outcome.record.requests, outcome.record.segments
    for index, output in enumerate(policy.workload.output_tokens):
        if requests.status[index] == RequestStatus.FINISHED:
            assert requests.output_tokens[index] == output
            assert 0 <= requests.arrival_ns[index] <= requests.first_token_ns[index] <= requests.finish_ns[index]
        else:
            assert requests.status[index] == RequestStatus.REJECTED and requests.reasons[index]
    decoded = sum(count * batch for count, batch in zip(segments.iterations, segments.decodes))
    assert decoded + policy.num_sampled == sum(requests.output_tokens)
    for instance, used in outcome.used.items():
        cached = policy.cached_blocks.get(instance, 0) * policy.world.layers
        assert used == outcome.cached[instance] == cached, f"instance {instance}: KV left over"
        assert outcome.host_used[instance] == outcome.host_cached[instance] == 0
    sent = [item for _, item in outcome.trace if type(item) in typing.get_args(types.Command)]
    ids = [command.command_id for command in sent if hasattr(command, "command_id")]
    answers = [
        item.command_id
        for _, item in outcome.trace
        if type(item) in typing.get_args(types.Event) and getattr(item, "command_id", -1) >= 0
    ]
    assert sorted(answers) == sorted(ids), "every command that takes time is answered exactly once"


@pytest.mark.parametrize("leap", [None, 7, 1])
@pytest.mark.parametrize("name", WALKS)
def test_walk(runtime, name, leap):
    outcome = runtime(WALKS[name].WALK, leap)
    check_books(outcome)
    WALKS[name].check(outcome)


@pytest.mark.parametrize("name", WALKS)
def test_leaps_of_any_size_walk_alike(name):
    """In the simulator the walks are the leap law's hardest cases: equal to the nanosecond."""
    times = []
    for leap in (None, 7, 1):
        outcome = RUNTIMES["sim"](WALKS[name].WALK, leap)
        requests = outcome.record.requests
        times.append(
            (
                list(requests.first_token_ns),
                list(requests.finish_ns),
                outcome.record.marks,
                list(outcome.record.moves.end_ns),
            )
        )
    assert times[0] == times[1] == times[2]


def test_every_command_walks():
    used = {type(item) for name in WALKS for _, item in RUNTIMES["sim"](WALKS[name].WALK, None).trace}
    assert set(typing.get_args(types.Command)) <= used
    assert set(typing.get_args(types.Event)) - used <= {types.AgentLost}


@pytest.mark.parametrize("leap", [None, 1])
@pytest.mark.parametrize("name", WALKS)
def test_a_recorded_walk_replays(runtime, name, leap):
    """Parity: the events of a walk, read back from its log, make a fresh policy give the same commands."""
    outcome = runtime(WALKS[name].WALK, leap)
    lines = [
        Submitted(item) if type(item) in typing.get_args(types.Command) else Delivered(now, item)
        for now, item in outcome.trace
    ]
    items = [item for _, item in outcome.trace]
    assert [decode(json.loads(json.dumps(encode(item)))) for item in items] == items
    policy = WALKS[name].WALK(outcome.policy.info, leap)
    drive(policy, ReplayExecutor(lines), RunRecord(RequestColumns.empty(0)))
    assert policy.num_sampled == outcome.policy.num_sampled


@pytest.mark.parametrize("name", WALKS)
def test_walks_are_short(name):
    assert len(inspect.getsource(WALKS[name].WALK).splitlines()) <= 80
