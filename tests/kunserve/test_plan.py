"""Planner, slices, monitor and table: pure functions and their properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ContractError
from common.types import Stage
from systems.kunserve.lookahead import Chunk, Costs, micro_batches, split
from systems.kunserve.monitor import Load, Monitor, Thresholds, calm, overloaded
from systems.kunserve.planner import Candidate, plan_drop
from systems.kunserve.slices import merge_slices
from systems.kunserve.state import TABLE, Happening, State, advance
from tests.laws.strategies import law

COPY = 1000
sizes = st.lists(st.sampled_from((1, 1, 1, 2, 3, 4)), min_size=1, max_size=24)


def depths(found, candidates):
    size = {one.group: one.size for one in candidates}
    inside = {group for groups in found.merged for group in groups}
    return [sum(size[group] for group in groups) for groups in found.merged] + [
        one.size for one in candidates if one.group not in inside]  # fmt: skip


@law(300)
@given(sizes, st.integers(0, 30 * COPY))
def test_a_plan_merges_as_little_as_it_can(sizes, needed):
    candidates = [Candidate(group, size, group // 8) for group, size in enumerate(sizes)]
    plan = plan_drop(candidates, needed, COPY, 1000)
    merges = sum(len(groups) - 1 for groups in plan.merged)
    assert merges == min(-(-needed // COPY), len(sizes) - 1)
    assert plan.freed_bytes == merges * COPY and plan.enough == (plan.freed_bytes >= needed)
    assert sum(depths(plan, candidates)) == sum(sizes), "every instance is in exactly one group"


@law(100)
@given(st.integers(1, 64), st.integers(0, 64))
def test_pipelines_of_single_instances_differ_by_one(num, merges):
    candidates = [Candidate(group, 1) for group in range(num)]
    found = depths(plan_drop(candidates, merges * COPY, COPY, 1000), candidates)
    assert max(found) - min(found) <= 1


def test_ties_go_to_the_overloaded_then_to_neighbours():
    candidates = [Candidate(0, 1, 0), Candidate(1, 1, 1, True), Candidate(2, 1, 0), Candidate(3, 1, 1, True)]
    assert plan_drop(candidates, 1, COPY, 80).merged == ((1, 3),)
    assert plan_drop([one._replace(urgent=False) for one in candidates], 1, COPY, 80).merged == ((0, 2),)
    assert not plan_drop(candidates, 4 * COPY, COPY, 80).enough


def test_pipelines_are_no_deeper_than_allowed():
    plan = plan_drop([Candidate(group, 2) for group in range(4)], 10 * COPY, COPY, 4)
    assert sorted(len(groups) for groups in plan.merged) == [2, 2] and not plan.enough


@law(100)
@given(st.integers(4, 80), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_slices_tile_the_layers_and_are_held_already(layers, picks):
    """Whatever order groups merge in: a full copy, contiguous, nobody loads, and as even as pairs can be."""
    routes = [(Stage(instance, (0, layers)),) for instance in range(5)]
    for pick in picks:
        if len(routes) < 2:
            break
        first, second = routes.pop(pick % len(routes)), routes.pop(0)
        merged = merge_slices(first, second)
        if merged is None:
            assert len(first) + len(second) > layers / 2
            return
        held = {stage.instance: stage.layers for stage in (*first, *second)}
        at = 0
        for instance, (low, high) in merged:
            assert low == at < high and held[instance][0] <= low and high <= held[instance][1]
            at = high
        assert at == layers and len(merged) == len(held)
        routes.append(merged)


def test_slices_of_pairs_are_quarters_and_of_one_and_two_thirds():
    whole = [(Stage(index, (0, 48)),) for index in range(4)]
    pairs = [merge_slices(whole[0], whole[1]), merge_slices(whole[2], whole[3])]
    assert [stage.layers for stage in pairs[0]] == [(0, 24), (24, 48)]
    assert [b - a for _, (a, b) in merge_slices(*pairs)] == [12] * 4
    assert [b - a for _, (a, b) in merge_slices(pairs[0], whole[2])] == [16] * 3


chunks = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3000)), min_size=1, max_size=12)


@law(200)
@given(chunks, st.sampled_from((16, 64, 512)), st.floats(0, 0.01))
def test_micro_batches_are_the_queue_in_order_and_small(given_chunks, minimum, alpha):
    batch = [Chunk(index, 16 * start, tokens) for index, (start, tokens) in enumerate(given_chunks)]
    leaves = micro_batches(Costs(alpha, 1.0, 5.0, 3.0), batch, minimum, 16)
    joined = {}
    for leaf in leaves:
        assert sum(one.tokens for one in leaf) <= minimum
        for one in leaf:
            assert joined.setdefault(one.request_id, batch[one.request_id].start) == one.start, "in order, no gap"
            joined[one.request_id] = end = one.start + one.tokens
            whole = batch[one.request_id]
            assert end % 16 == 0 or end == whole.start + whole.tokens, "cut at block borders only"
    assert list(joined) == [one.request_id for one in batch]
    assert all(joined[one.request_id] == one.start + one.tokens for one in batch)


def test_a_cut_halves_the_cost_and_carries_the_prefix():
    costs = Costs(0.01, 1.0, 0.0, 0.0)
    first, second = split(costs, [Chunk(0, 0, 4096)], 16)
    assert second[0].start == first[0].tokens > 2048, "later tokens cost more, so the first part is longer"
    assert abs(costs.batch(first) - costs.batch(second)) < 0.02 * costs.batch([Chunk(0, 0, 4096)])


def test_overload_and_calm():
    limits = Thresholds(overload_polls=2, calm_polls=2)
    assert overloaded(Load(96, 100, 100, 4, 1), limits) and not overloaded(Load(96, 100, 100, 3, 1), limits)
    assert not overloaded(Load(90, 100, 100, 30, 1), limits) and overloaded(Load(90, 100, 100, 30, 20), limits)
    assert calm(Load(49, 130, 100, 0, 0), limits) and not calm(Load(50, 130, 100, 0, 0), limits)
    monitor = Monitor(limits)
    full = Load(96, 100, 100, 9, 1)
    for load, hot in ((full, False), (full, True), (Load(1, 9, 9, 0, 0), False)):
        monitor.sample(7, load)
        assert monitor.is_hot(7) is hot


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("happening", Happening)
def test_what_the_table_lacks_raises(state, happening):
    if (state, happening) in TABLE:
        assert advance(state, happening) is TABLE[state, happening]
    else:
        with pytest.raises(ContractError):
            advance(state, happening)


nodes = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=24)


@law(300)
@given(nodes, st.integers(1, 24))
def test_pipelines_of_single_instances_are_as_even_as_can_be(places, merges):
    """Depths differ by one at most, whatever the need; every copy is kept and nobody is in two groups."""
    candidates = [Candidate(group, 1, node, urgent) for group, (node, urgent) in enumerate(places)]
    plan = plan_drop(candidates, merges * COPY, COPY, 1000)
    found = depths(plan, candidates)
    assert max(found) - min(found) <= 1 and sum(found) == len(places)
    inside = [group for groups in plan.merged for group in groups]
    assert len(set(inside)) == len(inside)
    if len(places) > 2 * merges:
        left = [one for one in candidates if one.group not in inside]
        urgent = sum(one.urgent for one in candidates)
        assert sum(one.urgent for one in left) == max(0, urgent - 2 * merges), "the overloaded merge first"


@law(300)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=24))
def test_pairs_are_neighbours_as_far_as_there_are_any(places):
    """All merge in pairs, nodes of odd counts included: only the odd ones out find a mate elsewhere."""
    places = places[: len(places) // 2 * 2]
    candidates = [Candidate(group, 1, node) for group, node in enumerate(places)]
    plan = plan_drop(candidates, len(places) // 2 * COPY, COPY, 1000)
    close = sum(places[first] == places[second] for first, second in plan.merged)
    assert len(plan.merged) == len(places) // 2
    assert close == sum(places.count(node) // 2 for node in set(places))


@law(300)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=24), st.integers(1, 12))
def test_few_pairs_are_neighbours_before_they_are_not(places, merges):
    candidates = [Candidate(group, 1, node) for group, node in enumerate(places)]
    merges = min(merges, len(places) // 2)
    plan = plan_drop(candidates, merges * COPY, COPY, 1000)
    close = sum(places[first] == places[second] for first, second in plan.merged)
    assert close == min(merges, sum(places.count(node) // 2 for node in set(places)))


@law(200)
@given(sizes, st.integers(1, 24), st.sampled_from((4, 5, 8, 1000)))
def test_no_pipeline_is_deeper_than_it_must_be(sizes, merges, deepest):
    """Of mixed sizes: without its smallest part none is deeper than any other."""
    candidates = [Candidate(group, size, group % 3) for group, size in enumerate(sizes)]
    plan = plan_drop(candidates, merges * COPY, COPY, deepest)
    found = depths(plan, candidates)
    assert max(found) <= max(deepest, max(sizes)) and sum(found) == sum(sizes)
    for groups in plan.merged:
        parts = [sizes[group] for group in groups]
        assert sum(parts) <= deepest
        assert deepest < 1000 or sum(parts) - min(parts) <= min(found)
