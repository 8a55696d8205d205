"""Greedy tokens of real tensors are those of an undisturbed run, whatever a request lives through."""

from __future__ import annotations

from collections import Counter

from hypothesis import given

from common.executors.local import LocalExecutor
from tests.engine.worlds import check_tokens, tiny_world
from tests.kunserve.strategies import bursts, law
from tests.kunserve.worlds import Run

SITUATIONS = (
    "starts after a drop", "straddles a drop", "straddles a restore", "lives through two merges",
    "loses a member mid-drop",
)  # fmt: skip


def test_every_reply_is_that_of_an_undisturbed_run():
    met: Counter[str] = Counter()

    @law(48, 240)
    @given(bursts(small=True))
    def draws(burst):
        model = burst.model()
        world = tiny_world(model)
        run = Run(burst, LocalExecutor, model, world=world).drive()
        check_tokens(run.executor)
        world.close()
        met.update(run.situations())

    draws()
    print(dict(met))
    assert all(met[kind] for kind in SITUATIONS), met
