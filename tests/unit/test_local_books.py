"""Cells follow the books: what a request reads by name stays its own while what it owns changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from common.engine.cells import CellStore
from common.executors.localbooks import LocalBooks
from common.executors.memory import Held
from common.types import Tier

LAYERS = 4


def test_a_request_whose_blocks_all_change_keeps_what_it_shares():
    store = CellStore(64, LAYERS)
    state = SimpleNamespace(dirty={}, held={}, block_size=16)
    engine = SimpleNamespace(stores={Tier.HBM: store})
    executor = SimpleNamespace(local_state=state, world=SimpleNamespace(instances={0: engine}),
                               cluster=SimpleNamespace(instances={0: SimpleNamespace(num_layers=LAYERS)}))  # fmt: skip
    books = LocalBooks(executor)

    def own(request_id, start, end):
        state.held[request_id] = (Held(0, Tier.HBM, (0, LAYERS), start, end),)
        state.dirty[request_id] = None
        books.settle()

    own(0, 0, 16)
    store.name(0, 0, b"a", owned=False)
    store.named.acquire([b"a"])
    store.read(1, 0, b"a")
    store.of(1).lease.append(b"a")
    own(1, 16, 32)
    own(1, 32, 48)
    assert store.of(1).lease == [b"a"] and store.named.blocks[b"a"].pins == 1
    assert (store.of(1).table[:, 0] == store.named.blocks[b"a"].cells).all()
