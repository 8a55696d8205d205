"""Greedy tokens with real tensors: caching, disaggregation, any design and transfer mode, swaps and eviction under
pressure change nothing. Free cells hold NaN; the judge is a dense decoder that knows no paging (fp32, tiny model)."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings

pytest.importorskip("torch")

from common.executors.local import LocalExecutor
from common.types import Tier
from systems.memserve.config import DESIGNS
from tests.engine.worlds import check_tokens, tiny_spec, tiny_world
from tests.memserve.lib import run, scenarios

SPEC = tiny_spec(4)
NUM = 34 if os.environ.get("KVPLANE_NIGHTLY") else 8  # a design: 6 of them


@pytest.mark.parametrize("design", DESIGNS)
def test_tokens_are_those_of_an_uncached_instance(design):
    seen = {"swapped_out": 0, "swapped_in": 0, "evicted": 0, "hits": 0}

    @settings(max_examples=NUM, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
            check_tokens(executor)
        finally:
            engine.close()
        for site in policy.sites.values():
            for key in ("swapped_out", "swapped_in", "evicted"):
                seen[key] += site.pool.counters[key]
        seen["hits"] += sum(flow.hit for flow in policy.flows.values())

    check()
    if DESIGNS[design].prefill_caches:
        assert seen["hits"] and seen["evicted"], "the draws exercise nothing"
