"""KunServe: a burst. Two full copies become one pipeline with twice the room, and two copies again.

Park what runs, drop the first half of the layers here and the second there, cut the new prompt over two micro-batches,
exchange KV bands pair by pair while that prompt runs, serve in two lanes over two stages, restore from the peer while
serving; what is old finishes in the pipeline, what is new runs at home.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.types import (
    CopyDone,
    CopySpan,
    DropLayers,
    Entry,
    FreeSpan,
    LayersDropped,
    LayersLoaded,
    LoadLayers,
    ShrinkDone,
    ShrinkKV,
    Stage,
    Status,
)
from tests.contract.runtimes import Outcome
from tests.contract.script import Script, Story, World
from tests.fakes import FakeWorkload

US = 1_000
LOW, HIGH, WHOLE = (0, 2), (2, 4), (0, 4)


class KunServe(Script):
    """Requests 0-3 run on two instances; 4 fits on neither; 5 comes after the restore."""

    world = World(instances=2, blocks=32)
    workload = FakeWorkload(
        [0, 0, 0, 0, 1500 * US, 5000 * US], [150, 140, 150, 130, 224, 60], [60, 60, 110, 110, 90, 18]
    )

    def agents(self) -> Iterable[Story]:
        return [self.story()]

    def story(self) -> Story:
        blocks = self.world.blocks
        yield self.arrived(0, 1, 2, 3)
        self.change(0, stages=(Stage(0, WHOLE),), add=(Entry(0, 0, 150), Entry(1, 0, 140)))
        self.change(1, stages=(Stage(1, WHOLE),), add=(Entry(2, 0, 150), Entry(3, 0, 130)))
        yield self.arrived(4)

        self.mark("overload")
        yield self.both(self.change(0, park=(0, 1)), self.change(1, park=(2, 3)))
        for dropped in (yield self.both(self.ask(DropLayers, 0, HIGH), self.ask(DropLayers, 1, LOW))):
            assert dropped.kv_cells > 4 * blocks, "two groups of P blocks of half the layers, and E more"
        self.mark("dropped")

        pipe = (Stage(0, LOW), Stage(1, HIGH))
        self.change(2, stages=pipe, add=(Entry(4, 0, 112, sample=False),))
        self.change(3, stages=pipe, add=(Entry(4, 112, 224, behind=2),))
        for here, there in ((0, 2), (1, 3)):
            yield self.both(
                self.ask(CopySpan, here, 0, 1, HIGH, (0, self.tokens[here]), piece_bytes=8192, num_calls=4),
                self.ask(CopySpan, there, 1, 0, LOW, (0, self.tokens[there]), piece_bytes=8192, num_calls=4),
            )
            self.do(FreeSpan(0, here, HIGH))
            self.do(FreeSpan(1, there, LOW))
            self.change(2, add=(self.again(here),))
            self.change(3, add=(self.again(there),))
        self.mark("exchanged")

        yield self.finished(0, 1)
        yield self.both(self.ask(ShrinkKV, 0, 4 * blocks), self.ask(ShrinkKV, 1, 4 * blocks))
        yield self.both(self.ask(LoadLayers, 0, HIGH, 1), self.ask(LoadLayers, 1, LOW, 0, piece_bytes=8192))
        self.mark("restored")
        yield self.arrived(5)
        self.change(4, stages=(Stage(0, WHOLE),), add=(Entry(5, 0, 60),))
        yield self.finished(2, 3, 4, 5)


WALK = KunServe


def check(outcome: Outcome) -> None:
    """Whatever the clock: this happened, in this order."""
    assert outcome.marks() == ["overload", "dropped", "exchanged", "restored"]
    for kind, count in ((LayersDropped, 2), (CopyDone, 4), (ShrinkDone, 2), (LayersLoaded, 2)):
        answers = outcome.events(kind)
        assert [event.status for _, event in answers] == [Status.OK] * count
    segments, moves = outcome.record.segments, outcome.record.moves
    restored = outcome.record.marks[3][0]
    loading = moves.start_ns[moves.kind.index("load")]
    pipeline = [row for row in range(len(segments.lane)) if segments.lane[row] in (2, 3)]
    assert any(loading < segments.end_ns[row] and segments.start_ns[row] < restored for row in pipeline), "overlapped"
    new = segments.start_ns[segments.lane.index(4)]
    assert restored < new < max(segments.end_ns[row] for row in pipeline), "old ones finish in the pipeline"
    # The second chunk entered the pipeline before the first had left it.
    prefills = {segments.lane[row]: row for row in range(len(segments.lane)) if segments.prefill_tokens[row] == 112}
    assert segments.start_ns[prefills[3]] < segments.end_ns[prefills[2]] < segments.end_ns[prefills[3]]
