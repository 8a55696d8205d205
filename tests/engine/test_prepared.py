"""What the host prepares while the device computes: used where nothing has changed since, and never else. `overlaps`
is what a CUDA device says of itself; here a CPU says it."""

from __future__ import annotations

from typing import Any

import pytest

from common.driver import drive
from common.executors.prepared import PreparedItems
from common.record import RequestColumns, RunRecord
from run import make_executor
from systems.registry import make_policy
from tests.dist.stories import BASELINES, STORIES, workload_of
from tests.engine.worlds import check_replies

ALL = {**STORIES, **BASELINES}


def local(name: str, overlaps: bool) -> Any:
    """A story with real tensors; its executor, closed."""
    config = ALL[name].config("runtime=local", "runtime.check=true", "runtime.clock=modelled")
    workload = workload_of(ALL[name])
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    executor = make_executor(config, workload, record)
    executor.world.runner.overlaps = overlaps
    policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
    try:
        drive(policy, executor, record)
    finally:
        executor.close()
    return executor


@pytest.mark.parametrize("name", ["vllm", "kunserve", "mell", "memserve"])
def test_prepared_iterations_say_the_same(name: str) -> None:
    plain, ahead = local(name, False), local(name, True)
    assert plain.prepared.used == 0 < ahead.prepared.used
    assert ahead.outputs() == plain.outputs() and check_replies(ahead) > 0
    assert ahead.record.requests.finish_ns == plain.record.requests.finish_ns, "the clock does not see it"


def test_tables_of_cells_that_have_moved_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, moved = PreparedItems.prepare, [0]

    def then_move(self: PreparedItems, lane: Any) -> None:
        prepare(self, lane)
        for request_id in lane.members if lane.id in self._known else ():
            self.executor.books.store(lane.stages[0].instance).of(request_id).changed()
            moved[0] += 1

    monkeypatch.setattr(PreparedItems, "prepare", then_move)
    executor = local("vllm", True)
    assert executor.prepared.used == 0 < moved[0] and check_replies(executor) > 0
