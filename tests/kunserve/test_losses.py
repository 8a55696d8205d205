"""A member dies at every moment of a group's life: nobody is lost, every token is that of an undisturbed run, and who
has all its KV on survivors is not computed anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.executors.local import LocalExecutor
from common.executors.sim import SimExecutor
from common.types import RequestStatus, RunStep, Tier
from systems.kunserve.group import Group
from systems.kunserve.state import State
from tests.engine.worlds import check_tokens, tiny_world
from tests.kunserve.worlds import Burst, Run

BURST = tuple((0, 100, 40) for _ in range(16))
CALM = tuple((1500, 20, 4) for _ in range(10))
TWO = Burst(BURST + CALM, 2, 24)
THREE = Burst(BURST + CALM, 3, 14)
FOUR = Burst(tuple((0, 100, 40) for _ in range(10)) + tuple((100, 100, 40) for _ in range(20)) + CALM, 4, 24)
PROMPTS = Burst(tuple((20, 150, 30) for _ in range(14)) + CALM, 2, 24, options=(("min_tokens", 16),))
AGAIN = Burst((*BURST[:12], (0, 30, 500), (0, 30, 450), *CALM[:4], *((100, 100, 40),) * 30, *CALM[:3]), 2, 40)


def state(which: State, also: Callable[[Group], Any] = lambda group: True) -> Callable[[Group], bool]:
    return lambda group: group.state is which and len(group.route) > 1 and bool(also(group))


def lookahead(group: Group) -> bool:
    return any(lane.pieces for found in group.all_sets() for lane in found.lanes)


# name -> (burst, when to strike; each in turn)
MOMENTS: dict[str, tuple[Burst, tuple[Callable[[Group], bool], ...]]] = {
    "serving": (TWO, (lambda group: group.state is State.SERVING and bool(group.sets[0].lanes[0].running),)),
    "parking": (TWO, (state(State.PARKING),)),
    "dropping": (TWO, (state(State.DROPPING),)),
    "exchanging": (TWO, (state(State.EXCHANGING, lambda group: group.exchange.moving),)),
    "exchanging, some arrived": (TWO, (state(State.EXCHANGING, lambda group: group.exchange.moving and any(
        lane.running for lane in group.sets[0].lanes)),)),
    "pipeline": (TWO, (state(State.PIPELINE),)),
    "lookahead in flight": (PROMPTS, (lookahead,)),
    "shrinking": (TWO, (state(State.SHRINKING),)),
    "loading": (TWO, (state(State.LOADING),)),
    "draining": (AGAIN, (state(State.DRAINING, lambda group: group.old is not None and all(
        any(seq.decoding for seq in found.lanes[0].running.values()) for found in group.sets)),)),
    "parking again": (AGAIN, (state(State.PARKING, lambda group: group.old is not None),)),
    "exchanging again": (AGAIN, (state(State.EXCHANGING, lambda group: any(
        len(parked.route) == 1 for parked in group.exchange.waiting()) and group.exchange.moving),)),
    "clearing": (THREE, (state(State.DROPPING), state(State.CLEARING))),
    "survivors load": (THREE, (state(State.EXCHANGING), lambda group: group.state is State.LOADING and group.parked)),
    "pairs merge": (FOUR, (state(State.DROPPING, lambda group: len(group.route) == 4),)),
    "pairs exchange": (FOUR, (state(State.EXCHANGING, lambda group: len(group.route) == 4),)),
    "a surviving pair loads": (FOUR, (state(State.EXCHANGING, lambda group: len(group.route) == 4),
                                      state(State.LOADING, lambda group: group.parts))),
}  # fmt: skip


class Struck(Run):
    """Loses a member at each moment in turn, and watches who is computed anew of those that need not be."""

    def __init__(self, moments, place: int, burst: Burst, *args, **options) -> None:
        super().__init__(burst, *args, **options)
        self.moments, self.place = list(moments), place
        self.struck: list[int] = []
        self.kept: set[int] = set()
        self.had: set[int] = set()
        self.anew: set[int] = set()

    def strike(self, now: int) -> None:
        for command in [c for c in self.trace[-1][2] if isinstance(c, RunStep)]:
            self.anew |= {entry.request_id for entry in command.add if not entry.computed} & self.kept
            self.kept -= {entry.request_id for entry in command.add}
            self.kept -= set(command.remove)  # a preemption: later memory runs out again
        for group in list(self.policy.core.groups.values()):
            if self.moments and self.moments[0](group):
                self.moments.pop(0)
                alive = group.members()
                self.struck.append(alive[self.place % len(alive)])
                self.executor.control.lose_at(now + 1, self.struck[-1])
                return

    def note_loss(self, instance: int) -> None:
        super().note_loss(instance)
        self.kept = set(self.intact(self.executor, self.model.num_layers))
        self.had |= self.kept

    def intact(self, executor, layers: int):
        """Requests of the group's survivors that have a cell of every layer for each token; judged by the executor."""
        group = self.policy.core.group_of.get(self.struck[-1])
        parked = [] if group is None else group.parked if group.exchange is None else group.exchange.waiting()
        for seq, route in parked:
            if all(executor.state.up[stage.instance] for stage in route):
                tokens = (0, seq.computed)
                area = sum(executor.state.area(seq.request_id, stage.instance, Tier.HBM, stage.layers, tokens)
                           for stage in route)  # fmt: skip
                if area == seq.computed * layers:
                    yield seq.request_id
        lanes = [] if group is None else [*group.stopping.values(), *(x for f in group.all_sets() for x in f.lanes)]
        for lane in lanes:
            if all(executor.state.up[stage.instance] for stage in lane.stages):
                yield from [request_id for request_id, seq in lane.running.items() if seq.decoding]


KEEPS = {"parking", "dropping", "exchanging", "draining", "parking again", "exchanging again", "clearing",
         "pairs merge", "pairs exchange"}  # fmt: skip


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("name", MOMENTS)
def test_a_member_dies(name, place, back):
    burst, moments = MOMENTS[name]
    if place >= burst.instances:
        return
    run = Struck(moments, place, Burst(**{**vars_of(burst), "back": back}), SimExecutor).drive()
    assert len(run.struck) == len(moments), "each moment has come"
    assert set(run.record.requests.status) == {RequestStatus.FINISHED}, "nobody's request is lost"
    assert not run.anew, "who has all its KV on survivors goes on with it"
    if name in KEEPS:
        assert run.had


@pytest.mark.parametrize("name", MOMENTS)
def test_a_member_dies_and_tokens_are_those_of_an_undisturbed_run(name):
    burst, moments = MOMENTS[name]
    model = burst.model()
    world = tiny_world(model)
    run = Struck(moments, 1, burst, LocalExecutor, model, world=world).drive()
    assert len(run.struck) == len(moments)
    assert check_tokens(run.executor) == sum(output for _, _, output in burst.requests)
    world.close()


def vars_of(burst: Burst) -> dict[str, Any]:
    return {name: getattr(burst, name) for name in burst.__dataclass_fields__}
