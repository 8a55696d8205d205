"""The simulator's moves against times computed by hand.

`tests.fakes`: a layer takes 10 us, a prompt token 200 ns a layer, an attended token 3 ns in decode; the head 5 us and
11 ns a logit. A token-layer is 256 bytes. NVLink (0-1, 2-3) moves a byte per ns after 5 us, the NIC 0.2 after 20 us,
PCIe 0.5 after 10 us. Control messages take 10 us, a remap 50 us.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.driver import drive
from common.errors import ContractError
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.types import (
    Abort,
    CopySpan,
    DropLayers,
    Entry,
    FreeSpan,
    LoadLayers,
    RunStep,
    ShrinkKV,
    Span,
    Stage,
    StartInstance,
    Status,
    StopInstance,
    SwapSpan,
    Tier,
    Watch,
)
from tests.contract.runtimes import Recorder, Trace
from tests.contract.script import Script
from tests.fakes import FakeCost, FakeWorkload, cluster

ALL, LOW, HIGH = (0, 4), (0, 2), (2, 4)
LOGIT, HEAD = 11, 5_000


def prefill_ns(chunk, computed=0, layers=4, head=True, logits=1):
    """One chunk alone."""
    return layers * (10_000 + 200 * chunk + chunk * (computed + chunk // 2) // 50) + HEAD * head + LOGIT * logits


def decode_ns(context, batch=1, layers=4, head=True):
    """A decode iteration that attends to `context` tokens a request."""
    return layers * (10_000 + batch * (700 + 3 * context)) + HEAD * head + LOGIT * batch


class Play(Script):
    """A story given as a function of the script."""

    def __init__(self, story: Any, info: Any, leap: int | None) -> None:
        super().__init__(info, leap)
        self.story = story
        self.times: list[int] = []
        self.executor: SimExecutor

    def agents(self):
        return [self.story(self)]

    def cells(self, instance):
        return self.executor.state.memory[instance].used

    def clock(self):
        """Note the time; for the test to read."""
        self.times.append(self.now)


def play(story, prompts, outputs, leap=None, instances=4, blocks=64, faults=(), message_faults=None, **changes):
    """Run a story to its end."""
    workload = FakeWorkload([0] * len(prompts), prompts, outputs)
    record = RunRecord(RequestColumns.empty(len(prompts)))
    executor = SimExecutor(cluster(instances, blocks, **changes), workload, record, faults=faults,
                           message_faults=message_faults)  # fmt: skip
    policy = Play(story, executor.cluster.info(), leap)
    policy.executor = executor
    policy.trace: Trace = []
    drive(policy, Recorder(executor, policy.trace), record)
    policy.record = record
    return policy


def parked(s, *requests, lane=0, instance=0):
    """Prefill requests on an instance one after the other and leave them parked there."""
    yield s.arrived(*requests)
    for request in requests:
        s.change(lane, stages=(Stage(instance, ALL),), add=(Entry(request, 0, s.known[request], leave=True),))
        yield s.reached(request)
    s.clock()


def finish(s, *requests, lane=0):
    for request in requests:
        s.change(lane, add=(s.again(request),))
    yield s.finished(*requests)


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(("calls", "extra"), [(1, 0), (3, 20_000)])
def test_a_copy_alone(calls, extra):
    def story(s):
        yield from parked(s, 0)
        event = yield s.ask(CopySpan, 0, 0, 1, ALL, (0, 32), num_calls=calls)
        assert event == (event.command_id, Status.OK, 32 * 4 * 256, ((0, 1),), "")
        s.clock()
        assert s.cells(0) == s.cells(1) == 8, "double-booked until the source is freed"
        s.do(FreeSpan(1, 0))
        yield from finish(s, 0)

    start, end = play(story, [32], [5]).times
    assert end - start == 5_000 + 32 * 4 * 256 + extra


def test_two_copies_share_the_nic():
    def story(s):
        yield from parked(s, 0, 1)
        first, second = s.ask(CopySpan, 0, 0, 2, ALL, (0, 32)), s.ask(CopySpan, 1, 0, 3, ALL, (0, 64))
        yield first
        s.clock()
        yield second
        s.clock()
        yield from finish(s, 0, 1)

    start, first, second = play(story, [32, 64], [5, 5]).times
    assert first - start == 20_000 + 32_768 * 10  # half of 0.2 bytes per ns
    assert second - first == 32_768 * 5  # the rest alone


def test_priority_on_the_nic():
    def story(s):
        yield from parked(s, 0, 1)
        low, high = s.ask(CopySpan, 1, 0, 3, ALL, (0, 64)), s.ask(CopySpan, 0, 0, 2, ALL, (0, 32), priority=1)
        yield high
        s.clock()
        yield low
        s.clock()
        yield from finish(s, 0, 1)

    start, high, low = play(story, [32, 64], [5, 5]).times
    assert high - start == 20_000 + 32_768 * 5
    assert low - high == 65_536 * 5


def by_layer(dst, **options):
    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 100, leave=True),))
        copied = s.ask(CopySpan, 0, 0, dst, ALL, (0, 100), after=s.step(0), **options)
        s.clock()
        yield copied
        s.clock()
        yield from finish(s, 0)

    return story


@pytest.mark.parametrize("leap", [None, 1])
@pytest.mark.parametrize(
    ("dst", "expected"),
    [
        (1, prefill_ns(100) + 5_000 + 100 * 256),  # hidden: only the last layer's bytes follow the iteration
        (2, prefill_ns(100) // 4 + 20_000 + 100 * 4 * 256 * 5),  # the wire is slower than the layers
    ],
)
def test_by_layer_under_prefill(dst, expected, leap):
    start, end = play(by_layer(dst, by_layer=True), [100], [3], leap).times
    assert end - start == expected


@pytest.mark.parametrize("leap", [None, 1])
@pytest.mark.parametrize("calls", [4, 8, 40, 400])
def test_the_calls_of_a_by_layer_copy_are_made_one_after_another(calls, leap):
    """A layer's calls begin when it is computed and those before are made: hidden behind the prefill as far as they go,
    and never faster than all of them."""
    start, end = play(by_layer(1, by_layer=True, num_calls=calls), [100], [3], leap).times
    prefill = prefill_ns(100)
    made = max(prefill + (calls // 4 - 1) * 10_000, prefill // 4 + (calls - 1) * 10_000)
    assert end - start == made + 5_000 + 100 * 256


@pytest.mark.parametrize("leap", [None, 1])
def test_calls_of_a_by_layer_copy_over_chunks_add_up(leap):
    """Two chunks of 64 and 32 tokens: 200 and 100 calls, the second's after the first's."""

    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 96, leave=True),), token_budget=64)
        copied = s.ask(CopySpan, 0, 0, 1, ALL, (0, 96), after=s.step(0), by_layer=True, num_calls=300)
        s.clock()
        yield copied
        s.clock()
        yield from finish(s, 0)

    start, end = play(story, [96], [3], leap).times
    first = prefill_ns(64, logits=0) // 4
    assert end - start == first + (200 - 1 + 100) * 10_000 + 5_000 + 32 * 256


def test_after_a_step():
    start, end = play(by_layer(1), [100], [3]).times
    assert end - start == prefill_ns(100) + 5_000 + 100 * 4 * 256


@pytest.mark.parametrize("leap", [None, 1])
def test_by_layer_follows_a_prefill_over_chunks(leap):
    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 96, leave=True),), token_budget=64)
        copied = s.ask(CopySpan, 0, 0, 1, ALL, (0, 96), after=s.step(0), by_layer=True)
        s.clock()
        yield copied
        s.clock()
        yield from finish(s, 0)

    start, end = play(story, [96], [3], leap).times
    chunks = prefill_ns(64, logits=0) + prefill_ns(32, 64)
    assert end - start == chunks + 5_000 + 32 * 256


def test_by_layer_sends_what_was_computed_before_at_once():
    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 64, sample=False),))
        yield s.reached(0)
        s.change(0, add=(Entry(0, 64, 80, leave=True),))
        s.clock()
        copied = s.ask(CopySpan, 0, 0, 1, ALL, (0, 80), after=s.step(0), by_layer=True)
        event = yield copied
        assert event.num_bytes == 80 * 4 * 256
        s.clock()
        yield from finish(s, 0)

    start, end = play(story, [80], [3]).times
    second = prefill_ns(16, 64)
    # From the first layer's end both pieces share the link; the new one may not end before the last layer has.
    old, new, first = 64 * 1024, 16 * 1024, second // 4
    shared = first + 5_000 + 2 * new  # the small one ends
    assert end - start == max(5_000 + old + new, second + 5_000 + 16 * 256) and shared < 5_000 + old + new


@pytest.mark.parametrize("leap", [None, 1])
def test_paced_copy_moves_a_piece_an_iteration(leap):
    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 64),))
        yield s.change(0)
        s.clock()
        copied = s.ask(CopySpan, 0, 0, 1, ALL, (0, 48), pace=16)
        yield copied
        s.clock()
        yield s.finished(0)

    start, end = play(story, [64], [20], leap).times
    iterations = decode_ns(65) + decode_ns(66) + decode_ns(67)  # a piece leaves at the end of each
    assert end - start == iterations + 5_000 + 16 * 4 * 256


def test_pieces_of_one_block_are_booked_once():
    def story(s):
        yield from parked(s, 0)
        yield s.ask(CopySpan, 0, 0, 1, ALL, (0, 40))
        assert s.cells(1) == 3 * 4
        rest = s.ask(CopySpan, 0, 0, 1, ALL, (40, 50))
        yield s.arrived(0)
        yield rest
        assert s.cells(1) == 4 * 4
        s.do(FreeSpan(0, 0))
        s.change(1, stages=(Stage(1, ALL),), add=(s.again(0),))
        yield s.finished(0)

    assert play(story, [50], [9]).cells(1) == 0


def test_what_is_freed_under_a_copy_cancels_it():
    def story(s):
        yield from parked(s, 0)
        for instance in (1, 0):  # first the destination is given up, then the source is lost
            copied = s.ask(CopySpan, 0, 0, 1, ALL, (0, 32))
            s.do(FreeSpan(instance, 0, tokens=(16, 32)))
            event = yield copied
            assert event.status is Status.CANCELLED and s.cells(1) == 0
        assert s.cells(0) == 4
        yield s.ask(CopySpan, 0, 0, 1, ALL, (0, 16))  # no ghost of the cancelled ones is on the link
        s.clock()
        s.do(FreeSpan(0, 0))
        s.do(FreeSpan(1, 0))
        s.change(0, add=(Entry(0, 0, s.known[0]),))
        yield s.finished(0)

    start, end = play(story, [32], [5]).times
    assert end - start == 5_000 + 16 * 4 * 256


def test_a_refused_copy_leaves_no_trace():
    def story(s):
        yield from parked(s, 0)
        event = yield s.ask(CopySpan, 0, 0, 1, ALL, (0, 64), dst_tier=Tier.DRAM)
        assert event.status is Status.FAILED and event.num_bytes == 0 and s.cells(1) == 0
        yield from finish(s, 0)

    assert not play(story, [64], [3]).record.moves.kind


# ---------------------------------------------------------------- what no state allows


def refuses(match, commands, prompts=(64,), **options):
    """A story that parks request 0 on instance 0 and then submits what must raise."""

    def story(s):
        yield from parked(s, 0)
        commands(s)
        yield s.finished(0)

    with pytest.raises(ContractError, match=match):
        play(story, list(prompts), [4] * len(prompts), **options)


def test_kv_is_not_read_before_it_is_there():
    def commands(s):
        s.ask(CopySpan, 0, 0, 1, ALL, (0, 64))
        s.change(1, stages=(Stage(1, ALL),), add=(s.again(0),))

    refuses("not .yet. on instance 1", commands)


def test_kv_is_not_inserted_before_it_is_there():
    def commands(s):
        s.ask(CopySpan, 0, 0, 1, ALL, (0, 64))
        s.do(FreeSpan(1, 0, retain=4))

    refuses("retained of 0 freed", commands)


def test_a_copy_needs_a_source():
    refuses("are not on instance 2", lambda s: s.ask(CopySpan, 0, 2, 1, ALL, (0, 64)))
    refuses("are not on instance 0", lambda s: s.ask(CopySpan, 0, 0, 1, ALL, (0, 65)))


def test_a_swap_needs_a_source():
    refuses("not parked in dram", lambda s: s.ask(SwapSpan, 0, 0, ALL, (0, 64), False))


def test_placements_are_cut_at_block_borders_and_tile():
    def placed(*spans):
        return lambda s: s.change(0, add=(s.again(0)._replace(placement=spans),))

    refuses("block borders", placed(Span(0, ALL, 0, 20), Span(1, ALL, 20, None)))
    refuses("gap", placed(Span(0, ALL, 16, None)))
    refuses("gap", placed(Span(0, ALL, 0, 64)))
    refuses("overlap", placed(Span(0, ALL, 0, None), Span(1, LOW, 0, None)))
    refuses("not .yet. on instance 1", placed(Span(1, ALL, 0, 16), Span(0, ALL, 16, None)))


def test_no_lane_runs_on_dropped_layers():
    def commands(s):
        s.ask(DropLayers, 0, HIGH)
        s.change(0, add=(s.again(0),))

    refuses("needs stages", commands)


def test_behind_needs_a_lane_in_front():
    refuses("in front of lane 1", lambda s: s.change(1, stages=(Stage(0, ALL),), add=(Entry(1, 16, 32, behind=0),)),
            (64, 32))  # fmt: skip


# ---------------------------------------------------------------- swaps and parameters


def test_swap_out_and_in():
    def story(s):
        yield from parked(s, 0)
        out = yield s.ask(SwapSpan, 0, 0, ALL, (0, 64), True)
        assert out.num_bytes == 65_536 and s.cells(0) == 0
        s.clock()
        yield s.ask(SwapSpan, 0, 0, ALL, (0, 64), False)
        s.clock()
        yield from finish(s, 0)

    start, out, back = play(story, [64], [5], host_blocks=4).times
    assert out - start == back - out == 10_000 + 65_536 * 2


def test_swap_refused_for_want_of_host_memory():
    def story(s):
        yield from parked(s, 0)
        event = yield s.ask(SwapSpan, 0, 0, ALL, (0, 64), True)
        assert event.status is Status.FAILED and s.cells(0) == 16
        yield from finish(s, 0)

    play(story, [64], [5], host_blocks=3)


def test_drop_shrink_and_load_while_a_copy_shares_the_link():
    def story(s):
        yield from parked(s, 0, lane=1, instance=1)
        s.clock()
        dropped = yield s.ask(DropLayers, 0, HIGH)
        assert dropped.kv_cells == 64 * 4 + 2 * 8
        s.clock()
        assert (yield s.ask(LoadLayers, 0, HIGH, 1)).status is Status.FAILED, "its pages are still lent to KV"
        assert (yield s.ask(ShrinkKV, 0, 256)).status is Status.OK
        s.clock()
        copied, loaded = s.ask(CopySpan, 0, 1, 0, ALL, (0, 128)), s.ask(LoadLayers, 0, HIGH, 1)
        event = yield loaded
        assert event.kv_cells == 256
        s.clock()
        yield copied
        s.clock()
        s.do(FreeSpan(0, 0))
        yield from finish(s, 0, lane=1)

    _, start, dropped, shrunk, loaded, copied = play(story, [128], [5]).times
    assert dropped - start == 50_000 and shrunk == dropped  # nothing lay in the tail
    # The copy (131,072 bytes) starts after 5 us, the load (65,536) after a remap and 5 us: alone, shared, alone.
    assert loaded - shrunk == 55_000 + 2 * 65_536
    assert copied - shrunk == 55_000 + 2 * 65_536 + (131_072 - 50_000 - 65_536)


def test_a_failed_load_leaves_the_layers_missing_and_a_larger_shrink_gives_the_pages_back():
    def story(s):
        yield from parked(s, 0)
        yield s.ask(DropLayers, 1, HIGH)
        yield s.ask(ShrinkKV, 1, 256)
        loaded = s.ask(LoadLayers, 1, HIGH, 2)
        s.mark("kill", 2)
        assert (yield loaded).status is Status.FAILED
        assert not s.executor.state.memory[1].has(HIGH)
        yield s.ask(ShrinkKV, 1, 1 << 30)
        assert s.executor.state.memory[1].capacity == 256 + 16
        yield from finish(s, 0)

    play(story, [32], [5])


def test_shrink_waits_for_the_boundary_and_moves_the_tail():
    def story(s):
        yield from parked(s, 0)
        s.change(0, add=(s.again(0),))
        yield s.ask(DropLayers, 1, HIGH)
        s.clock()
        event = yield s.ask(ShrinkKV, 0, 200)
        s.clock()
        assert event.moved_cells == 20, "the block that the leap has grown by since counts"
        yield s.finished(0)

    for leap in (None, 1):
        start, dropped, shrunk = play(story, [64], [9], leap).times
        first = decode_ns(65)
        assert dropped - start == 50_000 and first < 50_000 < first + decode_ns(66)
        assert shrunk - start == first + decode_ns(66) + 2 * 20 * 4096 // 1000


# ---------------------------------------------------------------- pipelines


def pipeline(s):
    yield s.arrived(0, 1)
    for lane in (0, 1):
        s.change(lane, stages=(Stage(0, LOW), Stage(1, HIGH)), add=(Entry(lane, 0, s.known[lane]),))
    yield s.finished(0, 1)


def test_two_lanes_over_two_stages():
    finishes = list(play(pipeline, [50, 50], [1, 1]).record.requests.finish_ns)
    first, second = prefill_ns(50, layers=2, head=False), prefill_ns(50, layers=2)
    hop = 5_000 + 50 * 128
    assert finishes[0] == first + hop + second
    bubble = first + hop  # in front of the second stage's first item; none after it: lane 1 is there in time
    assert 2 * first + hop < finishes[0]
    assert finishes[1] == bubble + 2 * second


def test_no_lane_overtakes_another_between_stages():
    """The first lane's activations fill the NIC for longer than the second lane's first stage takes."""
    finishes = list(play(pipeline, [400, 1], [1, 1], hidden_bytes=4096, nvlink=cluster().nic).record.requests.finish_ns)
    wire = 400 * 4096 * 5
    at_second = prefill_ns(400, layers=2, head=False) + wire + 20_000
    assert finishes[0] == at_second + prefill_ns(400, layers=2)
    assert finishes[1] == finishes[0] + prefill_ns(1, layers=2)


@pytest.mark.parametrize(("piece", "extra"), [(None, 50 * 128), (2_000, 1_000)])
def test_activations_beside_a_copy(piece, extra):
    """Uncoordinated they get half the link, coordinated they wait half a piece."""

    def story(s):
        yield from parked(s, 0)
        s.ask(CopySpan, 0, 0, 1, ALL, (0, 480), piece_bytes=piece)
        s.change(1, stages=(Stage(0, LOW), Stage(1, HIGH)), add=(Entry(1, 0, 50),))
        yield s.finished(1)
        s.clock()
        s.do(FreeSpan(1, 0))
        yield from finish(s, 0)

    start, end = play(story, [480, 50], [3, 1]).times
    hop = 5_000 + 50 * 128 + extra
    assert end - start == prefill_ns(50, layers=2, head=False) + hop + prefill_ns(50, layers=2)


def test_a_prompt_cut_over_two_lanes_is_a_pipeline():
    """The second chunk runs on a stage as soon as the first has left it, not when its step is answered."""

    def story(s):
        yield s.arrived(0)
        pipe = (Stage(0, LOW), Stage(1, HIGH))
        s.change(0, stages=pipe, add=(Entry(0, 0, 48, sample=False),))
        s.change(1, stages=pipe, add=(Entry(0, 48, 96, behind=0),))
        assert s.executor.state.memory[0].used == 0
        yield s.reached(0)
        yield s.finished(0)

    result = play(story, [96], [1])
    first, chunk_hop = prefill_ns(48, layers=2, head=False, logits=0), 5_000 + 48 * 128
    second = prefill_ns(48, 48, layers=2, head=False)
    arrives = first + max(second, prefill_ns(48, layers=2, logits=0)) + chunk_hop
    assert result.record.requests.finish_ns[0] == arrives + prefill_ns(48, 48, layers=2)
    assert result.cells(0) == result.cells(1) == 0


def test_a_prompt_cut_over_three_lanes_is_a_chain():
    """Each chunk follows the one before it; the front hands over to the second lane, which hands over to the third."""

    def story(s):
        yield s.arrived(0)
        pipe = (Stage(0, LOW), Stage(1, HIGH))
        s.change(0, stages=pipe, add=(Entry(0, 0, 32, sample=False),))
        s.change(1, stages=pipe, add=(Entry(0, 32, 64, sample=False, behind=0),))
        s.change(2, stages=pipe, add=(Entry(0, 64, 96, behind=1),))
        yield s.finished(0)

    result = play(story, [96], [1])
    first, chunk_hop = prefill_ns(32, layers=2, head=False, logits=0), 5_000 + 32 * 128
    second, third = prefill_ns(32, 32, layers=2, head=False), prefill_ns(32, 64, layers=2, head=False)
    assert result.record.requests.finish_ns[0] >= first + second + third + chunk_hop
    assert result.cells(0) == result.cells(1) == 0


# ---------------------------------------------------------------- remote attention


def spread(s):
    """Request 0 decodes at home (0) with its first 32 tokens on creditor 1, where request 1 decodes."""
    yield from parked(s, 0)
    s.change(1, stages=(Stage(1, ALL),), add=(Entry(1, 0, 10),))
    yield s.ask(CopySpan, 0, 0, 1, ALL, (0, 32))
    entry = s.again(0)._replace(placement=(Span(1, ALL, 0, 32), Span(0, ALL, 32, None)))
    s.change(0, add=(entry,))
    s.clock()
    s.do(FreeSpan(0, 0, tokens=(0, 32)))
    yield s.finished(0, 1)


def remote_ns(context, away):
    """max(local partial, round trip + bytes + remote partial) + merge, in every layer."""
    remote = (5_000 + 128) + 3 * away + (5_000 + 160)
    return decode_ns(context - away) + 4 * (max(0, remote - 3 * (context - away)) + 101)


def test_an_iteration_with_remote_kv():
    result = play(spread, [64, 10], [3, 1])
    start = result.times[-1]
    assert result.record.requests.finish_ns[0] - start == remote_ns(65, 32) + remote_ns(66, 32)


def test_a_layer_band_elsewhere_costs_only_its_layers():
    """Parameters here, KV of half the layers there (KunServe's first version)."""

    def story(s):
        yield from parked(s, 0)
        yield s.ask(CopySpan, 0, 0, 1, HIGH, (0, 64))
        s.change(0, add=(s.again(0)._replace(placement=(Span(0, LOW, 0, None), Span(1, HIGH, 0, None))),))
        s.clock()
        s.do(FreeSpan(0, 0, HIGH))
        yield s.finished(0)

    result = play(story, [64], [2])
    # In two layers all 65 tokens are there, the new one's KV (256 bytes) travels too; base at the mean local context.
    remote = (5_000 + 128 + 256) + 3 * 65 + (5_000 + 160)
    expected = decode_ns(65 - 32) + 2 * (remote - 3 * 1 + 101)
    assert result.record.requests.finish_ns[0] - result.times[-1] == expected


def test_a_creditor_is_slowed_by_its_share():
    result = play(spread, [64, 10], [20, 160])
    segments, start = result.record.segments, result.times[-1]
    rows = [row for row in range(len(segments.lane)) if segments.lane[row] == 1 and segments.start_ns[row] >= start]
    share = 4 * 3 * 32 / remote_ns(65, 32)
    context = 10 + 1 + sum(segments.iterations[row] for row in range(rows[0]) if segments.lane[row] == 1) - 1
    assert segments.end_ns[rows[0]] - segments.start_ns[rows[0]] == int(decode_ns(context) * (1 + share))
    gone = result.record.requests.finish_ns[0]
    after = [row for row in rows if segments.start_ns[row] > gone]
    assert len(after) == 1 and segments.iterations[after[0]] > 10, "it leaps again at full speed"
    assert not result.executor.instances[1].remote_load


@pytest.mark.parametrize("service", ["side_stream", "between_layers"])
def test_leaps_are_equal_while_remote_load_comes_and_goes(service):
    runs = [play(spread, [64, 10], [40, 160], leap, remote_service=service).record.requests for leap in (None, 7, 1)]
    assert [list(run.finish_ns) for run in runs] == [list(runs[0].finish_ns)] * 3


def test_leaps_are_equal_when_a_second_lane_arrives_in_mid_leap():
    def story(s):
        yield s.arrived(0, 1)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 64),))
        yield s.ask(DropLayers, 1, HIGH)  # 50 us later, in the middle of an iteration
        s.change(1, stages=(Stage(0, ALL),), add=(Entry(1, 0, 30),))
        yield s.finished(0, 1)

    runs = [play(story, [64, 30], [60, 20], leap).record.requests for leap in (None, 7, 1)]
    assert [list(run.finish_ns) for run in runs] == [list(runs[0].finish_ns)] * 3


