"""MELL as a policy: the online scheduler plans, the fleet starts, migrates and stops."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from common.errors import ConfigError
from common.options import Choice, Kind, Number, Switch, share
from common.sched.fleet import FleetPolicy
from common.sched.lane import EngineConfig, Seq
from common.sched.moving import Mode
from common.sched.plan import FLEET, Candidate, FleetConfig
from common.sched.stock import Stock
from common.types import ClusterInfo
from systems.mell.batch import Batch
from systems.mell.bins import Weights
from systems.mell.division import Boundaries, Migration, divide
from systems.mell.groups import Groups
from systems.mell.packing import Rules

WEIGHTS = ("weight_free", "weight_requests", "weight_node")
OPTIONS: dict[str, Kind] = {
    "rules": Choice(get_args(Rules)),
    "migration": Choice(get_args(Migration)),
    "batching": Switch(),
    **{key: Number(high=1e6) for key in WEIGHTS},
    "link_share": share(),
    "compute_share": share(),
    **FLEET,
}


@dataclass(frozen=True, slots=True)
class MellConfig:
    """`link_share`, `compute_share`: of a port's bytes and an instance's prefill rate that migrations may take."""

    rules: Rules = "repaired"
    migration: Migration = "hybrid"
    batching: bool = True
    weights: Weights = field(default_factory=Weights)
    link_share: float = 0.5
    compute_share: float = 0.2

    @staticmethod
    def of(given: Mapping[str, Any]) -> MellConfig:
        """From options that were checked against `OPTIONS`."""
        own = {key: given[key] for key in ("rules", "migration", "batching") if key in given}
        return MellConfig(
            **own,
            weights=Weights(*(float(given.get(key, 1.0)) for key in WEIGHTS)),
            link_share=float(given.get("link_share", 0.5)),
            compute_share=float(given.get("compute_share", 0.2)),
        )


@dataclass
class PlanStats:
    """Moves as the scheduler counts them."""

    operations: int = 0
    group_moves: int = 0
    request_moves: int = 0  # before pruning
    net_moves: int = 0  # after it: what is asked of the fleet


class MellPlanner:
    """The scheduler behind the fleet's planner protocol."""

    def __init__(self, capacity: int, config: MellConfig, boundaries: Boundaries) -> None:
        self.groups = Groups(capacity, config.rules, config.weights)
        self.config = config
        self.boundaries = boundaries
        self.batch = Batch()
        self.plan_stats = PlanStats()

    def epoch(self, departed: Sequence[int], grown: Mapping[int, int], arrived: Mapping[int, int]) -> Collection[int]:
        """Depart, Update, Allocate; the net moves."""
        batch, stats = self.batch, self.plan_stats
        for request_id in departed:
            batch.depart(request_id)
        for request_id, size in grown.items():
            batch.update(request_id, size)
        for request_id, size in arrived.items():
            batch.allocate(request_id, size)
        moves, group_moves, request_moves = batch.flush(self.groups, self.config.batching)
        stats.operations += len(departed) + len(grown) + len(arrived)
        stats.group_moves += group_moves
        stats.request_moves += request_moves
        stats.net_moves += len(moves)
        return [move.request_id for move in moves]

    def bin_of(self, request_id: int) -> int:
        """The GPU of the plan."""
        return self.groups.bin_of(request_id)

    def bins(self) -> Collection[int]:
        """GPUs of the plan."""
        return self.groups.bins.keys()

    def charge(self, seq: Seq, blocks: int, oracle_tokens: int | None) -> int:
        """What it holds now: the final length is unknown."""
        return min(blocks, self.groups.capacity)

    def modes(self, moves: Sequence[Candidate], busy: Mapping[int, int]) -> Mapping[int, Mode]:
        """The global division."""
        return divide(moves, busy, self.boundaries, self.config.migration)

    def hosted(self, bin_id: int, node: int) -> None:
        """Its machine, for priorities."""
        self.groups.bins[bin_id].node = node

    def detour(self, request_id: int, bin_id: int) -> bool:
        """Yes: it is migrated once its GPU is up."""
        return self.config.migration != "off"


def boundaries_of(cluster: ClusterInfo, config: MellConfig, epoch_ns: int, block_size: int) -> Boundaries:
    """From the cluster's profile; without one, links and compute are no limit and KV is the faster way."""
    info, profile = cluster.instances[0], cluster.extra
    nodes = len({instance.node for instance in cluster.instances})
    link = profile.get("nic_bandwidth" if nodes > 1 else "nvlink_bandwidth", 1e15)
    prefill = profile.get("prefill_tokens_per_s", 1e9)
    seconds = epoch_ns / 1e9
    return Boundaries(int(link * seconds * config.link_share), int(prefill * seconds * config.compute_share),
                      info.num_layers * info.cell_bytes // block_size, link, prefill)  # fmt: skip


def make_mell(
    cluster: ClusterInfo, engine: EngineConfig, config: MellConfig, fleet: FleetConfig, stock: Stock | None = None
) -> FleetPolicy:
    """The policy for one model on homogeneous GPUs: of a cluster, or of a pool."""
    if engine.prefix_caching:
        raise ConfigError("system=mell needs engine.prefix_caching=false: shared blocks are not additive")
    info = cluster.instances[0]
    capacity = int(info.kv_cells // info.num_layers * (1.0 - fleet.watermark))
    boundaries = boundaries_of(cluster, config, fleet.epoch_ns, engine.block_size)
    return FleetPolicy(cluster, engine, fleet, MellPlanner(max(1, capacity), config, boundaries), stock)
