"""The whole engine (paged KV, batching, chunked prefill, any order) says what transformers says, token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.driver import drive
from common.engine.folder import FolderSource
from common.engine.instance import cell_bytes
from common.engine.layout import LayerLayout
from common.engine.world import EngineWorld
from common.executors.local import LocalExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import InstanceInfo
from systems.baselines.vllm import VllmPolicy
from tests.fakes import FakeWorkload, cluster
from tests.laws.strategies import law

torch.set_num_threads(1)
PROMPTS = (1, 15, 16, 17, 1000)
SHORT = (1, 15, 16, 17, 60)
NUM_TOKENS = 256
BLOCK = 16


def serve(source, order, budget, count=NUM_TOKENS):
    """Replies by prompt length; prompts all at once, in this order, with chunks of at most `budget` tokens."""
    spec = source.spec
    cell = cell_bytes(spec, BLOCK, spec.dtype)
    blocks = sum(-(-(prompt + count) // BLOCK) for prompt in order)
    info = InstanceInfo(0, spec.num_layers, blocks * spec.num_layers, cell, LayerLayout(spec).num_bytes)
    model = replace(cluster(1, blocks, spec.num_layers, BLOCK), instances=(info,))
    # One source of tokens a prompt length, whatever the order: the same prompts in every run.
    content = [((f"prompt of {prompt}", 0, prompt),) for prompt in order]
    workload = FakeWorkload([0] * len(order), list(order), [count] * len(order), content)
    record = RunRecord(RequestColumns.empty(len(order)))
    world = EngineWorld(model.instances, spec, source, BLOCK, poison=True)
    executor = LocalExecutor(model, workload, record, world=world)
    config = EngineConfig(block_size=BLOCK, max_num_batched_tokens=budget, max_num_seqs=min(budget, 8))
    drive(VllmPolicy(model.info(), config), executor, record)
    found = {prompt: (executor.known(index)[:prompt], executor.reply(index)) for index, prompt in enumerate(order)}
    executor.close()
    return found


@pytest.mark.parametrize(("family", "heads", "kv_heads", "head_dim"),
                         [("llama", 4, 4, 64), ("qwen2", 4, 1, 128), ("qwen3", 8, 1, 64)])  # fmt: skip
def test_replies_are_those_of_transformers(family, heads, kv_heads, head_dim, tmp_path):
    from tests.engine import hf

    model = hf.build(family, heads=heads, kv_heads=kv_heads, head_dim=head_dim, max_position_embeddings=2048)
    model.save_pretrained(tmp_path)
    source = FolderSource(tmp_path)
    found = serve(source, PROMPTS, 2048)
    assert sum(len(set(reply)) > 20 for _, reply in found.values()) >= 3  # no model that repeats itself
    for prompt, (ids, reply) in found.items():
        assert reply == hf.greedy(model, ids, NUM_TOKENS), f"the reply to a prompt of {prompt} tokens"
    assert serve(source, PROMPTS[::-1], 64) == found
    assert serve(source, (16, 1000, 1, 17, 15), 7) == found


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A folder of weights, and what transformers replies to each of a few short prompts."""
    from tests.engine import hf

    folder = tmp_path_factory.mktemp("short")
    model = hf.build("llama", heads=4, kv_heads=4)
    model.save_pretrained(folder)
    source = FolderSource(folder)
    found = serve(source, SHORT, 512, 12)
    return source, {prompt: (ids, hf.greedy(model, ids, 12)) for prompt, (ids, _) in found.items()}


@law(25)
@given(order=st.permutations(SHORT), budget=st.integers(1, 140))
def test_any_order_and_any_chunk(short, order, budget):
    source, want = short
    assert serve(source, order, budget, 12) == want
