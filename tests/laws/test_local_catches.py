"""What goes wrong is seen: each test breaks one line of behaviour, and the story that passes without it is caught, by a
NaN, by a check of the contract, or by a reply that is not the undisturbed one."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

import common.engine.runner
import common.engine.world
from common.driver import drive
from common.engine.cells import CellStore
from common.engine.instance import EngineInstance, move_blocks
from common.engine.runner import plan_band
from common.errors import ContractError
from common.executors.local import LocalExecutor
from common.executors.simmoves import Moves
from common.kernels.reference import TorchBackend
from common.record import RequestColumns, RunRecord
from common.types import CopySpan, DropLayers, Entry, FreeSpan, LoadLayers, ShrinkKV, Span, Stage, Status
from tests.contract.script import Script, World
from tests.engine.witness import Witness, check_logits
from tests.engine.worlds import check_replies, tiny_world
from tests.fakes import FakeWorkload, cluster

ALL, HIGH = (0, 4), (2, 4)
JUDGED = ("says something else", "other logits")


class Tour(Script):
    """Request 0 runs at home, over two instances, and moves to the second, where 1 runs; the first instance drops
    layers and gets them back before 2 runs there."""

    world = World(instances=3, blocks=24)
    workload = FakeWorkload([0, 0, 0], [60, 40, 33], [40, 60, 20])
    hasty: ClassVar[bool] = False  # joins with a copy that is on its way
    careless: ClassVar[bool] = False  # frees the source of a copy that is on its way

    def agents(self):
        return [self.story()]

    def story(self):
        yield self.arrived(0, 1, 2)
        self.change(0, stages=(Stage(0, ALL),), add=(Entry(0, 0, 60),), token_budget=25)
        self.change(1, stages=(Stage(1, ALL),), add=(Entry(1, 0, 40),))
        while 0 not in self.books[0].members:
            yield self.change(0)
        copied = yield self.ask(CopySpan, 0, 0, 1, ALL, (0, 48))
        assert copied.status is Status.OK
        yield self.change(0, place=((0, (Span(1, ALL, 0, 48), Span(0, ALL, 48, 64), Span(1, ALL, 64, None))),))
        for _ in range(4):
            yield self.change(0)
        yield self.change(0, park=(0,))
        end = min(self.tokens[0], 64)
        copied = self.ask(CopySpan, 0, 0, 1, ALL, (48, end), pace=1 if self.hasty else None)
        again = self.again(0)
        if self.careless:
            self.do(FreeSpan(0, 0))
        if self.hasty or (yield copied).status is Status.OK:
            self.change(1, add=(again,))
        else:
            for instance in (0, 1):
                self.do(FreeSpan(instance, 0))
            self.change(1, add=(Entry(0, 0, self.known[0]),))
        yield copied
        self.do(FreeSpan(0, 0))
        yield self.ask(DropLayers, 0, HIGH)
        yield self.ask(ShrinkKV, 0, 24 * 4)
        yield self.ask(LoadLayers, 0, HIGH, None)
        self.change(2, stages=(Stage(0, ALL),), add=(Entry(2, 0, 33),))
        yield self.finished(0, 1, 2)


class Hasty(Tour):
    hasty = True


class Careless(Tour):
    careless = True


def walk_local(walk):
    """With NaN in free cells; the judge compares replies and the logits behind them."""
    model = cluster(walk.world.instances, walk.world.blocks)
    record = RunRecord(RequestColumns.empty(len(walk.workload.prompt_tokens)))
    world = tiny_world(model)
    executor, witness = LocalExecutor(model, walk.workload, record, world=world), Witness(world)
    try:
        drive(walk(model.info()), executor, record)
        for engine in world.instances.values():
            for store in engine.stores.values():
                store.check()
        check_replies(executor)
        check_logits(executor, witness)
    finally:
        executor.close()


def caught(walk=Tour, judged=False):
    """The story is stopped by the contract, or its judge sees another reply or other logits (`judged`: the latter)."""
    with pytest.raises((ContractError, AssertionError)) as error:
        walk_local(walk)
    text = str(error.value)
    stopped = isinstance(error.value, ContractError) and not judged
    assert stopped or any(part in text for part in JUDGED), text
    return text


@pytest.mark.parametrize("walk", [Tour, Careless])
def test_the_story_passes(walk):
    walk_local(walk)


def test_a_join_before_its_data(monkeypatch):
    """Refused; and if it were not, what had not arrived would be read as NaN."""
    assert "not (yet)" in caught(Hasty)
    launch = Moves._launch

    def ready_at_once(moves, copy):
        launch(moves, copy)
        copy.dst_held.ready = True

    monkeypatch.setattr(Moves, "_launch", ready_at_once)
    assert "NaN" in caught(Hasty)
    walk_local(Tour)  # who waits is not touched by it


def test_a_source_freed_under_its_copy(monkeypatch):
    monkeypatch.setattr(Moves, "freed", lambda *_: None)
    assert "any more" in caught(Careless)


def test_a_block_freed_under_its_reader(monkeypatch):
    append = CellStore.append

    def and_free_the_first(store, request_id, *where):
        append(store, request_id, *where)
        wanted = store.requests[request_id].run >= 0
        wanted[:, np.flatnonzero(wanted.any(axis=0))[0]] = False
        store.claim(request_id, wanted)

    monkeypatch.setattr(CellStore, "append", and_free_the_first)
    caught()


@pytest.mark.parametrize("other", [0, 2])
def test_a_look_at_a_neighbour(monkeypatch, other):
    """A creditor's table with the arena of its debtor, or of one that has nothing to do with it."""

    def misled(batch, home, *rest):
        plans = plan_band(batch, home, *rest)
        for plan in plans[1:]:
            plan.instance, plan.writes = other, []
        return plans

    monkeypatch.setattr(common.engine.runner, "plan_band", misled)
    caught()


