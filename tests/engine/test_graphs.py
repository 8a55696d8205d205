"""Decode over static buffers: the same tokens as the eager path, whatever joins, leaves, grows, is dropped or comes
back. On a CPU a replay runs the captured body again, so the buffers are proved here, and the capture is not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.driver import drive
from common.engine.graphs import CudaCapture, Rerun, whereabouts
from common.engine.instance import cell_bytes
from common.engine.layout import LayerLayout
from common.engine.world import EngineWorld
from common.errors import ContractError
from common.executors.local import LocalExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import InstanceInfo
from systems.baselines.vllm import VllmPolicy
from tests.contract.runtimes import walk_local
from tests.contract.test_walks import WALKS, check_books
from tests.engine.worlds import check_tokens, source_of, tiny_spec
from tests.fakes import FakeWorkload, cluster

torch.set_num_threads(1)
BLOCK = 16


def serve(graphs, device="cpu", dtype=torch.float32, **options):
    """Eleven requests that come and go; (replies, what the graphs did)."""
    spec = replace(tiny_spec(3, 4, 2, 16), dtype=dtype)
    prompts = [5, 16, 40, 3, 70, 17, 1, 33, 9, 20, 64]
    outputs = [30, 4, 17, 60, 9, 2, 40, 16, 33, 1, 25]
    info = InstanceInfo(0, 3, 40 * 3, cell_bytes(spec, BLOCK, dtype), LayerLayout(spec).num_bytes)
    model = replace(cluster(1, 40, 3, BLOCK), instances=(info,))
    arrivals = [0, 0, 0, 1_000_000, 1_000_000, 3_000_000, 3_000_000, 4_000_000, 4_000_000, 4_000_000, 5_000_000]
    workload = FakeWorkload(arrivals, prompts, outputs)
    record = RunRecord(RequestColumns.empty(len(prompts)))
    world = EngineWorld(model.instances, spec, source_of(spec), BLOCK, graphs=graphs, device=device, **options)
    executor = LocalExecutor(model, workload, record, world=world)
    config = EngineConfig(block_size=BLOCK, max_num_batched_tokens=64, max_num_seqs=7)
    drive(VllmPolicy(model.info(), config), executor, record)
    replies = executor.outputs()
    if device == "cpu":
        check_tokens(executor)
    made = world.runner.graphs
    executor.close()
    return replies, made.counts if made else None


def test_changing_batches_and_growing_tables_say_what_the_eager_path_says():
    eager, nothing = serve("off", poison=True)
    replayed, counts = serve("on", poison=True)
    assert nothing is None and replayed == eager
    assert counts.captures >= 4 and counts.replays > 3 * counts.captures and counts.thrown_away == 0


@pytest.mark.parametrize("name", WALKS)
def test_walks_with_graphs(name):
    outcome = walk_local(WALKS[name].WALK, 1, graphs="on")
    check_books(outcome)
    WALKS[name].check(outcome)
    assert outcome.graphs.replays > 0
    if name == "KunServe":
        assert outcome.graphs.thrown_away > 0, "layers went and came: their graphs had to go"


def test_graphs_are_off_on_a_cpu_unless_asked_for():
    spec = tiny_spec()
    info = cluster(1, 8, spec.num_layers, BLOCK).instances
    for wanted, made in (("auto", False), ("off", False), ("on", True)):
        world = EngineWorld(info, spec, source_of(spec), BLOCK, graphs=wanted)
        assert (world.runner.graphs is not None) is made
        assert ("replays" in world.describe()["graphs"]) is made
        world.close()


def test_whereabouts_change_with_what_a_graph_holds():
    spec = tiny_spec()
    world = EngineWorld(cluster(1, 8, spec.num_layers, BLOCK).instances, spec, source_of(spec), BLOCK)
    world.start(0)
    engine = world.instances[0]
    before = whereabouts(engine)
    engine.drop((2, 4))
    with pytest.raises(ContractError):
        whereabouts(engine)
    engine.resize(8 * spec.num_layers)
    engine.load([2, 3], None)
    after = whereabouts(engine)
    assert after != before and after[1:3] == before[1:3], "the range is as it was, its pages are not"
    world.close()


def test_captures_run_the_body_before_the_first_replay():
    ran = []
    replay = Rerun()(lambda: ran.append(1))
    assert len(ran) == 1
    replay()
    assert len(ran) == 2


class Pools:
    """Of graphs, by torch's rules: a pool lives as long as a graph that was captured into it, and a handle of a pool
    that has ended cannot be used."""

    def __init__(self):
        self.graphs = {}  # pool -> living graphs
        pools = self

        class Graph:
            number = None

            def pool(self):
                return self.number

            def replay(self):
                pass

            def __del__(self):
                if self.number is not None:
                    pools.graphs[self.number] -= 1

        self.kind = Graph

    def capture(self, graph, pool=None):
        assert pool is None or self.graphs[pool] > 0, "a pool whose last graph has gone"
        graph.number = (1, len(self.graphs)) if pool is None else pool
        self.graphs[graph.number] = self.graphs.get(graph.number, 0) + 1
        return nullcontext()


def test_graphs_share_a_pool_while_it_lives_and_open_another_when_all_have_gone(monkeypatch):
    pools, stream = Pools(), SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"CUDAGraph": pools.kind, "graph": pools.capture, "Stream": lambda: stream,
                        "current_stream": lambda: stream, "stream": lambda one: nullcontext(),
                        "synchronize": lambda: None}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    capture = CudaCapture()
    replays = [capture(lambda: None) for _ in range(3)]
    assert list(pools.graphs.values()) == [3]
    del replays[0]
    replays.append(capture(lambda: None))
    assert list(pools.graphs.values()) == [3]
    replays.clear()
    replays.append(capture(lambda: None))
    assert list(pools.graphs.values()) == [0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", ["triton", "torch"])
def test_cuda_graphs_say_what_the_eager_path_says(attention):
    eager, _ = serve("off", "cuda", attention=attention)
    replayed, counts = serve("on", "cuda", attention=attention)
    assert replayed == eager and counts.replays > counts.captures > 0
