"""A group of instances that hold one copy of the model together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from common.sched.lane import Seq
from common.sched.laneset import LaneSet
from common.sched.shared import SharedLane
from common.types import Layers, Stage
from systems.kunserve.state import Happening, State, advance

if TYPE_CHECKING:
    from systems.kunserve.exchange import Exchange


class Parked(NamedTuple):
    """A request outside lanes with its KV of `seq.computed` tokens along a route."""

    seq: Seq
    route: tuple[Stage, ...]


class Group:
    """`route`: who keeps which layers; of an instance on its own, all of them. `sets` take requests in; `old` is the
    pipeline that drains after a restore."""

    def __init__(self, ident: int, route: tuple[Stage, ...], state: State, now_ns: int) -> None:
        self.id = ident
        self.route = route
        self.state = state
        self.since_ns = now_ns
        self.sets: list[LaneSet] = []
        self.old: LaneSet | None = None
        self.stopping: dict[int, SharedLane] = {}  # lanes on their way to their last boundary
        self.parked: list[Parked] = []
        self.queue: list[Seq] = []  # waits while the group can admit nothing
        self.awaited: set[int] = set()  # commands under way
        self.exchange: Exchange | None = None
        self.clearing: list[SharedLane] = []  # lanes that a loss stops
        self.dead: set[int] = set()
        self.owed = 0  # loads that failed and are to be tried again
        self.gave_up = False  # on some load: the pipeline goes on as one
        self.parts: tuple[tuple[Stage, ...], ...] = ()  # routes that merged, until their KV has been exchanged
        self.wants: dict[int, Layers] = {}  # what members load: {} is everything

    def members(self) -> list[int]:
        """Instances that are alive."""
        return [stage.instance for stage in self.route if stage.instance not in self.dead]

    def all_sets(self) -> list[LaneSet]:
        """Those that take requests in, and the one that drains."""
        return self.sets if self.old is None else [*self.sets, self.old]

    def happen(self, happening: Happening, now_ns: int) -> None:
        """Follow an arrow of the table; an illegal one raises and changes nothing."""
        self.state = advance(self.state, happening)
        self.since_ns = now_ns
