"""From a configuration to workers (`runtime=dist`): sizes as `runtime=local`, an instance each."""

from __future__ import annotations

import os
from typing import Any

import torch

from common.build_local import choose_device, decoder_spec, instance_tps, local_cluster
from common.comm.hub import Hub, Timeouts
from common.comm.join import under_torchrun
from common.comm.ray_launch import RayLauncher, ray_module
from common.comm.world import RemoteWorld
from common.config import RunConfig
from common.engine.sampler import SamplingParams
from common.errors import ConfigError
from common.executors.dist import DistExecutor
from common.executors.source import WorkloadLike
from common.executors.wall import WallExecutor
from common.record import RunRecord


def check(config: RunConfig) -> None:
    """ConfigError on what this runtime cannot do yet."""
    runtime = config.runtime
    if config.models:
        raise ConfigError(f"cluster.models={list(config.cluster.models)}: runtime=dist has one model; use sim or local")
    if runtime.launcher == "ray":
        ray_module()
        if under_torchrun():
            raise ConfigError("runtime.launcher=ray under torchrun: choose one of the two")
    elif runtime.ray_address is not None:
        raise ConfigError(f"runtime.ray_address={runtime.ray_address}: for runtime.launcher=ray")
    if runtime.graphs == "on":
        raise ConfigError("runtime.graphs=on: runtime=dist runs eagerly; use runtime.graphs=off")
    if config.system_options.get("cpu_share"):
        raise ConfigError("system.cpu_share: runtime=dist does not attend to KV in host memory; use 0")


def check_backend(backend: str, device: torch.device) -> None:
    """ConfigError where workers could not talk: they would all be lost, one after the other. `device`: as chosen."""
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError(f"runtime.backend=nccl needs a GPU per worker, and this run's device is {device.type}; "
                          "use runtime.backend=gloo")  # fmt: skip


def dist_executor(
    config: RunConfig, workload: WorkloadLike, record: RunRecord, *, hub: Hub | None = None, **options: Any
) -> DistExecutor:  # fmt: skip
    """An executor with its workers, which it ends when it is closed; or with those of a hub, which stay."""
    check(config)
    runtime, choice = config.runtime, choose_device(config)
    check_backend(runtime.backend, choice.device)
    torch.set_num_threads(runtime.threads)
    spec = decoder_spec(config, choice.dtype)
    cluster = local_cluster(config, spec)
    tps = instance_tps(config)
    num = sum(tps)
    devices = ["cpu"] * num
    ray, cuda = runtime.launcher == "ray", choice.device.type == "cuda"
    if ray and cuda:
        devices = ["cuda:0"] * num  # Ray shows each actor its own
    elif cuda:  # workers of one machine, in order; more machines: set CUDA_VISIBLE_DEVICES there
        if under_torchrun() and int(os.environ.get("LOCAL_WORLD_SIZE", num + 1)) != num + 1:
            raise ConfigError("runtime.device=cuda over several machines is not built yet; use runtime.device=cpu")
        if torch.cuda.device_count() < num:
            raise ConfigError(f"runtime=dist: {num} ranks need a GPU each, {torch.cuda.device_count()} are visible")
        devices = [f"cuda:{index}" for index in range(num)]
    timeouts = Timeouts(runtime.start_timeout_s, runtime.reply_timeout_s, runtime.transfer_timeout_s,
                        runtime.heartbeat_timeout_s)  # fmt: skip
    own = hub is None
    if hub is None:
        launcher = RayLauncher(runtime.ray_address, num, cuda, timeouts.start_s) if ray else None
        hub = Hub(num, timeouts, runtime.backend, runtime.piece_kb << 10, tps, launcher)
    try:
        world = RemoteWorld(
            hub, cluster.instances, spec, config.engine.block_size, devices=devices,
            attention=None if runtime.attention == "auto" else runtime.attention,
            sampling=SamplingParams(temperature=runtime.temperature, seed=config.seed), seed=config.seed,
            poison=runtime.check, weights=runtime.weights,
        )  # fmt: skip
        if runtime.clock == "measured":
            return WallExecutor(cluster, workload, record, world=world, own_hub=own,
                                async_scheduling=runtime.async_scheduling, **options)  # fmt: skip
        return DistExecutor(cluster, workload, record, world=world, own_hub=own, **options)
    except BaseException:
        if own:
            hub.close()
        raise
