"""`system.span=cluster`: all GPUs as one instance, tensor parallel inside a node and pipelined across nodes.

An instance of the cluster model is then a node, and serves one stage: its even share of the layers.
"""

from __future__ import annotations

from dataclasses import replace

from common.config import RunConfig
from common.cost.memory import check_tp, kv_capacity_blocks
from common.errors import ConfigError
from common.sched.stages import stage_layers


def spanning(config: RunConfig) -> RunConfig:
    """The configuration with nodes for instances; ConfigError where the model cannot be cut so."""
    cluster, model = config.cluster, config.model
    gpus = cluster.num_instances * cluster.tp
    tp = min(gpus, cluster.gpus_per_node)
    nodes = gpus // tp
    name = f"system={config.system}"
    if config.runtime.name != "sim":
        raise ConfigError(f"{name} runs in runtime=sim only")
    if cluster.tps:
        raise ConfigError(f"{name}: cluster.tp={list(cluster.tps)}: its GPUs are one instance; give one number")
    if gpus % tp:
        raise ConfigError(f"{name}: {gpus} GPUs are not a whole number of nodes of {tp}")
    if nodes > model.num_layers:
        raise ConfigError(f"{name}: {model.num_layers} layers of {model.name} cannot be cut into {nodes} stages")
    if cluster.num_running != cluster.num_instances or cluster.lost:
        raise ConfigError(f"{name}: one instance is whole or nothing; leave cluster.num_running and cluster.lost alone")
    check_tp(model, tp)
    return replace(config, cluster=replace(cluster, num_instances=nodes, num_running=nodes, tp=tp))


def stage_cells(config: RunConfig, index: int) -> int:
    """Cells of KV that a stage's node has beside its share of the parameters."""
    model, engine, stages = config.model, config.engine, config.cluster.num_instances
    low, high = stage_layers(model.num_layers, stages)[index]
    blocks = config.kv_blocks
    if blocks is None:
        blocks = kv_capacity_blocks(
            model, config.hardware, config.cluster.tp, engine.block_size, config.gpu_memory_utilization, None,
            high - low, index == 0, index == stages - 1, engine.max_num_batched_tokens, engine.max_num_seqs,
            config.traits,
        )  # fmt: skip
    return blocks * (high - low)


def gpus_per_instance(config: RunConfig) -> int | tuple[int, ...]:
    """GPUs that one instance of the cluster model stands for: a whole node's where the cluster is one instance; of
    each instance where they differ."""
    if config.cluster.tps:
        return config.cluster.tps
    whole = config.system_options.get("span") == "cluster"
    return (spanning(config) if whole else config).cluster.tp
