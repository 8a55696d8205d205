"""Any cut is exact: whatever legal placements and routes a request's KV and layers are given, and whatever happens to
them on the way, every token is that of the undisturbed run, and the logits behind it but for rounding."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from unittest import mock

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from common.driver import drive
from common.engine.cells import RequestCells
from common.executors.local import LocalExecutor
from common.executors.network import LinkSpec
from common.executors.sim import SimExecutor
from common.kv.blocks import CellRange
from common.record import RequestColumns, RunRecord
from common.types import CopySpan, Entry, FreeSpan, RequestStatus, Span, Stage, Tier
from tests.contract.nomads import KINDS, Case, Nomads
from tests.contract.runtimes import Recorder, walk_local
from tests.contract.script import Script, World
from tests.contract.test_random_moves import ALL, OPS, Wanderers, wander
from tests.engine.witness import Witness, check_logits
from tests.engine.worlds import check_replies, fitting_cluster, tiny_spec, tiny_world
from tests.fakes import US, FakeWorkload, cluster
from tests.laws.strategies import law

SHARDS = 4


class Ragged(CellRange):
    """A range in which long runs are often not to be had, and the highest cells are often given first."""

    __slots__ = ()
    dice = Random(0)

    def free_runs(self, run_cells):
        runs = super().free_runs(run_cells)
        return runs if run_cells == 1 or self.dice.random() < 0.4 else self.dice.randint(0, runs)

    def can_allocate(self, run_cells, num_runs):
        return 0 <= num_runs <= super().free_runs(run_cells)

    def allocate(self, run_cells, num_runs):
        if self.dice.random() < 0.3:
            return super().allocate(run_cells, num_runs)
        starts = []
        for gap in self._gaps[::-1]:
            cells = self._gap_cells[gap]
            taken = min(cells // run_cells, num_runs - len(starts))
            starts += [gap + cells - (one + 1) * run_cells for one in range(taken)]
            self._gap_cells[gap] -= taken * run_cells
            if not self._gap_cells[gap]:
                del self._gap_cells[gap]
                self._gaps.remove(gap)
        self._held.update(dict.fromkeys(starts, run_cells))
        self.held_cells += run_cells * num_runs
        return starts


def cluster_of(case, spec, tp):
    links = {"nvlink": LinkSpec(2e10, 2 * US), "nic": LinkSpec(8e9, 3 * US), "pcie": LinkSpec(8e9, 2 * US),
             "remap_ns": 20 * US, "hidden_bytes": 128}  # fmt: skip
    return fitting_cluster(spec, case.instances, case.cells, case.block_size, case.cells, tp, **links)


def columns(record):
    requests = record.requests
    return [list(column) for column in (requests.first_token_ns, requests.finish_ns, requests.num_preemptions,
                                        requests.num_migrations, requests.output_tokens)]  # fmt: skip


def settled(executor):
    assert list(executor.record.requests.status) == [RequestStatus.FINISHED] * len(executor.record.requests.status)
    for memory in executor.state.memory:
        assert memory.used == memory.cached == memory.host_used == 0
    assert not (executor.state.held or executor.moves.copies or executor.moves.swaps or executor.control._spread)


def run(case, executor, policy):
    policy.executor = executor
    drive(policy, Recorder(executor, []), executor.record)
    settled(executor)


def live_through(case, tp=1) -> Counter:
    """One case, in both runtimes, on instances of so many ranks; what it has shown."""
    spec = tiny_spec(case.layers, *case.heads)
    model = cluster_of(case, spec, tp)
    workload = FakeWorkload([0] * len(case.lengths), *map(list, zip(*case.lengths)))
    world = tiny_world(model, spec)
    witness = Witness(world)
    seen = witness.seen

    def uniform(cells, *args, plain=RequestCells.uniform):
        same = plain(cells, *args)
        seen["scattered"] += not same
        return same

    executor = LocalExecutor(model, workload, RunRecord(RequestColumns.empty(len(case.lengths))), world=world)
    if case.ragged:
        Ragged.dice.seed(case.seed)
        for engine in world.instances.values():
            engine.stores[Tier.HBM].range.__class__ = Ragged
    policy = Nomads(case, model.info())
    try:
        with mock.patch.object(RequestCells, "uniform", uniform):
            run(case, executor, policy)
        for engine in world.instances.values():
            for store in engine.stores.values():
                store.check()
                assert store.used == 0 and not store.requests
        check_replies(executor)
        check_logits(executor, witness)
        seen["compacted"] += world.remaps().get("compacted_cells", 0)
    finally:
        executor.close()
    sim = SimExecutor(model, workload, RunRecord(RequestColumns.empty(len(case.lengths))))
    run(case, sim, Nomads(case, model.info()))
    assert columns(executor.record) == columns(sim.record)
    return seen + policy.did


@st.composite
def cases(draw):
    instances = draw(st.sampled_from((1, 2, 2, 3, 3, 4, 5)))
    size = draw(st.sampled_from((4, 8, 16)))
    length = st.tuples(st.sampled_from((1, 3, 8, 17, 32, 45, 64, 80)), st.sampled_from((1, 2, 6, 10, 16, 24)))
    lengths = draw(st.lists(length, min_size=1, max_size=3))
    op = st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.sampled_from((0, 0, 5, 20, 60, 200)))
    ops = draw(st.lists(op, min_size=10, max_size=20))
    heads = draw(st.sampled_from(((2, 2, 16), (4, 2, 16), (4, 1, 16), (3, 1, 32), (2, 1, 32))))
    return Case(instances, draw(st.sampled_from((2, 3, 4, 4))), size, heads, draw(st.sampled_from((1.0, 1.5, 3.0))),
                tuple(lengths), tuple(ops), draw(st.integers(0, 1 << 30)), draw(st.booleans()))  # fmt: skip


EXPECTED = ("multi-span decode", "remote decode", "all of it remote", "layer x token cuts", "empty span", "chunked",
            "chunk beside decode", "pipeline", "remote append", "remote prefill", "scattered", "switch", "band", "drop",
            "restore", "peer", "compacted", "swap out", "swap in", "loss", "lost", "park", "rejoin", "preempt",
            "recompute", "copy", "spread")  # fmt: skip


MET: dict[int, Counter[str]] = {}
"""By shard: in how many cases each mechanism was at work."""


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_cut_is_exact(shard):
    cases_with = Counter()

    @seed(shard)
    @settings(parent=law(80), derandomize=False, database=None)
    @given(cases())
    def one(case):
        cases_with.update(name for name, count in live_through(case).items() if count)

    one()
    MET[shard] = cases_with


def test_the_draws_reach_what_the_law_is_about():
    """Each mechanism in at least three cases of all shards together."""
    if len(MET) < SHARDS:
        pytest.skip("counts the cases of test_any_cut_is_exact: run the whole file")
    met = sum(MET.values(), Counter())
    rare = {name: met[name] for name in EXPECTED if met[name] < 3}
    assert not rare, f"too few cases show {rare} (all: {dict(met)})"


@pytest.mark.parametrize("tp", [2, 4])
def test_any_cut_is_exact_rank_by_rank(tp):
    """The same on instances of several ranks: query heads, and KV heads where there are enough, are cut as well."""
    met = Counter()

    @seed(tp)
    @settings(parent=law(40), derandomize=False, database=None)
    @given(cases())
    def one(case):
        heads = case.heads if case.heads[0] % tp == 0 else (4, case.heads[1], 16)
        met.update(name for name, count in live_through(replace(case, heads=heads), tp).items() if count)

    one()
    wanted = ("remote decode", "remote append", "pipeline", "drop", "restore", "swap in", "loss", "copy")
    assert all(met[name] for name in wanted), f"no case shows some of {wanted}: {dict(met)}"


def test_what_fits_is_asked_of_the_same_instant_in_both_runtimes():
    """Memory to the last cell, and a wanderer that looks at it in the middle of a leap, which `local` goes step by
    step."""
    ops = (("go", 1, 5), ("preempt", 0, 20), ("breathe", 0, 20), ("go", 1, 5), ("breathe", 1, 5), ("shift", 2, 5),
           ("home", 2, 60), ("go", 0, 5), ("breathe", 1, 5), ("go", 1, 200), ("breathe", 2, 60))  # fmt: skip
    live_through(Case(1, 2, 8, (4, 1, 16), 1.0, ((1, 16), (64, 24)), ops, 4056, True))


SHORT = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 70)), min_size=4, max_size=4)


@law(8)
@given(OPS, SHORT)
def test_wanderers_say_the_same(ops, lengths):
    """The random stories of the simulator's contract, with real tensors."""
    model = cluster(3, 256, host_blocks=64)
    workload = FakeWorkload([0] * 4, [prompt for prompt, _ in lengths], [output for _, output in lengths])
    executor = LocalExecutor(model, workload, RunRecord(RequestColumns.empty(4)), world=tiny_world(model))
    try:
        drive(Wanderers(ops, model.info(), None), Recorder(executor, []), executor.record)
        settled(executor)
        check_replies(executor)
    finally:
        executor.close()
    _, sim = wander(ops, lengths, None)
    assert columns(executor.record) == columns(sim.record)


class Looked(Script):
    """Request 0 grows on its creditor, and in every iteration its books change: a copy begins, another is given up."""

    world = World(instances=3, blocks=16)
    workload = FakeWorkload([0], [40], [50])

    def agents(self):
        return [self.story()]

    def story(self):
        yield self.arrived(0)
        spans = (Span(0, ALL, 0, 48), Span(1, ALL, 48, None))
        self.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 40, placement=spans),))
        while ("finished", 0) not in self.happened:
            yield self.change(0)
            if 0 in self.books[0].members:
                self.do(FreeSpan(2, 0))
                self.ask(CopySpan, 0, 0, 2, ALL, (0, 16))


def test_a_new_block_on_a_creditor_outlives_a_look_at_the_books():
    """In mid-iteration its growth at home was kept when its books were settled, its growth elsewhere was not."""
    walk_local(Looked, None)
