"""Workers for tests: started once per test process, and anew when a test has killed one."""

from __future__ import annotations

import atexit

from common.comm.hub import Hub, Timeouts
from common.comm.world import RemoteWorld
from common.executors.cluster import ClusterModel
from tests.engine.worlds import source_of, tiny_spec

WORKERS = 3
_hubs: list[Hub] = []


def shared_hub() -> Hub:
    """Three workers; all of them live."""
    if _hubs and _hubs[-1].lost:
        _hubs.pop().close()
    if not _hubs:
        _hubs.append(Hub(WORKERS, Timeouts(120.0, 60.0, 60.0, 20.0)))
    return _hubs[-1]


@atexit.register
def _close() -> None:
    for hub in _hubs:
        hub.close()


def dist_world(model: ClusterModel, spec=None, poison: bool = True, **options) -> RemoteWorld:
    """As `tiny_world`, of workers."""
    spec = spec or tiny_spec(model.num_layers)
    return RemoteWorld(shared_hub(), model.instances, spec, model.block_size, poison=poison, source=source_of(spec),
                       **options)  # fmt: skip
