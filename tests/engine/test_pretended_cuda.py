"""What asks a CUDA device for something it would refuse, found without one: the contract walks over `pretend_cuda`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.engine.runner import Runner
from common.kernels import cache
from common.types import Tier
from tests.contract.runtimes import walk_local
from tests.contract.test_walks import WALKS, check_books
from tests.engine.pretend_cuda import pretended
from tests.engine.worlds import fitting_cluster, tiny_spec, tiny_world
from tests.fakes import cluster

torch.set_num_threads(1)


@pytest.mark.parametrize("name", WALKS)
def test_walks_ask_nothing_that_a_device_refuses(name, monkeypatch):
    with pretended(monkeypatch) as driver:
        outcome = walk_local(WALKS[name].WALK, 1, graphs="on", device="cuda", attention="torch")
    check_books(outcome)
    WALKS[name].check(outcome)
    assert outcome.graphs.replays > 0
    driver.assert_nothing_left()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", WALKS)
def test_walks_on_the_gpu(name):
    outcome = walk_local(WALKS[name].WALK, 1, graphs="on", device="cuda")
    check_books(outcome)
    WALKS[name].check(outcome)


def test_the_pretended_device_minds_where_tensors_are(monkeypatch):
    with pretended(monkeypatch):
        there, here = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
        index = torch.tensor([1])
        for act in (lambda: there + here, lambda: there.index_select(0, index), lambda: here[index.to("cuda")],
                    lambda: there.numpy(), lambda: np.asarray(there)):  # fmt: skip
            with pytest.raises((RuntimeError, TypeError)):
                act()
        assert there[index].is_cuda and not there.cpu().is_cuda and not there.to("cpu").is_cuda
        assert (there * 2).view(-1).is_cuda and here.to("cuda").is_cuda and not here.copy_(there).is_cuda


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_range_that_was_shrunk_for_a_load_that_does_not_come_widens_again(device, tp, monkeypatch):
    spec = tiny_spec()
    with pretended(monkeypatch) if device == "cuda" else nullcontext():
        world = tiny_world(fitting_cluster(spec, 1, 32, 16, tp=tp), spec, device=device, attention="torch")
        world.start(0)
        engine, (layer, cell) = world.instances[0], (world.infos[0].layer_param_bytes, world.infos[0].cell_bytes)
        whole, less = 32 + 2 * layer // cell, 32 + layer // cell
        engine.drop((2, 4))
        engine.resize(less - 3)
        engine.resize(less)
        store = engine.stores[Tier.HBM]
        assert store.range.free_cells == len(engine.kv) == less < whole
        assert bool(torch.isnan(engine.kv.cpu()).all()), "new cells are nobody's"
        engine.load([2], None)  # which a wider range would not have left the pages
        world.close()


def test_tied_tables_are_on_a_device_once(monkeypatch):
    with pretended(monkeypatch):
        model = cluster(1, 8, 4, 16)
        shared = tiny_world(model, tiny_spec(), device="cuda", attention="torch").runner
        apart = tiny_world(model, replace(tiny_spec(), tied=False), device="cuda", attention="torch").runner
    tables = [(runner.head._panels[0].data_ptr(), runner.embedding.data_ptr()) for runner in (shared, apart)]
    assert tables[0][0] == tables[0][1] and tables[1][0] != tables[1][1]


def test_a_device_is_warm_before_anything_is_timed_and_nothing_is_left_of_it(monkeypatch):
    runs, plain = [], Runner.run_stage
    monkeypatch.setattr(Runner, "run_stage", lambda self, item, *at: runs.append(item) or plain(self, item, *at))
    with pretended(monkeypatch):
        world = tiny_world(cluster(2, 8, 4, 16), device="cuda", attention="torch", graphs="on")
        for index in (0, 1):
            world.start(index)
            store = world.instances[index].stores[Tier.HBM]
            assert store.used == 0 and not store.requests and store.range.free_cells == 32
            assert torch.isnan(world.instances[index].kv.cpu()).all()
        assert [item.batch.num_tokens for item in runs] == [2, 1], "once for all instances of a TP"
        assert world.runner.graphs.counts.replays == 0
        for block in range(8):
            store.append(7, 0, 4, block)
        world.runner.warm_up(1)
        assert len(runs) == 2, "no cell is free"
        world.close()


@pytest.mark.parametrize("to_host", [False, True])
def test_cells_are_copied_by_ids_from_the_host(to_host, monkeypatch):
    with pretended(monkeypatch):
        source = torch.arange(6.0, device="cuda")[:, None, None, None, None].expand(6, 2, 4, 1, 2).contiguous()
        goal = torch.zeros(5, 2, 4, 1, 2, device="cpu" if to_host else "cuda")
        cache.copy_cells(source, torch.tensor([4, 1]), goal, torch.tensor([0, 3]))
        assert goal[:, 0, 0, 0, 0].tolist() == [4, 0, 0, 1, 0]
