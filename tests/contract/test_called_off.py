"""KV that was shrunk for a load which does not come is given back and used, in the simulator and with real tensors."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from common.types import DropLayers, Entry, ShrinkKV, Stage, Status
from tests.contract.runtimes import RUNTIMES
from tests.contract.script import Script, Story, World
from tests.fakes import FakeWorkload

LOW, HIGH = (0, 2), (2, 4)
CELLS = 4 * 32


class CalledOff(Script):
    """Two halves of one pipeline make room for layers, and take it back."""

    world = World(instances=2, blocks=32)
    workload = FakeWorkload([0], [1100], [20])

    def agents(self) -> Iterable[Story]:
        return [self.story()]

    def story(self) -> Story:
        yield self.arrived(0)
        drops = yield self.both(self.ask(DropLayers, 0, HIGH), self.ask(DropLayers, 1, LOW))
        wide = min(dropped.kv_cells for dropped in drops)
        assert wide >= 2 * 70, "it needs more than there was"
        for cells in (CELLS, wide - 1, wide):
            for answer in (yield self.both(self.ask(ShrinkKV, 0, cells), self.ask(ShrinkKV, 1, cells))):
                assert answer.status is Status.OK
        self.change(0, stages=(Stage(0, LOW), Stage(1, HIGH)), add=(Entry(0, 0, 1100),))
        yield self.finished(0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_shrink_to_more_gives_pages_back(runtime):
    outcome = RUNTIMES[runtime](CalledOff, None)
    assert outcome.used == {0: 0, 1: 0} and list(outcome.record.requests.output_tokens) == [20]
