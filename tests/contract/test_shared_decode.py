"""A decode that owns nothing yet: its whole prompt is cached where it joins, and its first token opens a block."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from common.types import Entry, FreeSpan, Stage
from tests.contract.runtimes import RUNTIMES
from tests.contract.script import Script, Story, World
from tests.fakes import FakeWorkload

DOC = (("doc", 0, 32),)


class SharedDecode(Script):
    """Request 0 leaves its prompt cached on instance 1; request 1, prefilled on instance 0, decodes there from it."""

    world = World(instances=2, blocks=16)
    workload = FakeWorkload([0, 0], [32, 32], [4, 20], [DOC, DOC])

    def agents(self) -> Iterable[Story]:
        return [self.both()]

    def both(self) -> Story:
        yield self.arrived(0)
        yield self.arrived(1)
        self.change(1, add=(Entry(0, 0, 32, keep=True),), stages=(Stage(1, (0, 4)),))
        yield self.finished(0)
        self.do(FreeSpan(1, 0, tokens=(0, 32), retain=2))
        self.do(FreeSpan(1, 0))
        self.change(0, add=(Entry(1, 0, 32, leave=True),), stages=(Stage(0, (0, 4)),))
        yield self.reached(1)
        self.do(FreeSpan(0, 1))
        self.change(1, add=(Entry(1, 32, 33, shared=32, decode=True),))
        yield self.finished(1)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("leap", [None, 1])
def test_decode_from_cached_blocks_alone(runtime, leap):
    outcome = RUNTIMES[runtime](SharedDecode, leap)
    assert list(outcome.record.requests.output_tokens) == [4, 20]
    assert outcome.cached == {0: 0, 1: 8} and outcome.used == outcome.cached
