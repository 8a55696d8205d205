"""Workers as Ray actors: the run of torchrun through Ray, actors and nodes that die, and where Ray is not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import run as cli
from common.build_dist import check
from common.comm.hub import Hub, Timeouts
from common.comm.ray_launch import RayLauncher, installed
from common.config import compose
from common.errors import ConfigError, KVPlaneError
from common.types import RequestStatus
from tests.deadline import at_most
from tests.dist.pool import after_orders, gone, own_hub_closed
from tests.dist.stories import BASELINES, STORIES, play
from tests.dist.test_torchrun import SCENE

WITH_RAY = pytest.mark.skipif(not installed(), reason="Ray is not installed (an optional extra: pip install ray)")
TIMEOUTS = Timeouts(start_s=120.0, reply_s=60.0, transfer_s=60.0, heartbeat_s=20.0)


@pytest.mark.skipif(installed(), reason="Ray is installed")
def test_without_ray_it_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^runtime.launcher=ray: Ray is not installed here; pip install ray, or use"):
        check(compose(["runtime=dist", "runtime.launcher=ray"]))


def test_an_address_is_rays() -> None:
    with pytest.raises(ConfigError, match=r"^runtime.ray_address=auto: for runtime.launcher=ray$"):
        check(compose(["runtime=dist", "runtime.ray_address=auto"]))


@WITH_RAY
@pytest.mark.parametrize("tp", ["1", "[2,1]"])
def test_the_run_of_torchrun_through_ray(tp: str, tmp_path: Path) -> None:
    """The tokens of `local`, and nothing left behind."""
    own_hub_closed()
    system = ["system=pd"] if tp != "1" else []
    with at_most(180):
        for name, runtime in (("ray", ["runtime=dist", "runtime.launcher=ray"]),
                              ("one", ["runtime=local", "runtime.clock=modelled"])):  # fmt: skip
            scene = [word for word in SCENE if not (system and word.startswith("system"))]
            assert cli.main([*scene, *system, *runtime, f"cluster.tp={tp}", f"run.results={tmp_path}",
                             f"run.name={name}"]) == 0  # fmt: skip
    ray, one = ((tmp_path / name / "outputs.jsonl").read_text() for name in ("ray", "one"))
    assert ray == one and len(ray.splitlines()) == 12
    engine = json.loads((tmp_path / "ray" / "manifest.json").read_text())["engine"]
    assert sum(engine["sent_bytes"].values()) > 0 and engine["sent_bytes"] == engine["acknowledged_bytes"]
    assert not engine["lost_workers"]


def ray_hub(num_workers: int, tps: tuple[int, ...] = (), address: str | None = None) -> Hub:
    own_hub_closed()
    return Hub(num_workers, TIMEOUTS, tps=tps, launcher=RayLauncher(address, num_workers, False, TIMEOUTS.start_s))


def told_by_ray(hub: Hub, rank: int) -> str:
    """What Ray has to say of a rank that has died: that its connection is closed is usually noticed before."""
    assert hub._launcher is not None
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        told = hub._launcher.gone()
        if rank in told:
            return told[rank]
        time.sleep(0.2)
    return "nothing"


@WITH_RAY
def test_an_actor_that_dies_is_a_lost_instance() -> None:
    """With all of its ranks; the run goes on with who is left, and no actor outlives it."""
    more = ("cluster.tp=[2,1]", "engine.kv_blocks=80")
    hub = ray_hub(3, (2, 1))
    pids = [process.pid for process in hub.processes.values()]
    with at_most(180):
        try:
            after_orders(hub, {90: lambda: os.kill(hub.processes[2].pid, signal.SIGKILL)})
            made = play(BASELINES["vllm"], "dist", *more, hub=hub)
            assert told_by_ray(hub, 2) == "ray: ActorDiedError"
        finally:
            hub.close()
    assert set(made.record.requests.status) == {RequestStatus.FINISHED}
    assert list(made.report["lost_workers"]) == ["0"] and set(hub.lost) == {1, 2}
    assert gone(pids)


@WITH_RAY
def test_a_node_that_dies_is_a_lost_instance() -> None:
    """Three of Ray's nodes on this machine, an instance on each; one goes in the middle of the run."""
    import ray
    from ray.cluster_utils import Cluster

    own_hub_closed()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))}
        hub = ray_hub(3, address=cluster.address)
        with at_most(240):
            try:
                assert len({process.node for process in hub.processes.values()}) == 3, "two instances on one node"
                victim = next(rank for rank, process in hub.processes.items() if process.node in nodes)
                after_orders(hub, {120: lambda: cluster.remove_node(nodes[hub.processes[victim].node])})
                made = play(STORIES["infinite_llm"], "dist", hub=hub)
                assert told_by_ray(hub, victim) == "ray: its node is gone"
            finally:
                hub.close()
        assert set(made.record.requests.status) == {RequestStatus.FINISHED}
        assert list(made.report["lost_workers"]) == [str(victim - 1)]
    finally:
        ray.shutdown()
        cluster.shutdown()


@WITH_RAY
def test_no_room_is_one_line() -> None:
    import ray

    own_hub_closed()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with pytest.raises(KVPlaneError, match=r"^runtime.launcher=ray: no node has room for some instance: CPUs for "
                                               r"each are \[4\], the cluster has 2; see runtime.start_timeout_s"):
            Hub(4, TIMEOUTS._replace(start_s=2.0), tps=(4,), launcher=RayLauncher(None, 4, False, 2.0))
    finally:
        ray.shutdown()
