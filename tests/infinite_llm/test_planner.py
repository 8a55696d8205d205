"""The planner: against brute force on small cases, where it must not move, and its model against the cost model."""

from __future__ import annotations

import itertools
from heapq import heapify

import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.config import CONF
from common.cost.model import InstanceCost
from common.cost.specs import load_hardware, load_model
from common.cost.throughput import throughput_model
from systems.infinite_llm.messages import Load
from systems.infinite_llm.planner import Planner, View, freest
from systems.infinite_llm.throughput import Throughput
from tests.laws.strategies import law

MODEL = Throughput(((1, 1e7), (256, 1.6e7)), 150.0)


def planner(**changes) -> Planner:
    return Planner(MODEL, 16, **{"pace": 16, "hysteresis": 0.0, "horizon_iterations": 10**6, **changes})


def total(model: Throughput, loads) -> float:
    return sum(model.tokens_per_s(load.decoding, load.attended_tokens) for load in loads)


@st.composite
def views(draw):
    loads, requests = {}, {}
    for instance in range(draw(st.integers(2, 3))):
        capacity = 200
        own = {instance * 10 + i: draw(st.integers(2, 60)) for i in range(draw(st.integers(1, 3)))}
        used = sum(own.values())
        waiting = draw(st.integers(0, 3))
        waiting_blocks = sum(draw(st.integers(10, 60)) for _ in range(waiting))
        free = max(0, min(capacity - used, draw(st.integers(0, 12)) if waiting else capacity - used))
        loads[instance] = Load(capacity, free, len(own), waiting, waiting_blocks, used * 16)
        requests[instance] = own
    return View(loads, requests)


def best_by_force(made: Planner, view: View) -> float:
    """Over all numbers of blocks (in steps) from every debtor to every creditor."""
    loads = view.loads
    debtors = [i for i in loads if loads[i].waiting]
    pairs = [(d, c) for d in debtors for c in loads if c not in debtors]
    best = total(MODEL, loads.values())
    for amounts in itertools.product(range(0, 160, 4), repeat=min(2, len(pairs))):
        state, legal = dict(loads), True
        for (debtor, creditor), num in zip(pairs, amounts):
            limit = sum(blocks - 1 for blocks in view.requests[debtor].values())
            if num > limit or num > state[creditor].free - 20:
                legal = False
                break
            if num:
                state[debtor], state[creditor] = made.moved(state[debtor], state[creditor], num)
        if legal:
            best = max(best, total(MODEL, state.values()))
    return best


@law(60)
@given(views())
def test_greedy_is_close_to_brute_force(view: View) -> None:
    made = planner()
    before = total(MODEL, view.loads.values())
    state = dict(view.loads)
    for move in made.plan(view):
        assert move.num_blocks > 0 and move.gain_tps > 0
        state[move.src], state[move.dst] = made.moved(state[move.src], state[move.dst], move.num_blocks)
        assert state[move.dst].free >= 0
    reached = total(MODEL, state.values())
    assert reached >= before
    assert reached >= 0.8 * best_by_force(made, view)


def test_nobody_waits_nothing_moves() -> None:
    loads = {0: Load(100, 0, 4, 0, 0, 1600), 1: Load(100, 90, 1, 0, 0, 160)}
    assert planner().plan(View(loads, {0: {0: 60}, 1: {1: 10}})) == []


def test_moving_that_never_pays_is_not_begun() -> None:
    loads = {0: Load(100, 0, 4, 2, 40, 1600), 1: Load(1000, 990, 1, 0, 0, 160)}
    view = View(loads, {0: {0: 80}, 1: {1: 10}})
    assert planner().plan(view)
    assert planner(horizon_iterations=10).plan(view) == []
    assert planner(hysteresis=1.0).plan(view) == []


def test_the_fitted_model_is_near_the_cost_model() -> None:
    model_spec, card = (yaml.safe_load((CONF / name).read_text()) for name in ("model/llama2-7b.yaml",
                                                                                "hardware/a100-80g.yaml"))  # fmt: skip
    card.pop("description")
    cost = InstanceCost(load_model(model_spec), load_hardware(card))
    model = Throughput.from_extra(throughput_model(cost))
    for batch, context in ((3, 2000), (12, 3000), (48, 1500), (96, 700)):
        real = cost.decode_ns(batch, context)
        assert abs(model.iteration_ns(batch, batch * context) / real - 1) < 0.2, (batch, context)


@law(100)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.lists(st.integers(0, 3), max_size=20))
def test_the_freest_creditor_is_found_among_stale_entries(free: list[int], taken: list[int]) -> None:
    """As a scan of all would find it, after every move that takes blocks from it."""
    loads = {index: Load(100, blocks, 0, 0, 0, 0) for index, blocks in enumerate(free)}
    heap = [(-load.free, index) for index, load in loads.items()]
    heapify(heap)
    for blocks in taken:
        found = freest(heap, loads)
        assert found == max(loads, key=lambda i: (loads[i].free, -i))
        loads[found] = loads[found]._replace(free=max(0, loads[found].free - blocks))
