"""Workers for tests: started once per test process, and anew when a test has killed one."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.comm.hub import Hub, Timeouts
from common.comm.world import RemoteWorld
from common.executors.cluster import ClusterModel
from tests.engine.worlds import source_of, tiny_spec

WORKERS = 4
_hubs: list[Hub] = []


def shared_hub() -> Hub:
    """Four workers; all of them live."""
    if _hubs and _hubs[-1].lost:
        _hubs.pop().close()
    if not _hubs:
        _hubs.append(Hub(WORKERS, Timeouts(120.0, 60.0, 60.0, 20.0)))
    return _hubs[-1]


@atexit.register
def _close() -> None:
    for hub in _hubs:
        hub.close()


def own_hub(num_workers: int, timeouts: Timeouts, tps: Sequence[int] = ()) -> Hub:
    """Workers of a test's own."""
    own_hub_closed()
    return Hub(num_workers, timeouts, tps=tps)


def own_hub_closed() -> None:
    """A process can be in one group of processes at a time: end the workers of `shared_hub`."""
    while _hubs:
        _hubs.pop().close()


def dist_world(model: ClusterModel, spec=None, poison: bool = True, **options) -> RemoteWorld:
    """As `tiny_world`, of workers."""
    spec = spec or tiny_spec(model.num_layers)
    return RemoteWorld(shared_hub(), model.instances, spec, model.block_size, poison=poison, source=source_of(spec),
                       **options)  # fmt: skip


def gone(pids: list[int], within_s: float = 20.0) -> bool:
    """Have all these processes ended?"""
    deadline = time.monotonic() + within_s
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def after_orders(hub: Hub, actions: dict[int, Callable[[], object]]) -> None:
    """Do these things right after the policy process has given its orders of these numbers, from now on: in the
    middle of whatever they make workers do."""
    post, given = hub.post, 0

    def give(*orders) -> int:
        nonlocal given
        number = post(*orders)
        given += 1
        if given in actions:
            actions[given]()
        return number

    hub.post = give  # type: ignore[method-assign]


@contextmanager
def nothing_left(hub: Hub) -> Iterator[None]:
    """Afterwards the hub is closed, none of its workers runs, and shared memory is as before."""
    before = sorted(os.listdir("/dev/shm"))
    pids = [process.pid for process in hub.processes.values() if process.pid is not None]
    try:
        yield
    finally:
        hub.close()
    assert gone(pids), "a worker outlives its run"
    assert sorted(os.listdir("/dev/shm")) == before
