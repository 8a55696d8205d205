"""From a configuration to a world of real tensors (`runtime=local`): real sizes, real parameters, one device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.build import cluster_model, each_model
from common.config import RunConfig
from common.engine.folder import FolderSource
from common.engine.instance import cell_bytes
from common.engine.layout import LayerLayout
from common.engine.manyworlds import ManyWorlds
from common.engine.sampler import SamplingParams
from common.engine.shard import rank_spec
from common.engine.spec import DecoderSpec, check_device, dtype_named, from_hf, from_model_spec
from common.engine.weights import MemorySource, ParameterSource, RandomSource
from common.engine.world import EngineWorld
from common.errors import CapacityError, ConfigError
from common.executors.cluster import ClusterModel, pooled
from common.executors.local import LocalExecutor
from common.executors.source import WorkloadLike
from common.record import RunRecord


class NoCost:
    """Under the measured clock nothing is asked what it would cost."""

    skew_alphas: Sequence[float] = ()

    def iteration_ns(self, chunks: Any, num_decodes: int, context: int, num_logits: int) -> int:
        raise AssertionError("the measured clock asks no cost model")

    def decode_prefix(self, batch: int, upto: int) -> list[int]:
        raise AssertionError("the measured clock asks no cost model")

    def partial_attention_ns(self, batch: int, context: int) -> int:
        raise AssertionError("the measured clock asks no cost model")

    def merge_ns(self, tokens: int) -> int:
        raise AssertionError("the measured clock asks no cost model")


@dataclass(frozen=True)
class Choice:
    """What `auto` came to."""

    device: torch.device
    dtype: torch.dtype


def choose_device(config: RunConfig) -> Choice:
    """The device and type of a run; ConfigError when they are not to be had."""
    runtime = config.runtime
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device=cuda: no CUDA device is visible; use runtime.device=cpu")
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    if runtime.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = dtype_named(runtime.dtype)
    check_device(device, dtype)
    return Choice(device, dtype)


def decoder_spec(config: RunConfig, dtype: torch.dtype) -> DecoderSpec:
    """The decoder of a configuration: a Hugging Face folder's, or the sizes of conf/model."""
    if config.runtime.weights is not None:
        return from_hf(config.runtime.weights, dtype)
    return from_model_spec(config.model, dtype)


def parameter_source(config: RunConfig, spec: DecoderSpec) -> ParameterSource:
    """Host copies that instances load from: the folder's, or random ones by the run's seed."""
    if config.runtime.weights is not None:
        return FolderSource(config.runtime.weights, spec.dtype)
    return MemorySource(RandomSource(spec, config.seed))


def local_cluster(config: RunConfig, spec: DecoderSpec) -> ClusterModel:
    """The cluster with the sizes of real tensors: an instance's bytes are the sum of its ranks'. Links, and the
    modelled clock's costs, are the hardware's."""
    bytes_each = spec.dtype.itemsize
    costs = cluster_model(replace(config, model=replace(config.model, dtype_bytes=config.hardware.dtype_bytes)))
    sized = cluster_model(replace(config, model=replace(config.model, dtype_bytes=bytes_each)))
    ranks = {tp: rank_spec(spec, tp) for tp in instance_tps(config)}
    cell = {tp: tp * cell_bytes(rank, config.engine.block_size, spec.dtype) for tp, rank in ranks.items()}
    layer = {tp: tp * LayerLayout(rank, spec.dtype).num_bytes for tp, rank in ranks.items()}
    infos = tuple(info._replace(cell_bytes=cell[tp], layer_param_bytes=layer[tp])
                  for info, tp in zip(sized.instances, instance_tps(config)))  # fmt: skip
    if config.runtime.clock == "measured":
        free = dict.fromkeys(costs.costs, lambda *shape: NoCost())
        return replace(sized, instances=infos, cost=lambda *shape: NoCost(), costs=free)
    return replace(sized, instances=infos, cost=costs.cost, costs=costs.costs)


def instance_tps(config: RunConfig) -> tuple[int, ...]:
    """The TP of each instance."""
    return config.cluster.tps or (config.cluster.tp,) * config.cluster.num_instances


def check_memory(cluster: ClusterModel, spec: DecoderSpec, device: torch.device) -> None:
    """Raise CapacityError unless this device holds every instance's parameters and KV range."""
    need = sum(info.num_layers * info.layer_param_bytes + info.kv_cells * info.cell_bytes for info in cluster.instances)
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[0]
    else:  # pages come when they are written: only parameters must be there from the start
        need = sum(info.num_layers * info.layer_param_bytes for info in cluster.instances if info.running)
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if need > have:
        raise CapacityError(
            f"model {spec.name}: {len(cluster.instances)} instances need {need:,} bytes on {device}, {have:,} are "
            "free; use fewer instances (cluster.num_instances), a smaller model, or engine.kv_blocks"
        )


def check_options(config: RunConfig, spec: DecoderSpec, device: torch.device) -> None:
    """Raise ConfigError for options that real tensors of this model on this device cannot carry out."""
    if config.engine.max_model_len > spec.max_position:
        raise ConfigError(f"engine.max_model_len={config.engine.max_model_len}: {spec.name} has positions up to "
                          f"{spec.max_position} (model.max_position); use at most that")  # fmt: skip
    if config.system_options.get("cpu_share") and device.type != "cpu":
        raise ConfigError("system.cpu_share: attention over KV in host memory is built for runtime.device=cpu only")


def _world(config: RunConfig, spec: DecoderSpec, cluster: ClusterModel, choice: Choice) -> EngineWorld:
    attention = None if config.runtime.attention == "auto" else config.runtime.attention
    return EngineWorld(
        cluster.instances, spec, parameter_source(config, spec), config.engine.block_size, device=str(choice.device),
        attention=attention, sampling=SamplingParams(temperature=config.runtime.temperature, seed=config.seed),
        seed=config.seed, poison=config.runtime.check, graphs=config.runtime.graphs,
        max_len=config.engine.max_model_len,
    )  # fmt: skip


def local_executor(config: RunConfig, workload: WorkloadLike, record: RunRecord, **options: Any) -> LocalExecutor:
    """An executor and its world. The caller closes `executor.world`."""
    choice = choose_device(config)
    if choice.device.type == "cpu":
        torch.set_num_threads(config.runtime.threads)
    each = each_model(config) or [config]
    specs = [decoder_spec(one, choice.dtype) for one in each]
    for spec in specs:
        check_options(config, spec, choice.device)
    clusters = [local_cluster(one, spec) for one, spec in zip(each, specs)]
    cluster = pooled(clusters) if len(clusters) > 1 else clusters[0]
    check_memory(cluster, specs[0], choice.device)
    worlds = [_world(one, spec, cluster, choice) for one, spec in zip(each, specs)]
    world = ManyWorlds(worlds, [info.model for info in cluster.instances]) if len(worlds) > 1 else worlds[0]
    return LocalExecutor(cluster, workload, record, world=world, measured=config.runtime.clock == "measured", **options)
