"""An instance that has been idle: its first iteration takes longer, and no other."""

from __future__ import annotations

import pytest

from common.cost.engine import engine_traits
from common.cost.model import InstanceCost
from common.cost.specs import load_hardware
from tests.laws.lawlib import GRID, Request, Scenario

FAR = 10_000  # grid units: longer than any request takes


def first_token(gaps: tuple[int, ...], wake: int | None) -> list[int]:
    """Nanoseconds from arrival to first token, of equal requests on one instance."""
    requests = tuple(Request(gap, 8, 5) for gap in gaps)
    columns = Scenario(requests, blocks=64, wake=wake).run().record.requests
    return [first - came for first, came in zip(columns.first_token_ns, columns.arrival_ns)]


def test_a_request_that_comes_to_an_idle_instance_waits_longer() -> None:
    plain, waking = first_token((FAR, FAR), None), first_token((FAR, FAR), 100)
    assert waking == [2 * time for time in plain]
    assert first_token((FAR, FAR), 2 * FAR)[1] == plain[1], "not idle for long enough"


def test_the_tokens_after_it_do_not() -> None:
    def reply_ns(wake: int | None) -> int:
        columns = Scenario((Request(FAR, 8, 5),), blocks=64, wake=wake).run().record.requests
        return columns.finish_ns[0] - columns.first_token_ns[0]

    assert reply_ns(100) == reply_ns(None) >= 4 * GRID


def test_a_profile_says_how_much() -> None:
    values = {"name": "mine", "memory_bytes": 1 << 34, "peak_flops": 1e12, "mem_bandwidth": 1e11,
              "nvlink_bandwidth": 1e9, "nvlink_latency_ns": 1, "pcie_bandwidth": 1e9, "pcie_latency_ns": 1,
              "nic_bandwidth": 1e9, "nic_latency_ns": 1, "host_memory_bytes": 1, "disk_bandwidth": 1e9,
              "grid": "cpu", "host_ns": 1000, "host_per_seq_ns": 10}  # fmt: skip
    without = engine_traits("profile", load_hardware(values))
    assert (without.host_per_chunk_ns, without.wake_share, without.wake_after_ns) == (0, 0.0, 0)
    more = load_hardware({**values, "host_per_chunk_ns": 7, "wake_share": 0.5, "wake_after_ns": 9})
    traits = engine_traits("profile", more)
    assert (traits.host_per_chunk_ns, traits.wake_share, traits.wake_after_ns) == (7, 0.5, 9)


@pytest.mark.parametrize("chunks", [1, 3])
def test_each_piece_of_a_prompt_has_its_host_time(chunks: int) -> None:
    from dataclasses import replace

    from common.config import compose

    config = compose(["model=llama3-8b", "hardware=a100-80g", "cost.traits=vllm-sync"])
    more = replace(config.traits, host_per_chunk_ns=1234)
    work = [(64, 0)] * chunks
    plain, with_it = (InstanceCost(config.model, config.hardware, engine=traits).iteration_ns(work, 2, 100, chunks)
                      for traits in (config.traits, more))  # fmt: skip
    assert with_it - plain == 1234 * chunks