@pytest.mark.parametrize("layer", range(4))
def test_a_copy_that_skips_a_layer(monkeypatch, layer):
    def skipping(src, src_tier, src_cells, dst, dst_tier, dst_cells, *rest):
        src_cells, dst_cells = (np.delete(cells, layer, axis=0) for cells in (src_cells, dst_cells))
        move_blocks(src, src_tier, src_cells, dst, dst_tier, dst_cells, *rest)

    monkeypatch.setattr(common.engine.world, "move_blocks", skipping)
    assert "NaN" in caught()


@pytest.mark.parametrize("shift", ["cell", "block"])
def test_a_table_off_by_one(monkeypatch, shift):
    """Reads only: who writes there too would be no worse off."""
    plan = TorchBackend.plan

    def off(backend, rows, device):
        tables = rows.tables
        if shift == "cell":
            tables = np.where(tables >= 0, np.maximum(tables - 1, 0), tables)
        else:
            tables = np.roll(tables, 1, axis=-1)
            tables = np.where(tables < 0, tables[..., :1], tables)
        return plan(backend, rows._replace(tables=tables.astype(np.int32)), device)

    monkeypatch.setattr(TorchBackend, "plan", off)
    caught()


def test_a_log_sum_exp_to_another_base(monkeypatch):
    run = TorchBackend.run

    def base_two(backend, *args):
        o, lse = run(backend, *args)
        return o, lse / np.log(2)

    monkeypatch.setattr(TorchBackend, "run", base_two)
    caught(judged=True)


def test_a_partial_that_is_dropped(monkeypatch):
    monkeypatch.setattr(common.engine.runner, "merge_into", lambda *_: None)
    caught(judged=True)


def test_a_partial_that_counts_twice(monkeypatch):
    merge_into = common.engine.runner.merge_into

    def twice(*args):
        merge_into(*args)
        merge_into(*args)

    monkeypatch.setattr(common.engine.runner, "merge_into", twice)
    caught(judged=True)


def test_a_restore_without_weights(monkeypatch):
    def pages_only(engine, layers, peer):
        for index in layers:
            engine.remaps.restores.append(engine.arena.restore((index, index + 1)))

    monkeypatch.setattr(EngineInstance, "load", pages_only)
    assert caught()


def test_a_restore_of_the_wrong_layer(monkeypatch):
    load = EngineInstance.load

    def swapped(engine, layers, peer):
        load(engine, layers, peer)
        for index in layers:
            engine.source.layer_into(5 - index, engine.arena.layer(index)[: engine.layout.num_bytes])

    monkeypatch.setattr(EngineInstance, "load", swapped)
    caught(judged=True)
