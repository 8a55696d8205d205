"""The queue of a pipeline, cut into micro-batches by `lookahead`; lanes take them in turn, at their boundaries.

Stages serve in order of arrival, so no lane overtakes another: a round of all lanes takes as long as the fullest one
needs for all its stages. So (ours) what is queued is halved until every lane of the pipeline can have a part, not less
than MIN tokens; the paper halves down to MIN tokens however many lanes there are (`lanes=None`).

A request stays in the queue until its last part is taken; `computed` says how far its parts have been taken. Stages
serve in order of arrival, so the next part may follow while the one before is still computed in another lane.
"""

from __future__ import annotations

from collections import deque

from common.sched.lane import Seq
from common.sched.shared import Part
from systems.kunserve.lookahead import Chunk, Costs, micro_batches

WINDOW = 64  # requests looked at together


class LookaheadFeeder:
    """See the module docstring. `min_tokens`: micro-batches are cut no smaller than half of it. `lanes`: how many
    take them in turn; None cuts by `min_tokens` alone."""

    def __init__(self, waiting: deque[Seq], costs: Costs, min_tokens: int, block: int, lanes: int | None) -> None:
        self.waiting = waiting
        self.costs = costs
        self.min_tokens = min_tokens
        self.block = block
        self.lanes = lanes
        self.front: dict[int, int] = {}  # request -> lane that computes its last part taken
        self._plan: deque[list[Chunk]] = deque()
        self._seqs: dict[int, Seq] = {}

    def next_batch(self, lane: int, room: int) -> list[Part]:
        """The next micro-batch, or nothing where not even a block has room."""
        if not self._plan or sum(one.tokens for one in self._plan[0]) > room:
            self._cut(room)
        if not self._plan:
            return []
        seqs, front = self._seqs, self.front
        return [Part(seqs[one.request_id], one.start, one.tokens, front.get(one.request_id))
                for one in self._plan.popleft()]  # fmt: skip

    def _cut(self, room: int) -> None:
        """All queued tokens in one batch, and halve."""
        self._plan.clear()
        if room < self.block:
            return
        window = [seq for seq, _ in zip(self.waiting, range(WINDOW))]
        self._seqs = {seq.request_id: seq for seq in window}
        batch = [Chunk(seq.request_id, seq.computed, seq.known - seq.computed) for seq in window]
        share = 0 if self.lanes is None else -(-sum(one.tokens for one in batch) // self.lanes)
        self._plan.extend(micro_batches(self.costs, batch, min(max(self.min_tokens, share), room), self.block))
        if self._plan and sum(one.tokens for one in self._plan[0]) > room:
            self._plan.clear()

    def sent(self, lane: int, part: Part) -> None:
        """A part was taken: the queue holds what is left of its request."""
        seq = part.seq
        if part.start + part.tokens == seq.known:
            self.waiting.remove(seq)
            self.front.pop(seq.request_id, None)
            self._seqs.pop(seq.request_id, None)
        else:
            seq.computed = part.start + part.tokens
            self.front[seq.request_id] = lane

    def stop(self) -> None:
        """Cut anew next time: memory or the order of the queue has changed."""
        self._plan.clear()

    def clear(self) -> None:
        """Forget the cut, and who computes what."""
        self.stop()
        self.front.clear()

    def reached(self, lane: int, request_id: int) -> None:
        """That part's KV is held now: what follows it needs no front."""
        if self.front.get(request_id) == lane:
            del self.front[request_id]
