"""Ship queries or ship KV: the same attention, other bytes, and times by the executor's own formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.infinite_llm_ring import LINKS, NUM_SHARDS, Shape, equality, ship_kv_ns, ship_query_ns, step_bytes, table
from common.executors.network import LinkSpec
from common.types import CopySpan, FreeSpan, Span
from tests.fakes import FakeCost, cluster
from tests.unit.test_sim_moves import ALL, parked, play

SHAPE = Shape(query=10_240, partial=10_400, token=20_480, layers=40)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(20, 3000), st.integers(1, 6), st.sampled_from((1.0, 30.0)))
def test_both_ways_give_the_same_attention(context: int, shards: int, spread: float) -> None:
    found = equality(context, shards, dtype=torch.float64, spread=spread, seed=context)
    assert found["max_abs_difference"] < 1e-12 < found["max_abs"]


def test_bytes_of_queries_do_not_know_the_context() -> None:
    short, long = equality(256, 4), equality(4096, 4)
    assert short["query_bytes"] == long["query_bytes"] and long["kv_bytes"] == 16 * short["kv_bytes"]
    assert step_bytes(1 << 13, SHAPE, 4)[0] == step_bytes(1 << 21, SHAPE, 4)[0] == 40 * 3 * (10_240 + 10_400)
    assert step_bytes(1 << 21, SHAPE, 4)[1] == 40 * (3 << 19) * 20_480


def test_a_ring_waits_for_its_link_or_for_its_kernel() -> None:
    """By hand: a slow link makes three hops and one shard's attention; a fast one makes four shards' attention."""
    slow, fast = LinkSpec(1e9, 10), LinkSpec(1e15, 0)
    hop = 1000 * SHAPE.token
    assert ship_kv_ns(50, 0, slow, SHAPE, 1000, 4) == 10 + 3 * hop + 50
    assert ship_kv_ns(50, 7, fast, SHAPE, 1000, 4) == 4 * 50 + 3 * 7
    assert ship_query_ns(50, 7, fast, SHAPE, 4) == 50 + 3 * 7


def test_the_formula_of_shipped_queries_is_the_executors() -> None:
    """A request over two instances costs in the simulator what the micro-benchmark says."""

    def story(s):
        yield from parked(s, 0)
        yield s.ask(CopySpan, 0, 0, 1, ALL, (0, 32))
        s.change(0, add=(s.again(0)._replace(placement=(Span(1, ALL, 0, 32), Span(0, ALL, 32, None))),))
        s.clock()
        s.do(FreeSpan(0, 0, tokens=(0, 32)))
        yield s.finished(0)

    run = play(story, [64], [2])
    cost, model = FakeCost(4, True, True), cluster(2)
    shape = Shape(model.query_bytes, model.partial_bytes, 256, 4)
    local, remote = cost.partial_attention_ns(1, 33), cost.partial_attention_ns(1, 32)
    wire = ship_query_ns(0, 0, model.nvlink, shape, 2)
    attention = 4 * (max(0, wire + remote - local) + cost.merge_ns(1))
    assert run.record.requests.finish_ns[0] - run.times[-1] == cost.iteration_ns((), 1, 33, 1) + attention


@pytest.mark.parametrize("attention", ("profile", "roofline"))
def test_the_table_has_every_link_and_its_ratio_grows_until_the_link_binds(attention: str) -> None:
    rows = [row for row in table() if row["attention"] == attention]
    assert {row["link"] for row in rows} == set(LINKS)
    for link in LINKS:
        ratios = [row["ratio"] for row in rows if row["link"] == link]
        assert ratios == sorted(ratios) and ratios[-1] > 1, "KV loses ever more as contexts grow"
    assert NUM_SHARDS == 4
