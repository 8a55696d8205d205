"""Greedy tokens with real tensors: caching, disaggregation, any design and transfer mode, swaps and eviction under
pressure change nothing. Free cells hold NaN; the judge is a dense decoder that knows no paging (fp32, tiny model)."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import given, settings

pytest.importorskip("torch")

from common.executors.local import LocalExecutor
from common.types import Tier
from systems.memserve.config import DESIGNS, MODES, Options
from systems.memserve.policy import MemServePolicy
from tests.engine.worlds import check_replies, tiny_spec, tiny_world
from tests.laws.strategies import law
from tests.memserve.lib import PLANNER, Scenario, Turn, run, scenarios

SPEC = tiny_spec(2)
NUM = 120 if os.environ.get("KVPLANE_NIGHTLY") else 34  # a design: 6 of them


def judged(scenario: Scenario) -> Counter[str]:
    """Run it with real tensors and judge every token; what it made happen."""
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
        makeshift = sum(kind == "makeshift" for _, _, kind, _ in record.marks)
        return census(scenario, policy) + Counter(draws=1, tokens=check_replies(executor), makeshift=makeshift)
    finally:
        engine.close()


def census(scenario: Scenario, policy: MemServePolicy) -> Counter[str]:
    """What a draw made happen."""
    pools, flows = [site.pool.counters for site in policy.sites.values()], list(policy.flows.values())
    seen = Counter({key: sum(pool[key] for pool in pools) for key in ("swapped_out", "swapped_in", "evicted")})
    seen[f"sent {scenario.options.transfer}"] = sum(flow.sent_tokens for flow in flows)
    seen["sent back"] = sum(flow.back_tokens for flow in flows)
    seen["hits"] = sum(flow.hit for flow in flows)
    seen["false hits"] = sum(max(0, flow.expected - flow.hit) for flow in flows)
    seen["preemptions"] = sum(site.lane.num_preemptions for site in policy.sites.values())
    seen["deaths"] = policy.members.cm.declared
    return seen


@pytest.mark.parametrize("design", DESIGNS)
def test_tokens_are_those_of_an_uncached_instance(design):
    seen: Counter[str] = Counter()

    @settings(law(1), max_examples=NUM)
    @given(scenarios(losses=True, designs=(design,), max_turns=9, pressure=True, layers=SPEC.num_layers))
    def check(scenario):
        seen.update(judged(scenario))

    check()
    print(design, dict(sorted(seen.items())))  # with `pytest -s`
    wanted = ["tokens", "evicted", "hits", "swapped_out", "swapped_in"] if caches(design) else ["tokens"]
    wanted += ["deaths"]
    wanted += ["makeshift", *(f"sent {mode}" for mode in MODES)] if DESIGNS[design].split else []
    wanted += ["sent back"] if DESIGNS[design].back else []
    missing = [key for key in wanted if not seen[key]]
    assert not missing, f"no draw of {design} had: {', '.join(missing)}"
    assert seen["draws"] >= NUM, "draws were left out"


@pytest.mark.parametrize("design", [design for design in DESIGNS if DESIGNS[design].prefill_caches])
def test_false_hits_change_no_token(design):
    """The instances forget at once, the scheduler's trees never do: every second turn is sent after a prefix that is
    gone, and says what it would have said."""
    turns = tuple(Turn(place % 2, 30, 20, 17) for place in range(6))
    options = Options(design=design, planner=PLANNER, swap=False, local_ttl_s=0.0001, tree_ttl_s=10.0,
                      heartbeat_s=0.0005)  # fmt: skip
    seen = judged(Scenario(turns, (48, 48), options, 2, 60, 0, layers=SPEC.num_layers))
    assert seen["false hits"] and seen["tokens"] == 6 * 17


def caches(design: str) -> bool:
    """Is anything cached at all?"""
    return DESIGNS[design].prefill_caches


def test_enough_schedules_are_drawn():
    """200 multi-turn schedules with shared prefixes, whatever the designs' number becomes."""
    assert NUM * len(DESIGNS) >= 200
