"""Several models in one cluster: a fleet per model, over a shared stock of GPUs.

The pools plan apart and never see each other's requests. A GPU that one has stopped may be started by another, with
that model's weights to load. While a pool has bins without an instance the others give up empty GPUs without their
cooldown; otherwise GPUs go to whoever asks first, and each pool keeps `min_instances`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from common.errors import ConfigError
from common.policy import Gauge, Policy
from common.sched.fleet import OWN_IDS, POOL_IDS, FleetPolicy
from common.sched.plan import FleetConfig
from common.sched.stock import Stock
from common.types import (
    ClusterInfo,
    Command,
    CopyDone,
    Event,
    InstanceDown,
    InstanceLost,
    InstanceUp,
    Progress,
    RequestArrived,
    StepDone,
    TimerFired,
)


class PoolsPolicy:
    """Hands every event to the pool that it concerns."""

    def __init__(self, pools: Sequence[FleetPolicy], stock: Stock) -> None:
        self.pools = tuple(pools)
        self.stock = stock
        self._model = [info.model for pool in pools for info in pool.cluster.instances]

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """The pool's commands."""
        pool = self._pool_of(event)
        return [] if pool is None else self.pools[pool].on_event(now_ns, event)

    def gauges(self) -> Iterable[Gauge]:
        """One row per instance that is up."""
        for pool in self.pools:
            yield from pool.gauges()

    def _pool_of(self, event: Event) -> int | None:
        if isinstance(event, StepDone):
            return self._model[event.lane % len(self._model)]
        if isinstance(event, RequestArrived):
            return event.model
        if isinstance(event, CopyDone | TimerFired):
            return (event.command_id - OWN_IDS) // POOL_IDS
        if isinstance(event, Progress | InstanceUp | InstanceDown | InstanceLost):
            return self._model[event.instance]
        return None


def pooled(cluster: ClusterInfo, fleet: FleetConfig, build: Callable[[ClusterInfo, Stock], FleetPolicy]) -> Policy:
    """A fleet, or one for each of the cluster's models."""
    stock = Stock(cluster.instances)
    if not cluster.pools:
        return build(cluster, stock)
    gpus, needed = len(cluster.pools[0].instances), fleet.min_instances * len(cluster.pools)
    if needed > gpus:
        raise ConfigError(f"system.min_instances={fleet.min_instances} of each of {len(cluster.pools)} models need "
                          f"{needed} GPUs; cluster.num_instances={gpus}")  # fmt: skip
    return PoolsPolicy([build(pool, stock) for pool in cluster.pools], stock)
