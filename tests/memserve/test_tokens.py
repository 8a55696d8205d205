"""Greedy tokens with real tensors: caching, disaggregation, any design and transfer mode, swaps and eviction under
pressure change nothing. Free cells hold NaN; the judge is a dense decoder that knows no paging (fp32, tiny model)."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings

pytest.importorskip("torch")

import torch

from common.engine.head import Head
from common.engine.model import Decoder
from common.executors.local import LocalExecutor
from common.types import RequestStatus, Tier
from systems.memserve.config import DESIGNS
from tests.engine.worlds import _dense, source_of, tiny_spec, tiny_world, undisturbed
from tests.laws.strategies import law
from tests.memserve.lib import run, scenarios

SPEC = tiny_spec(4)
NUM = 34 if os.environ.get("KVPLANE_NIGHTLY") else 8  # a design: 6 of them


def greedy(ids: list[int], length: int) -> list[int]:
    """What a dense decoder says after each prefix of `ids` from `length` on: equal to the reply exactly when the reply
    is greedy. One pass over all of it, so hundreds of requests can be judged."""
    source = source_of(SPEC)
    decoder = Decoder(SPEC, "cpu", SPEC.dtype)
    with torch.inference_mode():
        x = decoder.embed(torch.tensor(ids[:-1]), source.embedding())
        rotation = decoder.rotation(torch.arange(len(ids) - 1))
        past = [None] * SPEC.num_layers
        for index in range(SPEC.num_layers):
            views = source.layout.views(source.slab(index))
            x = decoder.layer(views, x, rotation, _dense(SPEC, past, index))
        return decoder.logits(x[length - 1 :], source.final_norm(), Head(source.head())).argmax(-1).tolist()


def check_tokens(executor: LocalExecutor) -> int:
    """Every finished request's reply is that of an uncached instance; where one pass disagrees (a near tie), token by
    token decides."""
    compared = 0
    for request_id, ids in executor.tokens.items():
        if executor.record.requests.status[request_id] != RequestStatus.FINISHED:
            continue
        length, num = executor.members.prompt[request_id], executor.members.output[request_id]
        assert len(ids) == length + num
        if greedy(ids, length) != ids[length:]:
            assert ids[length:] == undisturbed(SPEC, executor.world.source, ids[:length], num)
        compared += num
    return compared


@pytest.mark.parametrize("design", DESIGNS)
def test_tokens_are_those_of_an_uncached_instance(design):
    seen = {"swapped_out": 0, "swapped_in": 0, "evicted": 0, "hits": 0, "tokens": 0}

    @settings(law(1), max_examples=NUM)
    @given(scenarios(losses=True, designs=(design,), max_turns=9, pressure=True))
    def check(scenario):
        workload, record, faults, messages = scenario.parts()
        model = scenario.model()
        engine = tiny_world(model, SPEC)
        executor = LocalExecutor(model, workload, record, world=engine, faults=faults, message_faults=messages)
        try:
            policy, _ = run(scenario, executor, record)
            for instance, live in engine.instances.items():
                for store in live.stores.values():
                    store.check()
                assert live.stores[Tier.HBM].used == executor.state.memory[instance].used
                assert live.stores[Tier.DRAM].used == executor.state.memory[instance].host_used
            seen["tokens"] += check_tokens(executor)
        finally:
            engine.close()
        for site in policy.sites.values():
            for key in ("swapped_out", "swapped_in", "evicted"):
                seen[key] += site.pool.counters[key]
        seen["hits"] += sum(flow.hit for flow in policy.flows.values())

    check()
    assert seen["tokens"], "no reply was compared"
    if DESIGNS[design].prefill_caches:
        assert seen["hits"] and seen["evicted"], "the draws exercise nothing"
