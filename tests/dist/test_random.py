"""Random laws on workers: any cut of any request is exact, whatever happens to it on the way, with one worker for an
instance or several."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, seed, settings

from common.comm.hub import Hub, Timeouts
from common.comm.peers import KINDS
from common.comm.world import RemoteWorld
from common.executors.dist import DistExecutor
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from tests.contract.nomads import Case, Nomads
from tests.deadline import at_most
from tests.dist.pool import own_hub, shared_hub
from tests.engine.worlds import check_replies, source_of, tiny_spec
from tests.fakes import FakeWorkload
from tests.laws.strategies import law
from tests.laws.test_any_cut import cases, cluster_of, columns, run

MET: Counter[str] = Counter()


def live_through(case: Case, hub: Hub, tp: int) -> None:
    """One case on workers, and its times in the simulator."""
    heads = case.heads if case.heads[0] % tp == 0 else (4, case.heads[1], 16)
    case = replace(case, instances=min(case.instances, len(hub.teams)), heads=heads)
    spec = tiny_spec(case.layers, *case.heads)
    model = cluster_of(case, spec, tp)
    workload = FakeWorkload([0] * len(case.lengths), *map(list, zip(*case.lengths)))
    world = RemoteWorld(hub, model.instances, spec, model.block_size, poison=True, source=source_of(spec))
    executor = DistExecutor(model, workload, RunRecord(RequestColumns.empty(len(case.lengths))), world=world,
                            own_hub=False)  # fmt: skip
    policy = Nomads(case, model.info())
    try:
        run(case, executor, policy)
        for engine in world.instances.values():
            for store in engine.stores.values():
                store.check()
                assert store.used == 0 and not store.requests
        check_replies(executor)
        report = executor.report()
        for kind in KINDS:
            assert report["sent_bytes"][kind] == report["received_bytes"][kind] <= report["ordered_bytes"][kind]
            MET[kind] += report["sent_bytes"][kind] > 0
    finally:
        executor.close()
    MET.update(name for name, count in policy.did.items() if count)
    sim = SimExecutor(model, workload, RunRecord(RequestColumns.empty(len(case.lengths))))
    run(case, sim, Nomads(case, model.info()))
    assert columns(executor.record) == columns(sim.record)


@pytest.mark.parametrize("tp", [1, 2])
def test_any_cut_is_exact_on_workers(tp: int) -> None:
    """With poison in free cells."""
    MET.clear()
    hub = shared_hub() if tp == 1 else own_hub(6, Timeouts(60.0, 60.0, 60.0, 20.0), (2, 2, 2))
    try:
        with at_most(280):

            @seed(tp)
            @settings(parent=law(14), derandomize=False, database=None)
            @given(cases())
            def one(case: Case) -> None:
                live_through(case, hub, tp)

            one()
    finally:
        if tp > 1:
            hub.close()
    wanted = ("hidden", "copies", "attention", "drop", "swap in", "loss", *(("reduce",) if tp > 1 else ()))
    assert not [kind for kind in wanted if not MET[kind]], MET
