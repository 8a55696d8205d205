"""From a configuration to a simulated cluster: budgets in cells, links, and costs by stage."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import cast

from common.config import RunConfig
from common.cost.memory import kv_capacity_blocks, shard_kv_heads
from common.cost.model import InstanceCost
from common.cost.transfer import Link, nic, nvlink, pcie, startup_ns
from common.errors import ConfigError
from common.executors.cluster import ClusterModel, StageCost, pooled
from common.executors.network import LinkSpec
from common.spanning import spanning, stage_cells
from common.types import InstanceInfo

PROFILE_TOKENS = 1024  # of the one prompt that the profile for policies measures, alone on an idle instance


def cluster_model(config: RunConfig) -> ClusterModel:
    """The cluster that a configuration describes; CapacityError when the model does not fit."""
    if config.models:
        return pooled([cluster_model(one) for one in each_model(config)])
    whole = config.system_options.get("span") == "cluster"
    config = spanning(config) if whole else config
    model, hardware, tp = config.model, config.hardware, config.cluster.tp
    tps, engine = config.cluster.tps, config.engine
    if tps:
        return _of_unlike_instances(config, tps)
    blocks = config.kv_blocks
    if config.system_options.get("kv") == "unlimited":
        blocks = unlimited_blocks(config)
    if blocks is None and not whole:
        blocks = kv_capacity_blocks(
            model, hardware, tp, engine.block_size, config.gpu_memory_utilization,
            max_num_batched_tokens=engine.max_num_batched_tokens, max_num_seqs=engine.max_num_seqs,
            traits=config.traits,
        )  # fmt: skip
    shard = shard_kv_heads(model, tp) * tp
    cell_bytes = engine.block_size * 2 * shard * model.head_dim * model.dtype_bytes
    host_gb = config.cluster.host_memory_gb
    host_bytes = hardware.host_memory_bytes * tp if host_gb is None else int(host_gb * 1e9)
    infos = tuple(
        InstanceInfo(
            instance=index,
            num_layers=model.num_layers,
            kv_cells=stage_cells(config, index) if whole else (blocks or 0) * model.num_layers,
            cell_bytes=cell_bytes,
            layer_param_bytes=model.layer_bytes,
            node=index // (config.cluster.gpus_per_node // tp),
            running=index < config.cluster.num_running,
            host_cells=host_bytes // cell_bytes,
            tp=tp,
        )
        for index in range(config.cluster.num_instances)
    )

    @cache
    def cost(layers: int, first: bool, last: bool) -> StageCost:
        if config.cost_source == "vidur":
            return _vidur(config, layers)
        return InstanceCost(model, hardware, tp, layers, first, last, config.traits)

    def wide(link: Link) -> LinkSpec:
        return LinkSpec(link.bandwidth * tp, link.latency_ns)  # every GPU of an instance moves its own share

    return ClusterModel(
        instances=infos,
        block_size=engine.block_size,
        num_layers=model.num_layers,
        max_model_len=engine.max_model_len,
        cost=cost,
        hidden_bytes=model.hidden_bytes(1),
        query_bytes=model.query_bytes(1),
        partial_bytes=model.partial_bytes(1),
        nvlink=wide(nvlink(hardware)),
        nic=wide(nic(hardware)),
        pcie=wide(pcie(hardware)),
        startup_ns=startup_ns(hardware, model.param_bytes // tp),
        remap_ns=int(config.cluster.remap_ms * 1e6),
        control_ns=int(config.cluster.control_ms * 1e6),
        frontend_ns=int(config.cluster.frontend_ms * 1e6),
        compact_bandwidth=hardware.mem_bandwidth * tp,
        overlap=config.system_options.get("overlap") is not False,
        wake_share=config.traits.wake_share,
        wake_after_ns=config.traits.wake_after_ns,
        extra=_estimates(config),
    )


def _of_unlike_instances(config: RunConfig, tps: tuple[int, ...]) -> ClusterModel:
    """Instances of different TP. Links are a GPU's; an instance has as many of them as it has GPUs."""
    alike = {tp: cluster_model(replace(config, cluster=replace(config.cluster, tp=tp, tps=()))) for tp in tps}
    per_node = config.cluster.gpus_per_node
    infos = []
    for index, (tp, end) in enumerate(zip(tps, accumulate(tps))):
        if (end - tp) // per_node != (end - 1) // per_node:
            raise ConfigError(f"cluster.tp={list(tps)}: instance {index} would lie on two nodes of {per_node} GPUs "
                              "(cluster.gpus_per_node)")  # fmt: skip
        infos.append(alike[tp].instances[index]._replace(node=(end - 1) // per_node))
    first = alike[tps[0]]

    def one(link: LinkSpec) -> LinkSpec:
        return LinkSpec(link.bandwidth / tps[0], link.latency_ns)

    return replace(first, instances=tuple(infos), tps=tps, costs={tp: each.cost for tp, each in alike.items()},
                   nvlink=one(first.nvlink), nic=one(first.nic), pcie=one(first.pcie),
                   startup_ns=max(each.startup_ns for each in alike.values()))  # fmt: skip


def each_model(config: RunConfig) -> list[RunConfig]:
    """The configuration of each of the models that share the GPUs, as if it had them alone."""
    return [replace(config, model=model, models=()) for model in config.models]


def unlimited_blocks(config: RunConfig) -> int:
    """More KV blocks than an instance can ever fill: as many requests as may run, each as long as may be."""
    if config.kv_blocks is not None:
        raise ConfigError(f"engine.kv_blocks={config.kv_blocks}: system={config.system} has KV without limit; use null")
    engine = config.engine
    longest = -(-engine.max_model_len // engine.block_size) + 1
    return int(engine.max_num_seqs * longest / (1 - engine.watermark)) + 1


def _estimates(config: RunConfig) -> dict[str, float]:
    """What a policy that plans by cost may plan with: fits on a training split, profiled boundaries and the links'
    bandwidths, as plain numbers, from a cost model of its own; never the executor's object."""
    options, tp, hardware = config.system_options, config.cluster.tp, config.hardware
    plans = {"lookahead", "migration", "actions"} & set(options) or options.get("mode") == "proactive"
    if not plans or config.cost_source != "operators":
        return {}
    model = replace(config.model, dtype_bytes=hardware.dtype_bytes)
    cost = InstanceCost(model, hardware, tp, engine=config.traits)
    links = {"nvlink_bandwidth": nvlink(hardware).bandwidth * tp, "nic_bandwidth": nic(hardware).bandwidth * tp}
    if "lookahead" in options:
        from common.cost.estimate import extra

        return {**extra(cost, config.engine.max_num_batched_tokens), **links}
    if "actions" in options:
        from common.cost.estimate import extra

        host = pcie(hardware)
        rates = {"pcie_bandwidth": host.bandwidth * tp, "pcie_latency_ns": float(host.latency_ns)}
        return {**extra(cost, config.engine.max_num_batched_tokens), **rates}
    if "migration" in options:
        prefill_ns = cost.iteration_ns([(PROFILE_TOKENS, 0)], 0, 0, 1)
        return {"prefill_tokens_per_s": PROFILE_TOKENS * 1e9 / prefill_ns, **links}
    from common.cost.throughput import throughput_model

    return throughput_model(cost)


def _vidur(config: RunConfig, layers: int) -> StageCost:
    from common.cost.vidur_tables import VidurTables
    from workloads.paths import data_root

    wanted = ("Llama-2-70B", 2, config.model.num_layers)
    if (config.model.name, config.cluster.tp, layers) != wanted:
        raise ConfigError("cost.source=vidur has tables for model=llama2-70b cluster.tp=2 only")
    folder = data_root() / "vidur" / "predictions_llama2-70b_tp2_a100"
    return cast(StageCost, VidurTables(folder, layers))  # no remote attention there
