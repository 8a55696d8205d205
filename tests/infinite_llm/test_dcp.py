"""`system=dcp`: KV evenly over fixed groups, every request ends, exact tokens in `local`, losses of members."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.build import cluster_model
from common.config import compose
from common.driver import drive
from common.errors import ConfigError
from common.executors.local import LocalExecutor
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import RequestStatus
from run import replay
from systems.baselines.dcp import DcpPolicy
from systems.baselines.dcp_lane import LISTED_ROWS, even_cut, lengthened
from systems.registry import make_policy
from tests.engine.worlds import check_tokens, tiny_spec, tiny_world
from tests.fakes import US, FakeWorkload, cluster
from tests.laws.strategies import law
from workloads.types import plain

SIZES = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 400), st.integers(1, 60)), min_size=1, max_size=12)
CONFIG = EngineConfig(16, 64, 16, max_model_len=1 << 20)


def workload(sizes) -> FakeWorkload:
    arrivals = np.cumsum([gap * US for gap, *_ in sizes]).tolist()
    return FakeWorkload(arrivals, [prompt for _, prompt, _ in sizes], [output for *_, output in sizes])


def held_by_member(placement, tokens: int) -> Counter[int]:
    """Blocks of a request of so many tokens at each member."""
    found: Counter[int] = Counter()
    for span in placement:
        end = tokens if span.token_end is None else min(span.token_end, tokens)
        if end > span.token_start:
            found[span.instance] += -(-end // 16) - span.token_start // 16
    return found


@law(100)
@given(st.integers(1, 5000), st.integers(1, 8), st.integers(0, 900))
def test_the_cut_is_even_to_a_row(prompt: int, members: int, output: int) -> None:
    """No member ever holds more than the rows that are charged, and rows hold exactly what fits in them."""
    group = tuple(range(members))
    placement = lengthened(even_cut(prompt, group, (0, 4), 16), group, (0, 4), 16, LISTED_ROWS + output % 60)
    assert placement[-1].token_end is None and placement[0].token_start == 0
    for before, after in pairwise(placement):
        assert before.token_end == after.token_start and not after.token_start % 16
    tokens = min(prompt + output, placement[-1].token_start + 16)
    rows = -(-tokens // (16 * members))
    held = held_by_member(placement, tokens)
    assert max(held.values()) <= rows
    full = held_by_member(placement, rows * 16 * members)
    assert set(full.values()) == {rows} and len(full) == members


@law(80)
@given(st.integers(1, 4), st.integers(1, 2), st.integers(8, 30), SIZES, st.integers(0, 40_000), st.booleans())
def test_every_request_ends_and_nothing_is_left(size, groups, blocks, sizes, lost_us, lose) -> None:
    instances = size * groups
    model = cluster(instances, blocks, max_model_len=1 << 20)
    record = RunRecord(RequestColumns.empty(len(sizes)))
    faults = ((lost_us * US, instances - 1),) if lose and instances > 1 else ()
    executor = SimExecutor(model, workload(sizes), record, faults=faults)
    policy = DcpPolicy(model.info(), CONFIG, size)
    drive(policy, executor, record)
    assert all(s in (RequestStatus.FINISHED, RequestStatus.REJECTED) for s in record.requests.status)
    assert all(memory.used == 0 for memory in executor.state.memory) and not executor.state.held
    for group in policy.groups:
        assert group.ledger.free == group.cells and not group.dying and not group.orphans
        assert all(not lane.running and not lane.placements for lane in group.lanes.values())
    room = blocks * 16 * size
    for status, (_, prompt, output) in zip(record.requests.status, sizes):
        assert status == RequestStatus.FINISHED or faults or prompt + output + 16 * size > room


def test_a_request_larger_than_any_member_fills_the_group() -> None:
    model = cluster(4, 16, max_model_len=1 << 20)
    record = RunRecord(RequestColumns.empty(2))
    tokens = 4 * 16 * 16
    executor = SimExecutor(model, workload([(0, tokens - 40, 40), (0, tokens + 1, 2)]), record)
    drive(DcpPolicy(model.info(), CONFIG, 4), executor, record)
    assert list(record.requests.status) == [RequestStatus.FINISHED, RequestStatus.REJECTED]


def test_long_outputs_go_on_taking_turns_beyond_what_was_listed() -> None:
    model = cluster(2, 200, max_model_len=1 << 20)
    record = RunRecord(RequestColumns.empty(1))
    executor = SimExecutor(model, workload([(0, 10, 5000)]), record)
    policy = DcpPolicy(model.info(), CONFIG, 2)
    peak = Counter()
    while (item := executor.poll()) is not None:
        for command in policy.on_event(*item):
            executor.submit(command)
        for index, memory in enumerate(executor.state.memory):
            peak[index] = max(peak[index], memory.used // 4)
    assert record.requests.status[0] == RequestStatus.FINISHED and abs(peak[0] - peak[1]) <= 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(2, 4), st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 200), st.integers(1, 24)), min_size=1,
                                   max_size=4), st.booleans())  # fmt: skip
def test_tokens_are_those_of_an_undisturbed_run(members: int, sizes, lose: bool) -> None:
    model = cluster(members, 8, max_model_len=1 << 20)
    engine = tiny_world(model, replace(tiny_spec(), max_position=4096))
    record = RunRecord(RequestColumns.empty(len(sizes)))
    faults = ((4000 * US, members - 1),) if lose else ()
    executor = LocalExecutor(model, workload(sizes), record, world=engine, faults=faults)
    drive(DcpPolicy(model.info(), CONFIG, members), executor, record)
    if RequestStatus.FINISHED in list(record.requests.status):
        check_tokens(executor)
    engine.close()
    room = (members - lose) * 8 * 16 - 16 * members
    assert all(s == RequestStatus.FINISHED or p + o > room for s, (_, p, o) in zip(record.requests.status, sizes))


BASE = ["experiment=infinite_llm/mixes", "system=dcp", "cluster.num_instances=16"]


def test_the_configuration_runs_and_groups_are_nodes() -> None:
    config = compose(BASE)
    policy = make_policy("dcp", cluster_model(config).info(), config.engine, config.system_options)
    assert [group.members for group in policy.groups] == [tuple(range(8)), tuple(range(8, 16))]
    one = plain("one", np.zeros(1, np.int64), np.array([300_000]), np.array([4]), 4, "one request")
    assert replay(config, one).record.requests.status[0] == RequestStatus.FINISHED, "three instances' worth"


@pytest.mark.parametrize(
    ("overrides", "words"),
    (
        (["system.group=3"], "16 instances do not divide into such groups"),
        (["system.group=0"], "give a whole number of at least 1, or null"),
        (["engine.prefix_caching=true"], "use engine.prefix_caching=false"),
    ),
)
def test_what_makes_no_groups_is_refused_in_one_line(overrides: list[str], words: str) -> None:
    config = compose([*BASE, *overrides])
    with pytest.raises(ConfigError, match=words) as caught:
        make_policy("dcp", cluster_model(config).info(), config.engine, config.system_options)
    assert "\n" not in str(caught.value)