@pytest.mark.parametrize("home_blocks", [8])
def test_new_kv_is_charged_where_its_position_is_placed(home_blocks):
    """The home is full: what is appended goes to the creditor, block by block."""

    def story(s):
        yield from parked(s, 0)
        s.change(0, add=(s.again(0)._replace(placement=(Span(0, ALL, 0, 128), Span(1, ALL, 128, None))),))
        yield s.change(0)
        assert s.cells(0) == home_blocks * 4
        yield s.finished(0)

    seen = play(story, [127], [40], blocks=home_blocks)
    assert seen.cells(0) == seen.cells(1) == 0 and seen.record.requests.output_tokens[0] == 40


def test_prefill_appends_to_a_creditor_and_parks_there():
    def story(s):
        yield s.arrived(0)
        placement = (Span(0, ALL, 0, 32), Span(1, ALL, 32, None))
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 64, leave=True, placement=placement),))
        assert s.cells(0) == s.cells(1) == 0
        yield s.reached(0)
        assert s.cells(0) == s.cells(1) == 8
        s.change(0, add=(s.again(0)._replace(placement=placement),))
        yield s.finished(0)

    result = play(story, [64], [20])
    assert result.cells(0) == result.cells(1) == 0


def test_a_span_that_is_read_cannot_be_freed():
    def story(s):
        for wait in spread(s):
            if s.books.get(0) and s.books[0].members:
                s.do(FreeSpan(1, 0))
            yield wait

    with pytest.raises(ContractError, match="freed while in use"):
        play(story, [64, 10], [40, 160])


