"""The law at the end of a run: every block is free but for cached ones, and what is not says where it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ContractError
from common.executors.memory import Held
from common.executors.simstate import SimState
from common.record import RequestColumns, RunRecord
from common.types import Tier
from tests.fakes import cluster


def state() -> SimState:
    return SimState(cluster(3, 64), RunRecord(RequestColumns.empty(1)))


@given(st.integers(0, 2), st.integers(0, 40), st.integers(0, 3), st.booleans())
def test_only_cached_cells_may_stay(instance: int, cached: int, leaked: int, host: bool) -> None:
    world = state()
    memory = world.memory[instance]
    if host:
        memory.host_used, memory.host_cached = cached + leaked, cached
    else:
        memory.used, memory.cached = cached + leaked, cached
    if not leaked:
        world.check_empty()
        return
    with pytest.raises(ContractError, match=f"instance {instance}: .*{leaked} (KV cells|in DRAM).*have leaked"):
        world.check_empty()


def test_kv_held_under_a_name_is_named() -> None:
    world = state()
    world.hold(0, Held(1, Tier.HBM, (0, 2), 0, 16))
    with pytest.raises(ContractError, match=r"instance 1: .*held under requests \[0\]"):
        world.check_empty()
