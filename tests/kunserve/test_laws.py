"""Laws in the simulator: everyone ends, books agree, every layer is somewhere, and calm changes nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given

from common.types import CopyDone, CopySpan, LayersDropped, LayersLoaded, LoadLayers, RequestStatus, ShrinkDone, Status
from systems.baselines.vllm import VllmPolicy
from systems.kunserve.restore import MAX_ATTEMPTS
from systems.kunserve.state import State
from tests.fakes import run as run_fake
from tests.kunserve.strategies import bursts, law
from tests.kunserve.worlds import Burst, Run


def test_everyone_ends_and_no_block_is_lost_whatever_happens():
    """After every event (`Run.check`): books agree, layers are resident, no request is forgotten."""
    met: Counter[str] = Counter()

    @law(300, 3000)
    @given(bursts())
    def draws(burst):
        run = Run(burst).drive()
        met.update(run.situations())

    draws()
    assert all(met[kind] for kind in ("straddles a drop", "straddles a restore", "lives through two merges")), met


@pytest.mark.parametrize("kind", ["least_outstanding"])
def test_without_overload_it_is_vllm_to_the_nanosecond(kind):
    requests = tuple((300, 20 + 7 * (index % 9), 5 + index % 17) for index in range(80))
    burst = Burst(requests, 3, 200)
    mine = Run(burst).drive().record
    theirs, _ = run_fake(VllmPolicy(burst.model().info(), burst.engine(), kind), burst.model(), burst.workload())
    assert not mine.marks
    for name in ("first_token_ns", "finish_ns", "instance", "num_preemptions"):
        assert list(getattr(mine.requests, name)) == list(getattr(theirs.requests, name))


def overflowing(**options) -> Burst:
    requests = tuple((0, 100, 60) for _ in range(16)) + tuple((2000, 20, 4) for _ in range(12))
    return Burst(requests, 2, 24, options=tuple(options.items()))


def test_a_group_holds_g_times_p_blocks_and_the_extension():
    run = Run(overflowing(restore="off")).drive()
    drops = [event for _, event, _ in run.trace if isinstance(event, LayersDropped)]
    assert [event.status for event in drops] == [Status.OK] * 2
    extension = 2 * 8  # two layers' parameters, each as large as 8 cells
    assert {event.kv_cells for event in drops} == {24 * 4 + extension}
    core = run.policy.core
    assert core.ledger.capacity_blocks(next(iter(core.groups.values())).route) == 2 * 24 + extension // 2


def test_the_exchange_moves_each_band_once_and_pays_its_bytes():
    run = Run(overflowing(restore="off")).drive()
    sent = [c for *_, commands in run.trace for c in commands if isinstance(c, CopySpan)]
    assert sent and len({(c.request_id, c.layers) for c in sent}) == len(sent)
    done = [event for _, event, _ in run.trace if isinstance(event, CopyDone)]
    assert sum(event.num_bytes for event in done) == sum(
        (c.tokens[1] - c.tokens[0]) * (c.layers[1] - c.layers[0]) * 4096 // 16 for c in sent)  # fmt: skip
    assert all(c.piece_bytes for c in sent)


def test_where_no_slices_make_a_pipeline_the_timeline_says_once_that_lanes_preempt(monkeypatch):
    monkeypatch.setattr("systems.kunserve.drop.merge_slices", lambda first, second: None)
    run = Run(overflowing()).drive()
    notes = [text for *_, kind, text in run.record.marks if kind == "fallback"]
    assert run.kinds() == ["fallback"] and "preemption by recompute" in notes[0]
    assert sum(run.record.requests.num_preemptions)
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 28


@pytest.mark.parametrize("exchange", ["coordinated", "uncoordinated", "recompute"])
@pytest.mark.parametrize("lookahead", ["on", "token_count"])
def test_every_switch_drops_and_restores(exchange, lookahead):
    run = Run(overflowing(exchange=exchange, lookahead=lookahead)).drive()
    kinds = [kind for kind in run.kinds() if kind != "fallback"]  # here a copy is less than the queue needs
    assert kinds == ["overload", "drop", "exchanged", "restore", "restored", "drained"]
    copies = [c for *_, commands in run.trace for c in commands if isinstance(c, CopySpan)]
    assert bool(copies) == (exchange != "recompute")
    assert all((c.piece_bytes is None) == (exchange == "uncoordinated") for c in copies)


MERGED = (State.PARKING, State.DROPPING, State.EXCHANGING, State.PIPELINE, State.SHRINKING, State.LOADING,
          State.DRAINING)  # fmt: skip


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("state", MERGED)
def test_a_member_may_die_in_every_state(state, back, place):
    run = Run(replace(overflowing(), kill=(state, place, 1), back=back)).drive()
    assert run.kinds().count("lost") == 1
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 28, "nobody's request is lost"


def test_two_bursts_drop_twice_and_do_not_oscillate():
    first = tuple((0, 100, 60) for _ in range(16))
    calm = tuple((2000, 20, 4) for _ in range(12))
    run = Run(Burst(first + calm + ((1000, 100, 60), *first[1:]) + calm, 2, 24)).drive()
    assert run.kinds().count("drop") == run.kinds().count("restored") == 2


def failing(count: int) -> Run:
    """A burst whose first loads all fail, as if no source delivered."""
    run = Run(overflowing())
    submit, left = run.executor._submit[LoadLayers], [count]
    run.loads = []

    def load(command: LoadLayers) -> None:
        run.loads.append((run.executor.state.now, command))
        if left[0]:
            left[0] -= 1
            cells = run.executor.state.memory[command.instance].capacity
            run.executor.state.ready.append(LayersLoaded(command.command_id, Status.FAILED, cells))
        else:
            submit(command)

    run.executor._submit[LoadLayers] = load
    return run.drive()


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_a_load_that_fails_is_tried_again_from_the_host_after_a_while(count):
    run = failing(count)
    assert run.kinds()[-2:] == ["restored", "drained"] and run.kinds().count("load_again") == count
    for instance in (0, 1):
        mine = [(now, command) for now, command in run.loads if command.instance == instance]
        sources = [command.source for _, command in mine]
        assert sources == [1 - instance, *[None] * (len(mine) - 1)], "the peer, then the host"
        waits = [later[0] - now[0] for now, later in pairwise(mine)]
        assert not waits or waits[0] == 0
        assert all(second > first for first, second in pairwise(waits)), "longer every time"


def test_loads_that_always_fail_are_given_up_and_the_pipeline_goes_on():
    """As a pipeline that serves, with its extension again, and that may try once more when it has been calm."""
    run = failing(1 << 30)
    assert run.kinds().count("load_given_up") >= 2 and "restored" not in run.kinds()
    assert run.kinds().count("resumed") == run.kinds().count("load_given_up") // 2
    assert all(len({now for now, _ in run.loads[at : at + 2]}) == 1 for at in range(0, len(run.loads), 2))
    assert len(run.loads) <= MAX_ATTEMPTS * (run.kinds().count("load_given_up") + 2)
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 28


def test_after_loads_were_given_up_the_next_restore_succeeds():
    run = failing(2 * MAX_ATTEMPTS)
    rest = run.kinds()[run.kinds().index("load_given_up") :]
    assert [kind for kind in rest if kind != "fallback"] == ["load_given_up", "load_given_up", "resumed", "restore",
                                                             "restored", "drained"]  # fmt: skip
    grown = [event for _, event, _ in run.trace if isinstance(event, ShrinkDone)]
    assert len(grown) == 3 * 2 and all(event.status is Status.OK for event in grown), "shrunk, grown, shrunk again"
    assert {group.state for group in run.policy.core.groups.values()} == {State.SERVING}