# ---------------------------------------------------------------- instances, agents, ends


def test_a_lost_creditor_takes_its_debtors_requests_with_it():
    def story(s):
        yield from parked(s, 0)
        yield s.ask(CopySpan, 0, 0, 1, ALL, (0, 32))
        s.change(0, add=(s.again(0)._replace(placement=(Span(1, ALL, 0, 32), Span(0, ALL, 32, None))),))
        yield s.change(0, add=(Entry(1, 0, 20),))
        yield s.change(0)
        torn = s.ask(CopySpan, 0, 0, 2, ALL, (32, 48), pace=1)
        s.mark("kill", 1)
        event = yield torn
        assert event.status is Status.CANCELLED
        yield s.lost(0)
        assert s.cells(0) == s.cells(2) + 8 == 8 and 1 in s.books[0].members, "only the other request is left"
        s.change(0, add=(Entry(0, 0, s.known[0]),))
        yield s.finished(0, 1)

    play(story, [64, 20], [40, 160])


def test_start_stop_and_loss_while_starting():
    def story(s):
        yield from parked(s, 0)
        first = s.ask(StartInstance, 2)
        assert (yield s.ask(StopInstance, 2)).status is Status.OK
        assert (yield first).status is Status.CANCELLED
        second = s.ask(StartInstance, 2)
        s.clock()
        s.mark("kill", 2)
        assert (yield second).status is Status.FAILED
        third = s.ask(StartInstance, 2)
        s.clock()
        assert (yield third).status is Status.OK
        s.clock()
        yield from finish(s, 0)

    _, second, third, up = play(story, [32], [5], running=2).times
    assert third == second + 1 and up - third == 3_000_000


