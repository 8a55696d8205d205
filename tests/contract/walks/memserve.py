"""MemServe (PD-Caching-3): prefill on P, decode on D, what is computed is kept at both ends and found by content.

KV follows P's prefill layer by layer; D decodes once it is there; P's blocks stay as cached ones. At the end D's reply
goes back to P. Between the turns P's cache is swapped out to DRAM, and in again before the second turn's prefill, which
computes and sends only what is new. A third request shows a parked prompt swapped under its own name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from common.types import CopyDone, CopySpan, Entry, FreeSpan, Stage, Status, SwapDone, SwapSpan
from tests.contract.runtimes import Outcome
from tests.contract.script import Script, Story, World
from tests.fakes import FakeWorkload

US = 1_000
P, D, ALL = 0, 1, (0, 4)
FIRST = (("doc", 0, 96),)
SECOND = (*FIRST, ("gen:0", 0, 33), ("more", 0, 47))


class MemServe(Script):
    """Request 1 is the second turn of request 0; 2 stands alone. 96 + 32 stored tokens are eight blocks."""

    world = World(instances=2, blocks=32, host_blocks=16)
    workload = FakeWorkload(
        [0, 0, 0], [96, 176, 60], [33, 20, 30], [FIRST, SECOND, (("solo", 0, 60),)],
        session=[0, 0, 1], release_after=[-1, 0, -1], think_ns=[0, 900 * US, 0],
    )  # fmt: skip
    cached_blocks: ClassVar[dict[int, int]] = {P: 11}

    def agents(self) -> Iterable[Story]:
        return [self.session(), self.parked()]

    def prefill(self, request: int, shared: int, target: int) -> Story:
        """On P, with its KV following layer by layer to D, which decodes it; P's full blocks become cached."""
        self.change(0, add=(Entry(request, shared, target, shared=shared, leave=True),), stages=(Stage(P, ALL),))
        step = self.step(0)
        copied = self.ask(CopySpan, request, P, D, ALL, (shared, target), after=step, by_layer=True, num_calls=8)
        yield self.reached(request)
        event = yield copied
        assert event.status is Status.OK
        self.do(FreeSpan(P, request, retain=target // 16 - shared // 16))
        self.mark(f"insert {request}", P)
        entry = Entry(request, target, target + 1, shared=shared, decode=True, keep=True)
        self.change(1, add=(entry,), stages=(Stage(D, ALL),))

    def session(self) -> Story:
        yield self.arrived(0)
        yield from self.prefill(0, 0, 96)
        yield self.finished(0)
        back = yield self.ask(CopySpan, 0, D, P, ALL, (96, 128))
        assert back.status is Status.OK
        self.do(FreeSpan(P, 0, tokens=(96, 128), retain=2))
        self.do(FreeSpan(D, 0, retain=8))
        self.mark("back", P)
        yield self.ask(SwapSpan, 0, P, ALL, (0, 128), True, content=SECOND)
        self.mark("out", P)
        yield self.arrived(1)
        yield self.ask(SwapSpan, 1, P, ALL, (0, 128), False, content=SECOND)
        self.mark("in", P)
        yield from self.prefill(1, 128, 176)
        yield self.finished(1)
        self.do(FreeSpan(D, 1))
        self.do(FreeSpan(D, None, cached_blocks=4, tokens=(64, 128), content=SECOND))  # by name
        self.do(FreeSpan(D, None, cached_blocks=4))  # the next in order

    def parked(self) -> Story:
        yield self.arrived(2)
        yield self.change(2, add=(Entry(2, 0, 60, leave=True),), stages=(Stage(D, ALL),))
        yield self.reached(2)
        out = yield self.ask(SwapSpan, 2, D, ALL, (0, 60), True)
        back = yield self.ask(SwapSpan, 2, D, ALL, (0, 60), False)
        assert out.status is back.status is Status.OK
        self.change(2, add=(self.again(2),))
        yield self.finished(2)


WALK = MemServe


def check(outcome: Outcome) -> None:
    """Whatever the clock: this happened, in this order."""
    assert outcome.marks() == ["insert 0", "back", "out", "in", "insert 1"]
    assert [event.num_bytes // 1024 for _, event in outcome.events(CopyDone)] == [96, 32, 48], "increments only"
    assert [event.status for _, event in outcome.events(SwapDone)] == [Status.OK] * 4
    requests, moves, segments = outcome.record.requests, outcome.record.moves, outcome.record.segments
    assert list(requests.cached_tokens) == [0, 128, 0]
    swapped_in = next(time for time, _, kind, _ in outcome.record.marks if kind == "in")
    second = [row for row in range(len(segments.lane)) if segments.prefill_tokens[row] == 48]
    assert len(second) == 1 and segments.start_ns[second[0]] >= swapped_in
    first = next(row for row in range(len(segments.lane)) if segments.prefill_tokens[row] == 96)
    copy = moves.kind.index("copy")
    assert moves.start_ns[copy] < segments.end_ns[first] <= moves.end_ns[copy]
    decode = min(segments.start_ns[row] for row in range(len(segments.lane)) if segments.lane[row] == 1)
    assert decode >= moves.end_ns[copy], "nothing decodes before its KV is there"
