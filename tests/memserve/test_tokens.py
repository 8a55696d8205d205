"""Greedy tokens with real tensors: caching, disaggregation, any design and transfer mode, swaps and eviction under
pressure change nothing. Free cells hold NaN; the judge is a dense decoder that knows no paging (fp32, tiny model)."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import given, seed, settings

pytest.importorskip("torch")

from common.executors.local import LocalExecutor
from common.types import Tier
from systems.memserve.config import DESIGNS, MODES, Options
from systems.memserve.policy import MemServePolicy
from tests.engine.worlds import check_replies, tiny_spec, tiny_world
from tests.laws.strategies import law
from tests.memserve.lib import PLANNER, Scenario, Turn, run, scenarios

SPEC = tiny_spec(2)
NUM = 120 if os.environ.get("KVPLANE_NIGHTLY") else 48  # draws a design, 6 of them; some repeat a schedule
DISTINCT = 34  # schedules a design


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
    """Every design draws schedules of its own. What must happen in them is asked of `test_every_situation` alone:
    which draws there are changes with the library that draws them."""
    seen: Counter[str] = Counter()
    drawn = set()

    @seed(list(DESIGNS).index(design))
    @settings(law(1), max_examples=NUM)
    @given(scenarios(losses=True, designs=(design,), max_turns=9, pressure=True, layers=SPEC.num_layers))
    def check(scenario):
        found = judged(scenario)
        seen.update({key: value if key == "tokens" else value > 0 for key, value in found.items()})
        drawn.add((scenario.turns, scenario.document))

    check()
    print(design, "draws with:", {key: int(value) for key, value in sorted(seen.items()) if value})  # with `pytest -s`
    assert seen["draws"] >= NUM and seen["tokens"], "draws were left out"
    assert len(drawn) >= DISTINCT, "the same schedules again and again"
    assert seen["hits"] >= NUM // 2 or not DESIGNS[design].prefill_caches, "few prefixes are shared"


CASES = [(design, mode) for design in DESIGNS for mode in (MODES if DESIGNS[design].split else MODES[:1])]


@pytest.mark.parametrize(("design", "mode"), CASES)
def test_every_situation(design, mode):
    """Hits, swaps both ways, eviction, the transfer mode, D -> P and a death that leaves a role without an instance, in
    one schedule: three sessions about documents, in pools too small for them."""
    what = DESIGNS[design]
    turns = tuple(Turn(place % 3, 10, 17, 16) for place in range(9))
    options = Options(design=design, roles="1P1D" if what.split else None, transfer=mode, policy="session",
                      swap_low=0.5, swap_high=0.9, heartbeat_s=0.0005, timeout_s=0.0015, planner=PLANNER)  # fmt: skip
    seen = judged(Scenario(turns, (48, 48, 50), options, 2, 12, 4, losses=((48, 0),), layers=SPEC.num_layers))
    wanted = ["hits", "evicted", "swapped_out", "swapped_in"] if what.prefill_caches else []
    wanted += ["makeshift", f"sent {mode}"] if what.split else []
    wanted += ["sent back"] if what.back else []
    assert not (missing := [key for key in ("deaths", *wanted) if not seen[key]]), f"not met: {', '.join(missing)}"
    assert seen["tokens"] == 9 * 16


@pytest.mark.parametrize("design", [design for design in DESIGNS if DESIGNS[design].prefill_caches])
def test_false_hits_change_no_token(design):
    """The instances forget at once, the scheduler's trees never do: every second turn is sent after a prefix that is
    gone, and says what it would have said."""
    turns = tuple(Turn(place % 2, 30, 20, 17) for place in range(6))
    options = Options(design=design, planner=PLANNER, swap=False, local_ttl_s=0.0001, tree_ttl_s=10.0,
                      heartbeat_s=0.0005)  # fmt: skip
    seen = judged(Scenario(turns, (48, 48), options, 2, 60, 0, layers=SPEC.num_layers))
    assert seen["false hits"] and seen["tokens"] == 6 * 17


def test_enough_schedules_are_drawn():
    """200 multi-turn schedules with shared prefixes, whatever the designs' number becomes."""
    assert DISTINCT * len(DESIGNS) >= 200
