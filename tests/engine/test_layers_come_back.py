"""Any layers can be dropped and loaded again: from a peer, from host memory, from a folder of one file or of shards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.driver import drive
from common.engine.folder import FolderSource
from common.engine.instance import EngineInstance, cell_bytes
from common.engine.layout import LayerLayout
from common.engine.sampler import SamplingParams
from common.engine.weights import MemorySource, RandomSource
from common.errors import ContractError
from common.executors.local import LocalExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import InstanceInfo
from systems.baselines.vllm import VllmPolicy
from tests.engine.worlds import tiny_spec, tiny_world
from tests.fakes import FakeWorkload, cluster

CPU = torch.device("cpu")
LAYERS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tests.engine import hf

    folder = tmp_path_factory.mktemp("model")
    model = hf.build("qwen3", layers=LAYERS)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="200KB")
    assert len(list((folder / "many").glob("*.safetensors"))) > 1
    return folder


def instance(source, index=0):
    spec, block = source.spec, 16
    cell, layer = cell_bytes(spec, block, spec.dtype), LayerLayout(spec, spec.dtype).num_bytes
    info = InstanceInfo(index, spec.num_layers, 8 * spec.num_layers, cell, layer)
    return EngineInstance(info, spec, spec.dtype, CPU, block, source)


def sources(saved, dtype):
    folder = FolderSource(saved / "one", dtype)
    random = RandomSource(replace(tiny_spec(LAYERS), dtype=dtype), 3, dtype)
    return {"disk": folder, "shards": FolderSource(saved / "many", dtype), "host": MemorySource(folder),
            "random": random}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["disk", "shards", "host", "random"])
@pytest.mark.parametrize("peer", [False, True])
def test_a_layer_is_the_same_when_it_comes_back(saved, kind, dtype, peer):
    source = sources(saved, dtype)[kind]
    engine, other = instance(source), instance(source, 1)
    before = [engine.slab(index).clone() for index in range(LAYERS)]
    assert all(slab.any() for slab in before) and not torch.equal(before[1], before[2])
    engine.drop((1, 3))
    for index in (1, 2):
        with pytest.raises(ContractError):
            engine.layer(index)
    engine.kv.fill_(1.0)  # their pages are KV now
    engine.resize(engine.info.kv_cells)
    if peer:
        other.slab(2)[:] = 7  # it is the peer's bytes that come
        before[2] = other.slab(2).clone()
    engine.load([2, 1], other if peer else None)
    for index in range(LAYERS):
        assert torch.equal(engine.slab(index), before[index])
    engine.close()
    other.close()


def replies(sampling, budget, order):
    model = cluster(1, 64)
    content = [((f"prompt {length}", 0, length),) for length in (40, 9, 21)]
    workload = FakeWorkload([0, 1, 2], [40, 9, 21], [20, 20, 20], content)
    world = tiny_world(model, sampling=sampling)
    executor = LocalExecutor(model, workload, RunRecord(RequestColumns.empty(3)), world=world)
    config = EngineConfig(block_size=16, max_num_batched_tokens=budget, max_num_seqs=order)
    drive(VllmPolicy(model.info(), config), executor, executor.record)
    found = [executor.reply(index) for index in range(3)]
    executor.close()
    return found


def test_sampled_replies_depend_on_the_seed_and_not_on_the_batch():
    warm = SamplingParams(temperature=0.7, top_k=50, top_p=0.95, seed=5)
    first = replies(warm, 512, 3)
    assert replies(warm, 8, 3) == first and replies(warm, 16, 1) == first
    assert replies(replace(warm, seed=6), 512, 3) != first != replies(SamplingParams(), 512, 3)
