"""Workers as Ray actors (`runtime.launcher=ray`): a bundle of a placement group for each instance, an actor for each of
its ranks, and Ray's news of dead actors and nodes. Orders and tensors go as ever, not through Ray.

An actor runs the worker's loop in its own process. Every node needs this checkout and its environment."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import ConfigError, KVPlaneError

ROOT = str(Path(__file__).resolve().parents[2])
LOOK_S = 0.5  # at most so often Ray is asked who is gone


def ray_module() -> Any:
    """Ray, if it is installed; ConfigError."""
    try:
        import ray
    except ImportError:
        raise ConfigError("runtime.launcher=ray: Ray is not installed here; pip install ray, or use torchrun "
                          "(docs/distributed.md), or runtime.launcher=auto on one machine") from None  # fmt: skip
    return ray


class Rank:
    """An actor: a worker process of Ray's, which becomes one of ours."""

    def where(self) -> tuple[int, str]:
        """Its process and its node."""
        return os.getpid(), str(ray_module().get_runtime_context().get_node_id())

    def work(self, environment: Mapping[str, str]) -> None:
        """Until the policy process says `Exit`. When that process is gone, this one ends at once."""
        from common.comm.worker import work

        os.environ.update(environment)
        work()


class RayProcess:
    """What the hub wants of a process."""

    def __init__(self, ray: Any, actor: Any, running: Any) -> None:
        self._ray, self._actor, self._running = ray, actor, running
        self.pid, self.node = -1, ""
        self.exitcode: int | None = None
        self.how = ""

    def look(self, timeout_s: float = 0.0) -> None:
        """Has it ended, and how?"""
        if self.exitcode is not None:
            return
        ready, _ = self._ray.wait([self._running], timeout=timeout_s)
        if not ready:
            return
        try:
            self._ray.get(ready[0])
            self.exitcode = 0
        except self._ray.exceptions.RayError as error:
            self.exitcode, self.how = 1, self._why(error)

    def _why(self, error: Exception) -> str:
        nodes = {node["NodeID"]: node["Alive"] for node in self._ray.nodes()}
        if not nodes.get(self.node, True):
            return "ray: its node is gone"
        return f"ray: {type(error).__name__}"

    def kill(self) -> None:
        """At once."""
        with suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(self._actor, no_restart=True)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        self.look(30.0 if timeout is None else timeout)


class RayLauncher:
    """Starts the actors, and tells who is gone. `address`: of a running cluster; None: a cluster on this machine, which
    ends with the run. Raises ConfigError, or KVPlaneError when there is no room for the actors."""

    def __init__(self, address: str | None, num_workers: int, gpus: bool, start_s: float) -> None:
        self._ray = ray = ray_module()
        self._gpus, self._start_s = gpus, start_s
        self._own = not ray.is_initialized()
        self._group: Any = None
        self._processes: dict[int, RayProcess] = {}
        self._looked = 0.0
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
        if self._own and address is None:
            ray.init(num_cpus=num_workers, include_dashboard=False, **quiet)
        elif self._own:
            try:
                ray.init(address=address, **quiet)
            except ConnectionError as error:
                raise ConfigError(f"runtime.ray_address={address}: {str(error).splitlines()[0]}") from None
        self.host = str(ray.util.get_node_ip_address())

    def start(self, environments: Mapping[int, Mapping[str, str]], teams: Sequence[Sequence[int]]) -> dict[int, Any]:
        """A process for each rank; those of an instance on one node."""
        ray, kind = self._ray, "GPU" if self._gpus else "CPU"
        self._group = ray.util.placement_group([{kind: float(len(team))} for team in teams], strategy="SPREAD")
        if not self._group.wait(self._start_s):
            raise KVPlaneError(f"runtime.launcher=ray: no node has room for some instance: {kind}s for each are "
                               f"{[len(team) for team in teams]}, the cluster has "
                               f"{ray.cluster_resources().get(kind, 0):g}; see runtime.start_timeout_s")  # fmt: skip
        made = ray.remote(Rank)
        path = os.pathsep.join([ROOT, *(entry for entry in (os.environ.get("PYTHONPATH"),) if entry)])
        for index, team in enumerate(teams):
            place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=index)  # fmt: skip
            for rank in team:
                actor = made.options(
                    num_cpus=0 if self._gpus else 1, num_gpus=1 if self._gpus else 0, scheduling_strategy=place,
                    max_restarts=0, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
                ).remote()  # fmt: skip
                where = actor.where.remote()
                process = RayProcess(ray, actor, actor.work.remote(dict(environments[rank])))
                self._processes[rank] = process
                process.pid, process.node = ray.get(where, timeout=self._start_s)
        return dict(self._processes)

    def gone(self) -> dict[int, str]:
        """Ranks of which Ray says that they have ended, and how; looks only so often."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return {}
        self._looked = now
        for process in self._processes.values():
            process.look()
        return {rank: process.how or "ray: its actor has ended" for rank, process in self._processes.items()
                if process.exitcode is not None}  # fmt: skip

    def close(self) -> None:
        """Give the placement group back, and the cluster if it is ours."""
        for process in self._processes.values():
            process.kill()
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
        if self._own:
            self._ray.shutdown()


def installed() -> bool:
    """Is Ray there?"""
    if "ray" in sys.modules:
        return True
    from importlib.util import find_spec

    return find_spec("ray") is not None
