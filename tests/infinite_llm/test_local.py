"""With real tensors: a request whose KV exceeds any one instance is prefilled and decoded over 2-5 instances with the
greedy tokens of one big instance, also while blocks move in mid-decode; message bytes know nothing of the context."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.executors.local import LocalExecutor
from common.record import RequestColumns, RunRecord
from common.types import CopyDone, RequestStatus, RunStep, Status, Tier
from systems.infinite_llm.settings import Settings
from tests.engine.worlds import check_tokens, tiny_spec, tiny_world
from tests.infinite_llm.worlds import CYCLE, MS, Run, World

NIGHTLY = bool(os.environ.get("KVPLANE_NIGHTLY"))
CASES = settings(max_examples=200 if NIGHTLY else 40, deadline=None, derandomize=not NIGHTLY,
                 suppress_health_check=list(HealthCheck))  # fmt: skip
QUICK = Settings(period_ns=MS // 2, lease_ns=400 * MS, margin_ns=200 * MS, low_share=0.3, hysteresis=0.0)


def run_local(world: World) -> Run:
    model = world.model()
    engine = tiny_world(model, replace(tiny_spec(), max_position=4096))  # its tables are made anew for each decoder
    record = RunRecord(RequestColumns.empty(len(world.requests)))
    executor = LocalExecutor(model, world.workload(), record, world=engine, **world.options())
    run = Run(world, executor, world.policy(model))
    run.drive()
    for instance, live in engine.instances.items():
        for store in live.stores.values():
            store.check()
        assert live.stores[Tier.HBM].used == executor.state.memory[instance].used == 0
    if RequestStatus.FINISHED in list(record.requests.status):
        check_tokens(executor)
    engine.close()
    return run


def spread(run: Run) -> int:
    """Most instances that one placement named."""
    return max((len({span.instance for span in entry.placement}) for *_, commands in run.trace for command in commands
                if isinstance(command, RunStep) for entry in command.add if entry.placement), default=1)  # fmt: skip


def switches(run: Run) -> int:
    return sum(len(command.place) for *_, commands in run.trace for command in commands
               if isinstance(command, RunStep))  # fmt: skip


@st.composite
def giants(draw) -> World:
    """One request too large for its instance, others that fit, and memory short enough for blocks to move."""
    instances, blocks = draw(st.integers(2, 5)), draw(st.integers(6, 10))
    pool = instances * blocks * 16
    giant = draw(st.integers(blocks * 16, pool - 3 * 16))
    output = draw(st.integers(2, min(32, pool - giant - 1)))
    others = draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(1, blocks * 6), st.integers(1, 24)), max_size=3))
    requests = [*others]
    requests.insert(draw(st.integers(0, len(others))), (draw(st.integers(0, 500)), giant, output))
    mode = draw(st.sampled_from(("proactive", "reactive")))
    lost = ((draw(st.integers(1, 30_000)), instances - 1),) if instances > 2 and draw(st.integers(0, 3)) == 0 else ()
    chosen = replace(QUICK, mode=mode, pace=draw(st.sampled_from((16, 64))))
    return World(instances, blocks, tuple(requests), chosen, lost, budget=draw(st.sampled_from((48, 256))))


@CASES
@given(giants())
def test_tokens_are_those_of_an_undisturbed_run(world: World) -> None:
    run = run_local(world)
    assert all(status in (RequestStatus.FINISHED, RequestStatus.REJECTED) for status in run.record.requests.status)
    if not world.lost_instances:
        assert all(status == RequestStatus.FINISHED for status in run.record.requests.status)
        assert spread(run) > 1


@settings(CASES, max_examples=40 if NIGHTLY else 5)
@given(giants())
def test_tokens_in_debt_mode(world: World) -> None:
    """v1: borrowed on demand, asked in turn, with the same tokens."""
    run = run_local(replace(world, settings=replace(world.settings, mode="debt", lend_cap=1.0, dgfm_threshold=1)))
    if not world.lost_instances:
        assert all(status == RequestStatus.FINISHED for status in run.record.requests.status)


def test_tokens_when_blocks_are_called_home() -> None:
    """DGFM in mid-decode: copies come home, ownership switches, and nobody's tokens change."""
    run = run_local(CYCLE)
    assert sum(manager.debtor.recaller.num_recalled for manager in run.policy.managers.values())
    assert all(status == RequestStatus.FINISHED for status in run.record.requests.status)


@pytest.mark.parametrize("instances", (2, 3, 4, 5))
def test_a_giant_over_all_instances_while_blocks_move(instances: int) -> None:
    """It fills the pool but for a few blocks; its home runs short in mid-decode and blocks leave for creditors."""
    world = World(instances, 12, ((0, (instances * 12 - 5) * 16, 60),), replace(QUICK, pace=32, low_share=0.2))
    run = run_local(world)
    assert run.record.requests.status[0] == RequestStatus.FINISHED and run.record.requests.num_preemptions[0] == 0
    assert spread(run) == instances


def test_blocks_move_in_mid_decode() -> None:
    """A request that fits its home grows out of it: copies arrive, ownership switches, nobody is preempted."""
    world = World(3, 12, ((0, 150, 90), (10, 20, 20)), replace(QUICK, low_share=0.3, pace=64))
    run = run_local(world)
    copies = [event for _, event, _ in run.trace if isinstance(event, CopyDone) and event.status is Status.OK]
    assert copies and switches(run) and sum(run.record.requests.num_preemptions) == 0


def decode_messages(prompt: int) -> set[tuple[int, int]]:
    """Bytes out and back per iteration and creditor, of iterations that only decode."""
    world = World(3, 40, ((0, prompt, 12),), replace(QUICK, pace=0), budget=4096)
    run = run_local(world)
    return set((out, back) for _, out, back in run.executor.traffic.per_iteration[2:])


def test_message_bytes_per_step_do_not_depend_on_the_context() -> None:
    short, long = decode_messages(45 * 16), decode_messages(110 * 16)
    assert short == long and len(short) == 1, "one size of message, whatever the context"
