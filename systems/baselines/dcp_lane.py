"""One member's lane of a decode-context-parallel group: each request's tokens lie evenly over all members.

Counts are of *rows*, one block at every member, as vLLM's DCP counts with a block `dcp` times as large: a request of n
tokens has ceil(n / (members x block)) rows. A prompt's rows are cut into one contiguous span per member (vLLM
interleaves positions; how many tokens each member holds is the same), and every later row gives each member a block.
"""

from __future__ import annotations

from dataclasses import replace

from common.sched.lane import EngineConfig, Seq
from common.sched.ledger import CellLedger
from common.sched.shared import SharedLane
from common.types import Command, Layers, Placement, RunStep, Span, Stage, StepDone

LISTED_ROWS = 3  # beyond what is stored; a placement that runs out is lengthened at a boundary


def even_cut(tokens: int, members: tuple[int, ...], layers: Layers, block: int) -> Placement:
    """The rows of `tokens` tokens, one contiguous span per member, of equal lengths."""
    each = -(-tokens // (block * len(members))) * block
    return tuple(Span(member, layers, index * each, (index + 1) * each) for index, member in enumerate(members))


def lengthened(placement: Placement, members: tuple[int, ...], layers: Layers, block: int, rows: int) -> Placement:
    """So many rows more, block by block; the last span is open."""
    *known, last = placement
    start = last.token_end
    if start is None:
        start = last.token_start + block
        last = last._replace(token_end=start)
    more = [Span(member, layers, start + (row * len(members) + index) * block,
                 start + (row * len(members) + index + 1) * block)
            for row in range(rows) for index, member in enumerate(members)]  # fmt: skip
    return (*known, last, *more[:-1], more[-1]._replace(token_end=None))


class DcpLane(SharedLane):
    """Computes at `home`; charges a row at every member of the group, of whose account all its lanes draw."""

    def __init__(
        self, lane: int, home: int, members: tuple[int, ...], layers: Layers, config: EngineConfig, ledger: CellLedger
    ) -> None:
        self.block = config.block_size
        row = replace(config, block_size=config.block_size * len(members))
        super().__init__(lane, tuple(Stage(member, layers) for member in members), row, ledger, False)
        at = members.index(home)
        self.members = (*members[at:], *members[:at])  # first blocks at home, so that members take turns
        self.home = Stage(home, layers)
        self.placements: dict[int, Placement] = {}
        self._listed: dict[int, int] = {}  # request -> tokens up to which its members take turns

    def step_done(self, event: StepDone, out: list[Command]) -> list[Seq]:
        """As the base's."""
        finished = super().step_done(event, out)
        for seq in finished:
            self._forget(seq.request_id)
        return finished

    def lost(self, event: StepDone | None) -> list[Seq]:
        """As the base's."""
        self.placements.clear()
        self._listed.clear()
        return super().lost(event)

    def schedule(self, out: list[Command]) -> None:
        """As the base's, with KV over the members and the route at home."""
        commands: list[Command] = []
        super().schedule(commands)
        out += [self._spread(command) if isinstance(command, RunStep) else command for command in commands]

    def _forget(self, request_id: int) -> None:
        self.placements.pop(request_id, None)
        self._listed.pop(request_id, None)

    def _spread(self, step: RunStep) -> RunStep:
        if step.stages is not None:
            step = step._replace(stages=(self.home,))
        if len(self.members) == 1:
            return step
        for request_id in step.remove:
            self._forget(request_id)
        layers = self.home.layers
        for entry in step.add:
            self._list(entry.request_id, even_cut(entry.target, self.members, layers, self.block))
        add = tuple(entry._replace(placement=self.placements[entry.request_id]) for entry in step.add)
        new = {entry.request_id for entry in add}
        return step._replace(add=add, place=tuple(self._lengthen(new)))

    def _list(self, request_id: int, placement: Placement) -> None:
        layers = self.home.layers
        self.placements[request_id] = made = lengthened(placement, self.members, layers, self.block, LISTED_ROWS)
        self._listed[request_id] = made[-1].token_start + self.block

    def _lengthen(self, new: set[int]) -> list[tuple[int, Placement]]:
        """Placements that the next step could outrun."""
        found = []
        for request_id, seq in self.running.items():
            reach = (seq.offset + self.iteration if seq.decoding else seq.target) + 2 * self.config.block_size
            if request_id not in new and reach > self._listed[request_id]:
                self._list(request_id, self.placements[request_id])
                found.append((request_id, self.placements[request_id]))
        return found
