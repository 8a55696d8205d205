"""Workers that die, and a policy process that does: nothing hangs, nobody is left, every request is accounted for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.driver import drive
from common.executors.dist import DistExecutor
from common.record import RequestColumns, RunRecord
from common.types import RequestStatus
from tests.dist.pool import dist_world, gone, shared_hub
from tests.engine.worlds import check_replies
from tests.laws.lawlib import Request
from tests.laws.test_local_equals_sim import SPEC, RealScenario

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = tuple(Request(index % 3, 1 + index * 7 % 37, 5 + index * 11 % 29) for index in range(16))


class Killer:
    """A policy that kills workers before the events of these numbers."""

    def __init__(self, policy, kills):
        self.policy, self.kills, self.events, self.lost = policy, dict(kills), 0, []

    def on_event(self, now, event):
        self.events += 1
        if self.events in self.kills:
            os.kill(shared_hub_pid(self.kills[self.events]), signal.SIGKILL)
        if type(event).__name__ == "InstanceLost":
            self.lost.append(event.instance)
        return self.policy.on_event(now, event)

    def gauges(self):
        return self.policy.gauges()


HUB = []


def shared_hub_pid(instance):
    return HUB[-1].processes[instance + 1].pid


def run(kills, instances=3):
    HUB[:] = [shared_hub()]
    scenario = RealScenario(REQUESTS, instances, 48, 4)
    model = scenario.model()
    record = RunRecord(RequestColumns.empty(len(REQUESTS)))
    executor = DistExecutor(model, scenario.workload(), record, world=dist_world(model, SPEC), own_hub=False)
    policy = Killer(scenario.policy(), kills)
    drive(policy, executor, record)
    check_replies(executor)
    tokens = executor.outputs()
    report = executor.report()
    executor.close()
    return scenario, record, policy, tokens, report


def test_tokens_and_times_are_those_of_local():
    scenario, record, _, tokens, _ = run({})
    local = scenario.local()
    assert tokens == local.outputs()
    assert list(record.requests.finish_ns) == list(local.record.requests.finish_ns)
    assert list(record.requests.first_token_ns) == list(local.record.requests.first_token_ns)


@pytest.mark.parametrize("kills", [{6: 1}, {6: 1, 20: 2}])
def test_killed_workers_are_lost_instances(kills):
    """The policy goes on with who is left: all requests finish, with the replies of undisturbed runs."""
    before = sorted(os.listdir("/dev/shm"))
    _, record, policy, _, report = run(kills)
    assert sorted(policy.lost) == sorted(kills.values())
    assert all(status == RequestStatus.FINISHED for status in record.requests.status)
    assert sorted(report["lost_workers"]) == sorted(map(str, kills.values()))
    assert sorted(os.listdir("/dev/shm")) == before


def test_workers_end_with_the_policy_process():
    code = ("import time; from common.comm.hub import Hub; hub = Hub(2);"
            "print(*[p.pid for p in hub.processes.values()], flush=True); time.sleep(600)")  # fmt: skip
    policy = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert policy.stdout is not None
    pids = [int(word) for word in policy.stdout.readline().split()]
    assert len(pids) == 2
    policy.kill()
    policy.wait()
    assert gone(pids)
