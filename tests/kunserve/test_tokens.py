"""Greedy tokens of real tensors are those of an undisturbed run, whatever a request lives through; in both modes."""

from __future__ import annotations

import time
from collections import Counter

from hypothesis import given

from common.executors.local import LocalExecutor
from tests.engine.worlds import check_replies, tiny_world
from tests.kunserve.strategies import bursts, law
from tests.kunserve.worlds import Run

SCHEDULES = 200
SITUATIONS = (
    "starts after a drop", "straddles a drop", "straddles a restore", "lives through two merges",
    "loses a member mid-drop",
)  # fmt: skip


def test_every_reply_is_that_of_an_undisturbed_run():
    """The census counts schedules: in how many somebody met each situation, by mode."""
    census: Counter[tuple[str, str]] = Counter()
    began = time.process_time()

    @law(SCHEDULES, 5 * SCHEDULES)
    @given(bursts(small=True))
    def draws(burst):
        model = burst.model()
        world = tiny_world(model)
        run = Run(burst, LocalExecutor, model, world=world).drive()
        check_replies(run.executor)
        world.close()
        mode = dict(burst.options)["mode"]
        census["schedules", mode] += 1
        census.update((kind, mode) for kind, who in run.situations().items() if who)

    draws()
    both = Counter()
    for (kind, _), count in census.items():
        both[kind] += count
    lines = [f"{kind}: {both[kind]} (remote attention {census[kind, 'remote_attention']})"
             for kind in ("schedules", *SITUATIONS)]  # fmt: skip
    print(f"{time.process_time() - began:.0f} s of CPU", *lines, sep="; ")
    assert both["schedules"] >= SCHEDULES
    assert all(both[kind] >= 5 for kind in SITUATIONS), both
    assert all(census[kind, "pipeline"] for kind in SITUATIONS), census
    assert all(census[kind, "remote_attention"] for kind in SITUATIONS[:4]), census