def test_abort_cancels_what_moves():
    def story(s):
        yield from parked(s, 0, 1)
        copied, swapped = s.ask(CopySpan, 0, 0, 1, ALL, (0, 32)), s.ask(SwapSpan, 1, 0, LOW, (0, 32), True)
        s.do(Abort(0, "tired"))
        s.do(Abort(1, "tired"))
        both = yield s.both(copied, swapped)
        assert [event.status for event in both] == [Status.CANCELLED] * 2 and s.cells(0) == s.cells(1) == 0

    play(story, [32, 32], [5, 5], host_blocks=2)


def test_watch_is_one_per_agent_and_ends():
    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 64),))
        for period in (100_000, 0, 100_000):  # begun again before the first report: still one report a period
            s.do(Watch(0, period))
        s.do(Watch(0, 250_000, "other"))
        for _ in range(4):
            yield s.progress()
            s.clock()
        s.do(Watch(0, 0))
        yield s.finished(0)

    result = play(story, [64], [20])
    assert result.times == [100_000, 200_000, 250_000, 300_000]


def test_messages_under_way_are_delivered_but_planned_losses_do_not_prolong_a_run():
    def story(s):
        yield from parked(s, 0)
        yield from finish(s, 0)
        s.clock()
        s.tell("a", "b", "bye")
        yield s.message("b")
        s.clock()

    result = play(story, [32], [5], faults=((10**12, 1),))
    assert result.times[2] - result.times[1] == 10_000 and result.record.end_ns == result.times[2]


