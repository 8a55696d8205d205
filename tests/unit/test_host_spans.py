"""Attention over KV in host memory: by hand in the simulator, exact tokens with real tensors, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.driver import drive
from common.errors import ContractError
from common.executors.local import LocalExecutor
from common.record import RequestColumns, RunRecord
from common.types import CopySpan, Entry, FreeSpan, RequestStatus, Span, Stage, Tier
from tests.contract.runtimes import Recorder
from tests.engine.worlds import check_tokens, tiny_spec, tiny_world
from tests.fakes import FakeWorkload, cluster
from tests.unit.test_sim_moves import ALL, Play, decode_ns, parked, play

HOST = Tier.DRAM


def moved_out(holder: int):
    """Request 0 decodes at 0 with its first 32 tokens in the host memory of an instance."""

    def story(s):
        yield from parked(s, 0)
        yield s.ask(CopySpan, 0, 0, holder, ALL, (0, 32), dst_tier=HOST)
        placement = (Span(holder, ALL, 0, 32, HOST), Span(0, ALL, 32, None))
        s.change(0, add=(s.again(0)._replace(placement=placement),))
        s.clock()
        s.do(FreeSpan(0, 0, tokens=(0, 32)))
        assert s.executor.state.memory[holder].host_used == 2 * 4
        yield s.finished(0)

    return story


FETCH = 10_000 + 32 * 256 * 2  # a layer's KV of 32 tokens at 0.5 bytes/ns


def test_own_host_memory_costs_pcie_and_then_the_own_gpu() -> None:
    """max(local partial, KV over PCIe) + attention over what came + merge, in every layer."""
    run = play(moved_out(0), [64], [2], host_blocks=8)
    expected = decode_ns(33) + 4 * (max(0, FETCH - 3 * 33) + 3 * 32 + 101)
    assert run.record.requests.finish_ns[0] - run.times[-1] == expected
    assert run.executor.state.memory[0].host_used == run.cells(0) == 0


def test_a_creditors_host_memory_costs_pcie_beside_the_messages() -> None:
    run = play(moved_out(1), [64], [2], host_blocks=8)
    remote = (5_000 + 128) + FETCH + 3 * 32 + (5_000 + 160)
    assert run.record.requests.finish_ns[0] - run.times[-1] == decode_ns(33) + 4 * (remote - 3 * 33 + 101)
    assert run.executor.state.memory[1].host_used == 0


def test_prefill_writes_into_host_memory() -> None:
    def story(s):
        yield s.arrived(0)
        placement = (Span(0, ALL, 0, 32, HOST), Span(1, ALL, 32, 48, HOST), Span(0, ALL, 48, None))
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 64, placement=placement),))
        yield s.reached(0)
        used = [s.executor.state.memory[i].host_used for i in (0, 1)]
        assert used == [8, 4] and 4 <= s.cells(0) <= 8
        yield s.finished(0)

    run = play(story, [64], [20], 1, host_blocks=8)
    assert run.cells(0) == run.executor.state.memory[0].host_used == run.executor.state.memory[1].host_used == 0


@pytest.mark.parametrize("holder", (0, 1))
@pytest.mark.parametrize("prefill", (True, False))
def test_tokens_are_those_of_an_undisturbed_run(holder: int, prefill: bool) -> None:
    """Copied out in mid-decode, or written there by the prefill: the same greedy tokens, no byte left behind."""

    def whole(s):
        yield s.arrived(0)
        placement = (Span(holder, ALL, 0, 32, HOST), Span(0, ALL, 32, None))
        s.change(0, stages=(Stage(0, ALL),), token_budget=24, add=(Entry(0, 0, 64, placement=placement),))
        yield s.finished(0)

    model = cluster(2, 12, host_blocks=8, max_model_len=1 << 20)
    engine = tiny_world(model, replace(tiny_spec(), max_position=512))
    record = RunRecord(RequestColumns.empty(1))
    executor = LocalExecutor(model, FakeWorkload([0], [64], [20]), record, world=engine)
    policy = Play(whole if prefill else moved_out(holder), model.info(), None)
    policy.executor = executor
    drive(policy, Recorder(executor, []), record)
    assert record.requests.status[0] == RequestStatus.FINISHED and check_tokens(executor) == 20
    for live in engine.instances.values():
        for store in live.stores.values():
            store.check()
            assert store.used == 0
    engine.close()


def test_the_open_span_must_be_in_hbm() -> None:
    def story(s):
        yield s.arrived(0)
        s.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 64, placement=(Span(0, ALL, 0, None, HOST),)),))
        yield s.finished(0)

    with pytest.raises(ContractError, match="cannot be read by attention"):
        play(story, [64], [2], host_blocks=8)
