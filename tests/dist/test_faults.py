"""What else may go wrong: a hung worker, a cut wire, a dead policy process, and everything that may take too long."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bench.replay
import common.comm.hub as hub_module
from common.comm import messages as say
from common.comm.hub import Timeouts
from common.comm.world import RemoteWorld
from common.config import compose
from common.errors import ConfigError, KVPlaneError
from common.log import Delivered, read_log
from common.types import RequestStatus, StepDone, Tier
from tests.deadline import at_most
from tests.dist.pool import after_orders, gone, nothing_left, own_hub
from tests.dist.stories import BASELINES, STORIES, play
from tests.engine.worlds import tiny_spec
from tests.fakes import cluster

ROOT = Path(__file__).resolve().parents[2]
QUICK = Timeouts(start_s=60.0, reply_s=40.0, transfer_s=30.0, heartbeat_s=3.0)
SYS_PIDFD_GETFD = 438


def finish(made) -> None:
    assert set(made.record.requests.status) == {RequestStatus.FINISHED}


@pytest.mark.parametrize("name", ["vllm", "kunserve"])
def test_a_hung_worker_is_lost(name: str) -> None:
    """SIGSTOP: its connection stays open and nothing comes. Its heartbeats are missed; the others go on."""
    story = {**STORIES, **BASELINES}[name]
    hub = own_hub(2, QUICK)
    with nothing_left(hub), at_most(90):
        after_orders(hub, {90: lambda: os.kill(hub.processes[2].pid, signal.SIGSTOP)})
        made = play(story, "dist", hub=hub)
        finish(made)
        assert made.report["lost_workers"] == {"1": "hung: silent for 3 s"}


def test_nobody_is_blamed_while_the_policy_process_is_away() -> None:
    hub = own_hub(2, QUICK)
    with nothing_left(hub):
        time.sleep(1.5 * QUICK.heartbeat_s)
        hub.drain()
        assert not hub.lost
        until = time.monotonic() + 1.5 * QUICK.heartbeat_s
        while time.monotonic() < until:
            hub.drain(0.2)
        assert not hub.lost


def cut_wires(pid: int, keep: int) -> int:
    """Shut down all TCP connections of another process but those to port `keep` (the policy's door)."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd, cut = os.pidfd_open(pid), 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                continue
        except OSError:
            continue
        fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, int(name), 0)
        if fd < 0:
            pytest.skip(f"sockets of another process are out of reach here (errno {ctypes.get_errno()})")
        with socket.socket(fileno=fd) as mine:
            try:
                if mine.family in (socket.AF_INET, socket.AF_INET6) and mine.getpeername()[1] != keep:
                    mine.shutdown(socket.SHUT_RDWR)
                    cut += 1
            except OSError:
                continue
    os.close(pidfd)
    return cut


def test_a_cut_wire_between_workers() -> None:
    """Both processes live. Whom a worker cannot reach is given up, and its requests go on elsewhere."""
    hub = own_hub(2, QUICK)
    with nothing_left(hub), at_most(90):
        with socket.socket(fileno=os.dup(hub._connections[2].fileno())) as control:
            door = control.getsockname()[1]
        cut = []
        after_orders(hub, {120: lambda: cut.append(cut_wires(hub.processes[2].pid, door))})
        made = play(STORIES["kunserve"], "dist", hub=hub)
        finish(made)
        assert cut[0] > 0
        (how,) = made.report["lost_workers"].values()
        assert how in ("worker 1 cannot reach it", "worker 2 cannot reach it")


def test_a_cut_wire_to_the_policy_process() -> None:
    """The worker ends by itself; to the policy it is dead."""
    hub = own_hub(2, QUICK)
    with nothing_left(hub), at_most(90):
        pid = hub.processes[2].pid
        with socket.socket(fileno=os.dup(hub._connections[2].fileno())) as control:
            after_orders(hub, {60: lambda: control.shutdown(socket.SHUT_RDWR)})
            made = play(BASELINES["vllm"], "dist", hub=hub)
        finish(made)
        assert made.report["lost_workers"] == {"1": "its connection is closed"}
        assert gone([pid])


# ---------------------------------------------------------------- the policy process dies


