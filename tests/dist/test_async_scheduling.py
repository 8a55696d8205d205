"""A worker that knows its next iteration before it has answered the present one: the same tokens, and what is recalled
does no harm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.comm import messages as say
from common.comm.loop import Ear
from common.comm.messages import RunStage
from common.comm.stage import further
from common.engine.cells import CellStore
from common.engine.work import Batch, Work, plan_band
from common.types import Span
from tests.deadline import at_most
from tests.dist.stories import Story, play
from tests.engine.worlds import check_replies
from tests.laws.strategies import law

MEASURED = "runtime.clock=measured"
CROWD = Story("vllm", 2, (
    "workload=poisson", "workload.length_scale=0.25", "workload.rate=60", "workload.num_requests=16",
    "engine.kv_blocks=80"))  # fmt: skip
LAYERS, SIZE = 3, 16


def planned(positions: list[int]) -> tuple[Batch, tuple]:
    """Decodes at these positions on one instance, and their plan."""
    store = CellStore(1000, LAYERS)
    for request_id, position in enumerate(positions):
        store.claim(request_id, np.ones((LAYERS, position // SIZE + 1), bool))
    works = [Work(index, position, 1, True, (Span(0, (0, LAYERS), 0, None),))
             for index, position in enumerate(positions)]  # fmt: skip
    batch = Batch.of(works)
    return batch, tuple(plan_band(batch, 0, (0, LAYERS), SIZE, lambda instance, tier: store))


@law(60)
@given(st.lists(st.integers(0, 70).filter(lambda position: (position + 1) % SIZE), min_size=1, max_size=5))
def test_going_on_is_the_plan_of_the_next_position(positions: list[int]) -> None:
    batch, (plan,) = planned(positions)
    after = further(RunStage(0, batch, [1] * len(positions), (0, LAYERS), (((0, LAYERS), (plan,)),), None), [7] * 5)
    want, (theirs,) = planned([position + 1 for position in positions])
    assert after.batch.works == want.works and (after.batch.positions() == want.positions()).all()
    (((_, (mine,)),)) = after.bands
    for name, value in mine.passes[0].rows._asdict().items():
        assert (value == getattr(theirs.passes[0].rows, name)).all(), name
    assert (mine.writes[0].slots == theirs.writes[0].slots).all() and after.ids == [7] * 5


@pytest.mark.parametrize("wanted", [True, False])
def test_replies_are_the_same_with_it_and_without(wanted: bool) -> None:
    with at_most(120):
        made = play(CROWD, "dist", MEASURED, f"runtime.async_scheduling={wanted}")
    executor, (ordered, used) = made.executor, made.report["iterations_ahead"].values()
    from common.build_local import decoder_spec, parameter_source

    config = CROWD.config("runtime=dist")
    executor.world.source = parameter_source(config, decoder_spec(config, executor.world.spec.dtype))
    assert check_replies(executor) == sum(made.record.requests.output_tokens) > 0
    if wanted:
        assert ordered > used > 0, "arrivals interrupt: some of it was recalled"
    else:
        assert ordered == used == 0
    assert not executor.ahead.known and executor.world.hub.unclaimed == len(executor.world.hub._void)


def test_a_recall_overtakes_what_it_recalls() -> None:
    ear = Ear.__new__(Ear)
    ear.recalled, ear.beside = set(), object()  # type: ignore[assignment]
    Ear._sort(ear, 9, say.Recall(8))
    assert ear.recalled == {8}
