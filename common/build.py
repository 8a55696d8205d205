"""From a configuration to a simulated cluster: budgets in cells, links, and costs by stage."""

from __future__ import annotations

from functools import cache
from typing import cast

from common.config import RunConfig
from common.cost.memory import kv_capacity_blocks, shard_kv_heads
from common.cost.model import InstanceCost
from common.cost.transfer import Link, nic, nvlink, pcie, startup_ns
from common.errors import ConfigError
from common.executors.cluster import ClusterModel, StageCost
from common.executors.network import LinkSpec
from common.types import InstanceInfo

PROFILE_TOKENS = 1024  # of the one prompt that the profile for policies measures, alone on an idle instance


def cluster_model(config: RunConfig) -> ClusterModel:
    """The cluster that a configuration describes; CapacityError when the model does not fit."""
    model, hardware, tp = config.model, config.hardware, config.cluster.tp
    engine = config.engine
    blocks = config.kv_blocks
    if blocks is None:
        blocks = kv_capacity_blocks(
            model, hardware, tp, engine.block_size, config.gpu_memory_utilization,
            max_num_batched_tokens=engine.max_num_batched_tokens, max_num_seqs=engine.max_num_seqs,
        )  # fmt: skip
    shard = shard_kv_heads(model, tp) * tp
    cell_bytes = engine.block_size * 2 * shard * model.head_dim * model.dtype_bytes
    host_gb = config.cluster.host_memory_gb
    host_bytes = hardware.host_memory_bytes * tp if host_gb is None else int(host_gb * 1e9)
    infos = tuple(
        InstanceInfo(
            instance=index,
            num_layers=model.num_layers,
            kv_cells=blocks * model.num_layers,
            cell_bytes=cell_bytes,
            layer_param_bytes=model.layer_bytes,
            node=index // (config.cluster.gpus_per_node // tp),
            running=index < config.cluster.num_running,
            host_cells=host_bytes // cell_bytes,
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
        control_ns=int(config.cluster.control_ms * 1e6),
        frontend_ns=int(config.cluster.frontend_ms * 1e6),
        compact_bandwidth=hardware.mem_bandwidth * tp,
        extra={
            "nvlink_bytes_per_s": wide(nvlink(hardware)).bandwidth,
            "nic_bytes_per_s": wide(nic(hardware)).bandwidth,
            "prefill_tokens_per_s": PROFILE_TOKENS * 1e9 / cost(model.num_layers, True, True).iteration_ns(
                [(PROFILE_TOKENS, 0)], 0, 0, 1),
        },
    )  # fmt: skip


def _vidur(config: RunConfig, layers: int) -> StageCost:
    from common.cost.vidur_tables import VidurTables
    from workloads.paths import data_root

    wanted = ("Llama-2-70B", 2, config.model.num_layers)
    if (config.model.name, config.cluster.tp, layers) != wanted:
        raise ConfigError("cost.source=vidur has tables for model=llama2-70b cluster.tp=2 only")
    folder = data_root() / "vidur" / "predictions_llama2-70b_tp2_a100"
    return cast(StageCost, VidurTables(folder, layers))  # no remote attention there