def test_when_the_policy_process_dies_its_results_so_far_are_on_disk(tmp_path: Path) -> None:
    """SIGKILL in the middle: the workers end, and the log is what a policy replays to the same commands."""
    story = STORIES["kunserve"]
    overrides = [*story.overrides, "system=kunserve", "cluster.num_instances=2", "model=tiny_llama", "hardware=cpu",
                 "workload.max_prompt_tokens=800", "workload.overlong=clip", "engine.max_model_len=1024",
                 "runtime=dist", f"run.results={tmp_path}", "run.name=r"]  # fmt: skip
    before = sorted(os.listdir("/dev/shm"))
    run = subprocess.Popen([sys.executable, "run.py", *overrides], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "r" / "events.jsonl.partial"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("StepDone") > 60):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = descendants(run.pid)
    assert len(workers) >= 2
    run.kill()
    run.wait()
    assert gone(workers), "a worker outlives the policy process"
    assert sorted(os.listdir("/dev/shm")) == before
    assert (log.parent / "config.yaml").exists()
    lines = list(read_log(log, partial=True))
    finished = [request_id for line in lines if isinstance(line, Delivered) and isinstance(line.event, StepDone)
                for request_id in line.event.finished]  # fmt: skip
    assert finished and len(set(finished)) == len(finished)
    found = bench.replay.replay(log.parent)
    assert found.difference is None and found.partial
    assert found.num_commands == sum(not isinstance(line, Delivered) for line in lines) > 20


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


# ---------------------------------------------------------------- time-outs, each with one clear line


def never_comes(environment: dict[str, str]) -> None:
    time.sleep(60)


def ends_at_once(environment: dict[str, str]) -> None:
    sys.exit(7)


def test_workers_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "WORKER", never_comes)
    with pytest.raises(KVPlaneError, match=r"workers \[1, 2\] did not come within 1 s; see runtime.start_timeout_s"):
        own_hub(2, QUICK._replace(start_s=1.0))
    monkeypatch.setattr(hub_module, "WORKER", ends_at_once)
    with pytest.raises(KVPlaneError, match=r"worker \d ended with code 7 before it was up"):
        own_hub(2, QUICK)


def test_a_rendezvous_that_does_not_come_about() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "KVPLANE_START_S": "2"}  # fmt: skip
    begin = time.monotonic()
    worker = subprocess.run([sys.executable, "-m", "common.comm.worker"], cwd=ROOT, env=environment, text=True,
                            stderr=subprocess.PIPE, timeout=90)  # fmt: skip
    ours = [line for line in worker.stderr.splitlines() if line.startswith("worker 1: ")]
    assert worker.returncode == 1 and len(ours) == 1 and "no rendezvous" in ours[0]
    assert time.monotonic() - begin < 60


def two_instances(hub) -> RemoteWorld:
    model = cluster(2, 8, 4, 16)
    world = RemoteWorld(hub, model.instances, tiny_spec(4), 16)
    world.start(0)
    world.start(1)
    return world


def test_a_copy_that_does_not_come() -> None:
    hub = own_hub(2, QUICK._replace(transfer_s=2.0, heartbeat_s=1.0))
    with nothing_left(hub), at_most(60):
        two_instances(hub)
        cells = np.zeros((4, 1), np.int32)
        take = say.TakeCells(((1, 2),), Tier.HBM, cells, (0, 16), 0)
        with pytest.raises(KVPlaneError, match=r"worker 2 \(instance 1\): nothing came from worker 1 for 2 s "
                                               r"\(copies\); see runtime.transfer_timeout_s"):  # fmt: skip
            hub.ask(2, take)


def test_an_answer_that_does_not_come() -> None:
    hub = own_hub(2, QUICK._replace(reply_s=1.0))
    with nothing_left(hub), pytest.raises(KVPlaneError, match=r"worker 1 \(instance 0\) has not answered for 1 s; see "
                                                              r"runtime.reply_timeout_s"):  # fmt: skip
        hub.answer(1, hub.post((1, say.Settle())))


def test_a_voided_answer_is_forgotten() -> None:
    """Before it comes, after it came, or when its worker dies."""
    hub = own_hub(2, QUICK)
    with nothing_left(hub), at_most(60):
        world = two_instances(hub)
        drop = say.Stop()
        early = hub.post((1, drop))
        hub.forget(1, early)
        late = hub.post((1, drop))
        while not hub.ready(1, late):
            hub.drain(0.2)
        hub.forget(1, late)
        assert hub.unclaimed == 0
        os.kill(hub.processes[2].pid, signal.SIGSTOP)
        hub.forget(2, hub.post((2, drop)))
        assert hub.unclaimed == 1
        os.kill(hub.processes[2].pid, signal.SIGKILL)
        while hub.alive(2):
            hub.drain(0.2)
        assert hub.unclaimed == 0
        world.close()


@pytest.mark.parametrize("key", ["start_timeout_s", "reply_timeout_s", "transfer_timeout_s", "heartbeat_timeout_s",
                                 "piece_kb"])  # fmt: skip
@pytest.mark.parametrize("value", ["0", "-1", "abc"])
def test_times_that_make_no_sense(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"runtime.{key}"):
        compose(["runtime=dist", f"runtime.{key}={value}"])


def test_a_heartbeat_slower_than_the_other_time_outs() -> None:
    with pytest.raises(ConfigError, match=r"runtime.heartbeat_timeout_s=30: give less than .*\(20\)"):
        compose(["runtime=dist", "runtime.heartbeat_timeout_s=30", "runtime.transfer_timeout_s=20"])
