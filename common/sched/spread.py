"""KV that stays on the instances of an earlier route while its request runs on another: attention there, by partials.

A request's leading blocks lie where it ran before (a `Piece` per route that it has had since it left home), in every
layer on that route's instances; what it computes from now on is stored at the stages of the lane it is in. A piece's
blocks are charged to the ledger along its own route, and to no lane.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from common.sched.ledger import CellLedger
from common.types import Placement, Span, Stage


class Piece(NamedTuple):
    """So many blocks of a request's KV, at the stages of `route`."""

    route: tuple[Stage, ...]
    blocks: int


class SpreadTable:
    """Request -> its pieces, from the first token on."""

    def __init__(self, ledger: CellLedger, block_size: int) -> None:
        self.ledger = ledger
        self.block_size = block_size
        self.pieces: dict[int, tuple[Piece, ...]] = {}

    def blocks(self, request_id: int) -> int:
        """Blocks in pieces: charged to nobody's lane."""
        return sum([piece.blocks for piece in self.pieces.get(request_id, ())])

    def instances(self, request_id: int) -> set[int]:
        """Where its pieces are."""
        return {stage.instance for piece in self.pieces.get(request_id, ()) for stage in piece.route}

    def stays(self, request_id: int, route: tuple[Stage, ...], tokens: int) -> int:
        """What is held of `tokens` tokens along a route, behind the pieces that there are, stays there as one more
        piece (its charge, too). Returns the blocks that are in pieces now; the last one may be partly filled."""
        blocks = -(-tokens // self.block_size)
        more = blocks - self.blocks(request_id)
        if more > 0:
            self.pieces[request_id] = (*self.pieces.get(request_id, ()), Piece(route, more))
        return blocks

    def drop(self, request_id: int) -> int:
        """Its KV is gone everywhere: the charge is given back. Returns the blocks that were in pieces."""
        dropped = self.pieces.pop(request_id, ())
        for route, blocks in dropped:
            self.ledger.take(route, -blocks)
        return sum([piece.blocks for piece in dropped])

    def placement(self, request_id: int, stages: tuple[Stage, ...]) -> Placement:
        """For a lane over `stages`: the pieces, then open spans at the stages."""
        pieces = self.pieces.get(request_id, ())
        spans: list[Span] = []
        for stage in stages:
            low, high = stage.layers
            inside = {border for piece in pieces for part in piece.route for border in part.layers}
            for band in pairwise([low, *sorted(border for border in inside if low < border < high), high]):
                spans += self._column(pieces, stage.instance, band)
        return tuple(spans)

    def _column(self, pieces: tuple[Piece, ...], home: int, band: tuple[int, int]) -> list[Span]:
        """Spans of layers that no route cuts."""
        spans: list[Span] = []
        start = 0
        for route, blocks in pieces:
            at = next(stage.instance for stage in route if stage.layers[0] <= band[0] < stage.layers[1])
            end = start + blocks * self.block_size
            if spans and spans[-1].instance == at:
                spans[-1] = spans[-1]._replace(token_end=end)
            else:
                spans.append(Span(at, band, start, end))
            start = end
        if spans and spans[-1].instance == home:
            spans[-1] = spans[-1]._replace(token_end=None)
        else:
            spans.append(Span(home, band, start, None))
        return spans
