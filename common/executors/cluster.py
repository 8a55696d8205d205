"""What an executor knows of its cluster: shapes, budgets, links and the cost of work. Policies see `info()` only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.executors.network import LinkSpec, Network, Port
from common.types import ClusterInfo, InstanceInfo


class StageCost(Protocol):
    """Times of one pipeline stage on one instance, in ns. `context` counts the token being written."""

    @property
    def skew_alphas(self) -> Sequence[float]:
        """By batch size, the last one beyond; empty: uneven lengths cost nothing."""
        ...

    def iteration_ns(
        self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int, num_logits: int
    ) -> int: ...

    def decode_prefix(self, batch: int, upto: int) -> list[int]: ...

    def partial_attention_ns(self, batch: int, context: int) -> int: ...

    def merge_ns(self, tokens: int) -> int: ...


@dataclass(frozen=True)
class ClusterModel:
    """A homogeneous cluster of instances, or (`pools`) several of one model each over the same GPUs. Instances of
    different TP: `tps` has each one's, `costs` the costs by TP, and links are those of one GPU.

    `kv_cells`: cells of an instance with all layers resident. `cost(num_layers, first, last)` gives a stage's times.
    `query_bytes`/`partial_bytes`: what remote attention ships per token and layer (q out; o and lse back).
    """

    instances: tuple[InstanceInfo, ...]
    block_size: int
    num_layers: int
    max_model_len: int
    cost: Callable[[int, bool, bool], StageCost]
    hidden_bytes: int
    query_bytes: int
    partial_bytes: int
    nvlink: LinkSpec
    nic: LinkSpec
    pcie: LinkSpec
    remap_ns: int = 5_000_000
    startup_ns: int = 20_000_000_000
    control_ns: int = 100_000
    frontend_ns: int = 0  # from a client's send to the scheduler: HTTP and tokenizer; TTFT counts from the send
    call_ns: int = 10_000  # each further call of a copy in many calls (spec: ~10 us per NCCL call)
    compact_bandwidth: float = 1e12
    remote_service: str = "side_stream"
    overlap: bool = True  # remote partials run beside the local one; False, an ablation: after it
    stall_ns: int = 600_000_000_000
    wake_share: float = 0.0  # so much longer takes the first iteration of an instance that ...
    wake_after_ns: int = 0  # ... has been idle for longer than this: cores sleep and caches are others'
    extra: dict[str, float] = field(default_factory=dict)
    pools: tuple[ClusterModel, ...] = ()
    tps: tuple[int, ...] = ()
    costs: Mapping[int, Callable[[int, bool, bool], StageCost]] = field(default_factory=dict)

    def tp(self, instance: int) -> int:
        """GPUs of an instance where they differ; 1 where all are alike, as costs and links are then those of all."""
        return self.tps[instance] if self.tps else 1

    def cost_at(self, instance: int) -> Callable[[int, bool, bool], StageCost]:
        """`cost` of an instance's stages."""
        return self.costs[self.tps[instance]] if self.tps else self.cost

    def info(self) -> ClusterInfo:
        """What policies may know."""
        pools = tuple(pool.info() for pool in self.pools)
        return ClusterInfo(self.instances, self.block_size, self.max_model_len, dict(self.extra), pools)

    def of(self, instance: int) -> ClusterModel:
        """The cluster of an instance's model."""
        return self.pools[self.instances[instance].model] if self.pools else self

    def rivals(self, instance: int) -> tuple[int, ...]:
        """The other instances of its GPU: one for each other model."""
        stride = len(self.instances) // max(1, len(self.pools))
        return tuple(other for other in range(instance % stride, len(self.instances), stride) if other != instance)

    def link(self, src: int, dst: int) -> LinkSpec:
        """The link between two instances: NVLink inside a node, NIC across."""
        same = self.instances[src].node == self.instances[dst].node
        spec = self.nvlink if same else self.nic
        return spec._replace(bandwidth=spec.bandwidth * min(self.tp(src), self.tp(dst))) if self.tps else spec

    def ports(self, src: int, dst: int) -> tuple[Port, ...]:
        """The ports that a copy crosses; `src == dst` is a copy over PCIe to or from the host."""
        if src == dst:
            return (("pcie", src),)
        medium = "nvlink" if self.instances[src].node == self.instances[dst].node else "nic"
        return ((f"{medium}-out", src), (f"{medium}-in", dst))

    def network(self) -> Network:
        """All ports at rest."""
        network = Network()
        for info in self.instances:
            width = self.tp(info.instance)
            for medium, spec in (("nvlink", self.nvlink), ("nic", self.nic)):
                network.set_port((f"{medium}-out", info.instance), spec.bandwidth * width)
                network.set_port((f"{medium}-in", info.instance), spec.bandwidth * width)
            network.set_port(("pcie", info.instance), self.pcie.bandwidth * width)
        return network

    def hop_ns(self, src: int, dst: int, tokens: int) -> int:
        """Hidden states of `tokens` tokens from one stage to the next."""
        spec = self.link(src, dst)
        return spec.latency_ns + int(tokens * self.hidden_bytes * 1e9 / spec.bandwidth)


def pooled(clusters: Sequence[ClusterModel]) -> ClusterModel:
    """One cluster of several models over the same GPUs: instance `model * GPUs + gpu` is that GPU with that model on
    it. GPUs that run from the start take the models in turn."""
    stock = len(clusters[0].instances)
    assert all(len(cluster.instances) == stock for cluster in clusters)
    pools = tuple(
        replace(cluster, instances=tuple(
            info._replace(instance=model * stock + gpu, gpu=gpu, model=model,
                          running=info.running and gpu % len(clusters) == model)
            for gpu, info in enumerate(cluster.instances)
        ))
        for model, cluster in enumerate(clusters)
    )  # fmt: skip
    everyone = tuple(info for pool in pools for info in pool.instances)
    return replace(pools[0], instances=everyone, extra={}, pools=pools)
