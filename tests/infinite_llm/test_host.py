"""v1's CPU rBlocks: the last resort, conservation by tier, leases and losses, and exact tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, ContractError
from common.types import CopyDone, CopySpan, RequestStatus, Span, Status, Tier
from systems.infinite_llm.hostpool import HOST, HostPool, where
from systems.infinite_llm.settings import from_options
from tests.infinite_llm.test_debt import assert_capped
from tests.infinite_llm.test_failures import assert_attended_once
from tests.infinite_llm.test_laws import LAW, assert_all_ended
from tests.infinite_llm.test_local import QUICK, run_local
from tests.infinite_llm.worlds import FAST, Run, World, worlds

DEBT = replace(FAST, mode="debt", lend_cap=1.0, cpu_share=1.0)
FULL = ((0, 150, 90), (100, 200, 60), (200, 180, 80))  # on one instance of 24 blocks: nobody else has a GPU to lend


def in_host(run: Run) -> int:
    """Most blocks that one placement had in host memory."""
    best = 0
    for *_, commands in run.trace:
        for command in commands:
            places = [place for _, place in getattr(command, "place", ())]
            places += [entry.placement for entry in getattr(command, "add", ()) if entry.placement]
            for span in (span for place in places for span in place if isinstance(span, Span)):
                if span.tier is Tier.DRAM:
                    best = max(best, (span.token_end - span.token_start) // 16)
    return best


@LAW
@given(worlds(debt=True))
def test_conservation_by_tier_and_nobody_waits_for_ever(world: World) -> None:
    """Checked after every event: free + lent = all in host memory, used there only what is lent, lent = borrowed."""
    run = world.start()
    run.drive(lambda now, event: assert_attended_once(run))
    assert_all_ended(run)


@LAW
@given(worlds(debt=True, faults=False, losses=False))
def test_lent_is_borrowed_in_both_tiers(world: World) -> None:
    run = world.start()
    run.drive(lambda now, event: assert_capped(run))
    assert_all_ended(run)
    for manager in run.policy.managers.values():
        assert run.flying or manager.host is None or manager.host.lent.total == 0


def test_a_lonely_instance_borrows_from_its_own_host_before_it_preempts() -> None:
    alone = World(1, 24, FULL, replace(DEBT, low_share=0.2, pace=64), budget=512, host_blocks=64)
    run, without = alone.run(), replace(alone, settings=replace(alone.settings, cpu_share=0.0)).run()
    assert_all_ended(run)
    assert in_host(run) > 0 and in_host(without) == 0
    assert sum(run.record.requests.num_preemptions) < sum(without.record.requests.num_preemptions)
    copies = [c for *_, commands in run.trace for c in commands if isinstance(c, CopySpan)]
    assert copies and all(c.src == c.dst == 0 and c.dst_tier is Tier.DRAM for c in copies)


def test_a_giant_larger_than_all_gpus_lies_in_host_memory_as_well() -> None:
    world = World(2, 16, ((0, 40 * 16, 20),), DEBT, budget=512, host_blocks=16)
    run = world.run()
    assert_all_ended(run)
    assert run.record.requests.status[0] == RequestStatus.FINISHED and in_host(run) > 0
    refused = replace(world, host_blocks=0).run()
    assert refused.record.requests.status[0] == RequestStatus.REJECTED


def test_gpus_lend_before_hosts_and_the_own_host_before_others() -> None:
    """While a GPU has room nothing goes to host memory; then the debtor's own comes first."""
    roomy = World(3, 40, ((0, 500, 200), (10, 30, 10)), replace(DEBT, low_share=0.2, pace=64), budget=512,
                  host_blocks=64).run()  # fmt: skip
    assert in_host(roomy) == 0
    assert any(isinstance(c, CopySpan) and c.dst_tier is Tier.HBM for *_, commands in roomy.trace for c in commands)
    full = World(2, 24, (*FULL, *FULL), replace(DEBT, low_share=0.2, pace=64), budget=512, host_blocks=64).run()
    assert_all_ended(full)
    first = next(c for *_, commands in full.trace for c in commands if isinstance(c, CopySpan)
                 and c.dst_tier is Tier.DRAM)  # fmt: skip
    assert first.src == first.dst


def test_a_dead_creditors_host_memory_is_gone_with_it() -> None:
    """A giant lies in the other's host memory; that instance dies; the giant is computed anew or refused, and ends."""
    world = World(3, 12, ((0, 40 * 16, 60),), DEBT, budget=512, host_blocks=24)
    assert world.run().record.requests.status[0] == RequestStatus.FINISHED
    run = replace(world, lost_instances=((12_000, 1),)).run()
    assert_all_ended(run)
    assert run.record.requests.status[0] == RequestStatus.FINISHED


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 3), st.integers(0, 60), st.booleans())
def test_tokens_with_kv_in_host_memory(instances: int, more: int, giant: bool) -> None:
    """Real tensors: borrowed in mid-decode, or written there by the prefill, the tokens are an undisturbed run's."""
    prompt = (12 * instances + 4) * 16 + more if giant else 150 + more // 2
    chosen = replace(QUICK, mode="debt", lend_cap=1.0, cpu_share=1.0, pace=64)
    world = World(instances, 12, ((0, prompt, 24), (10, 40, 30)), chosen, budget=256, host_blocks=24)
    run = run_local(world)
    assert list(run.record.requests.status) == [RequestStatus.FINISHED] * 2
    if giant:
        assert in_host(run) > 0


def test_mid_decode_moves_to_host_memory_arrive_with_real_tensors() -> None:
    world = World(1, 12, ((0, 100, 110),), replace(QUICK, mode="debt", cpu_share=1.0, pace=64), host_blocks=24)
    run = run_local(world)
    copies = [event for _, event, _ in run.trace if isinstance(event, CopyDone) and event.status is Status.OK]
    assert copies and run.record.requests.num_preemptions[0] == 0 and in_host(run) > 0
    assert run.record.requests.status[0] == RequestStatus.FINISHED, "longer than its GPU holds"


def test_a_host_pool_is_an_account() -> None:
    pool = HostPool(10)
    pool.lend(7)
    assert (pool.free, pool.lent) == (3, 7) and where(HOST + 4) == (4, Tier.DRAM) and where(4) == (4, Tier.HBM)
    with pytest.raises(ContractError, match="lends 4 of 3 blocks"):
        pool.lend(4)
    with pytest.raises(ConfigError, match=r"system\.cpu_share=2: give a number from 0 to 1"):
        from_options({"mode": "debt", "cpu_share": 2})
