"""Infinite-LLM: a prompt larger than its instance, and KV that moves while queries travel.

The rManager of the debtor reserves by messages before it sends. Chunks are computed at home and stream to creditors
layer by layer; later chunks attend to them there. In mid-decode a piece moves at a pace, and ownership switches at a
boundary after its arrival, to a placement whose open span is on the creditor. A creditor that is full refuses.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.types import CopyDone, CopySpan, Entry, FreeSpan, MessageArrived, RunStep, Span, Stage, Status
from tests.contract.runtimes import Outcome
from tests.contract.script import Script, Story, World
from tests.fakes import FakeWorkload

ALL = (0, 4)


class InfiniteLLM(Script):
    """Request 0 (480 tokens) lives on instance 0 with room for 384; 1 and 2 run on its creditors, instances 1 and 2."""

    world = World(instances=3, blocks=24)
    workload = FakeWorkload([0, 0, 0], [480, 40, 195], [120, 70, 45])

    def agents(self) -> Iterable[Story]:
        return [self.debtor(), self.creditor("rm1", 1, 12), self.creditor("rm2", 2, 16)]

    def creditor(self, name: str, instance: int, blocks: int) -> Story:
        """Runs a request of its own and lends `blocks`: first come, first served."""
        yield self.arrived(instance)
        prompt = self.workload.prompt_tokens[instance]
        self.change(instance, stages=(Stage(instance, ALL),), add=(Entry(instance, 0, prompt, keep=True),))
        while (asked := (yield self.message(name))).payload:
            granted = asked.payload <= blocks
            blocks -= asked.payload if granted else 0
            self.tell(name, asked.sender, granted)
        yield self.finished(instance)
        self.do(FreeSpan(instance, instance))  # its own reply was kept until the debtor had gone

    def debtor(self) -> Story:
        yield self.arrived(0)
        lent: tuple[Span, ...] = ()
        for start, end, creditor in ((0, 128, 1), (128, 256, 2)):
            self.tell("rm0", f"rm{creditor}", (end - start) // 16)
            assert (yield self.message("rm0")).payload, "granted"
            chunk = Entry(0, start, end, sample=False, placement=(*lent, Span(0, ALL, start, None)))
            self.change(0, add=(chunk,), stages=(Stage(0, ALL),))
            copied = self.ask(CopySpan, 0, 0, creditor, ALL, (start, end), after=self.step(0), by_layer=True)
            yield self.reached(0)
            yield copied
            self.do(FreeSpan(0, 0, tokens=(start, end)))
            lent = (*lent, Span(creditor, ALL, start, end))
        self.change(0, add=(Entry(0, 256, 480, placement=(*lent, Span(0, ALL, 256, None))),))
        yield self.change(0)
        yield self.reached(0)
        self.mark("decoding over three instances")

        self.tell("rm0", "rm1", 16)
        assert (yield self.message("rm0")).payload is False, "rm1 lends no more than twelve blocks"
        self.tell("rm0", "rm2", 4)  # its ledger is stale: it does not know what its own request has grown to
        assert (yield self.message("rm0")).payload
        refused = yield self.ask(CopySpan, 0, 0, 2, ALL, (256, 320))
        assert refused.status is Status.FAILED
        self.mark("refused")

        self.tell("rm0", "rm1", 4)
        assert (yield self.message("rm0")).payload
        moved = yield self.ask(CopySpan, 0, 0, 1, ALL, (256, 320), pace=16)
        assert moved.status is Status.OK
        lent = (*lent, Span(1, ALL, 256, 320))
        yield self.change(0, place=((0, (*lent, Span(0, ALL, 320, 544), Span(1, ALL, 544, None))),))
        self.mark("switched")
        yield self.finished(0)
        for name in ("rm1", "rm2"):
            self.tell("rm0", name, 0)


WALK = InfiniteLLM


def check(outcome: Outcome) -> None:
    """Whatever the clock: this happened, in this order."""
    assert outcome.marks() == ["decoding over three instances", "refused", "switched"]
    statuses = [event.status for _, event in outcome.events(CopyDone)]
    assert statuses == [Status.OK, Status.OK, Status.FAILED, Status.OK]
    assert len(outcome.events(MessageArrived)) == 12
    moves = outcome.record.moves
    assert sum(moves.num_bytes) == (128 + 128 + 64) * 4 * 256, "nothing of the refused copy crossed a link"
    places = [item for _, item in outcome.events(RunStep) if item.place]
    assert len(places) == 1 and places[0].place[0][1][-1] == Span(1, ALL, 544, None)
    switched = outcome.record.marks[2][0]
    segments = outcome.record.segments
    home = [row for row in range(len(segments.lane)) if segments.lane[row] == 0 and segments.decodes[row]]
    before = sum(segments.iterations[row] for row in home if segments.end_ns[row] <= switched)
    after = sum(segments.iterations[row] for row in home if segments.end_ns[row] > switched)
    assert 0 < before < 64 and after > 64 - before, "it went on into the open span on the creditor"