class Post:
    """A fault plan: the first message is lost, the second comes twice, the third late."""

    def __init__(self):
        self.plans = [[], [0, 7_000], [90_000], [0]]

    def deliveries(self, now_ns, message):
        return self.plans.pop(0)


def test_messages_are_lost_doubled_and_delayed_by_plan():
    seen = []

    def story(s):
        yield s.arrived(0)
        for payload in ("lost", "twice", "late", "prompt"):
            s.tell("a", "b", payload)
        for _ in range(4):
            event = yield s.message("b")
            seen.append((s.now, event.payload))
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 8),))
        yield s.finished(0)

    play(story, [8], [2], message_faults=Post())
    assert seen == [(10_000, "twice"), (10_000, "prompt"), (17_000, "twice"), (100_000, "late")]


def test_a_loss_at_the_end_of_a_copy_comes_first():
    """At one instant what is lost goes before what is done."""

    def story(s):
        yield from parked(s, 0)
        copied = s.ask(CopySpan, 0, 0, 1, ALL, (0, 32))
        event = yield copied
        assert event.status is Status.FAILED and ("gone", 1) in s.happened
        yield from finish(s, 0)

    play(story, [32], [5], faults=((prefill_ns(32) + 5_000 + 32 * 4 * 256, 1),))


def test_the_fake_cost_is_what_these_times_assume():
    cost = FakeCost(4, True, True)
    assert cost.iteration_ns([(100, 0)], 0, 0, 1) == prefill_ns(100)
    assert cost.iteration_ns((), 2, 50, 2) == decode_ns(50, 2)
    assert RunStep(1, 0).add == ()
