"""The vllm baseline behind its dispatcher, fed by hand."""

from __future__ import annotations

import pytest

from common.sched.lane import EngineConfig
from common.types import Abort, InstanceLost, InstanceUp, Interrupt, RequestArrived, RunStep, Status, StepDone
from systems.baselines.vllm import VllmPolicy
from tests.fakes import cluster

LAYERS = 4


def policy(instances=3, blocks=16, dispatch="least_outstanding", up=None, **config):
    model = cluster(instances, blocks, LAYERS, 4)
    made = VllmPolicy(model.info(), EngineConfig(4, 64, 8, **config), dispatch)
    for instance in range(instances if up is None else up):
        made.on_event(0, InstanceUp(-1, instance, Status.OK, blocks * LAYERS))
    return made


def arrive(made, request_id, prompt=4):
    return made.on_event(0, RequestArrived(request_id, prompt, 100))


def where(commands):
    """Lanes that got something to do."""
    return [command.lane for command in commands if isinstance(command, (RunStep, Interrupt))]


def done(made, step, clock, finished=(), prefilled=(), status=Status.OK):
    return made.on_event(0, StepDone(step.command_id, step.lane, status, 1, clock, finished, prefilled))


def outstanding(made):
    return {instance: lane.outstanding() for instance, lane in made.lanes.items()}


def test_round_robin_takes_instances_in_turn():
    made = policy(dispatch="round_robin")
    assert [where(arrive(made, index)) for index in range(3)] == [[0], [1], [2]]
    arrive(made, 3)
    assert outstanding(made) == {0: 2, 1: 1, 2: 1}


def test_least_outstanding_counts_running_requests_too():
    made = policy()
    steps = [arrive(made, index)[0] for index in range(3)]
    assert [step.lane for step in steps] == [0, 1, 2]
    arrive(made, 3)
    assert outstanding(made) == {0: 2, 1: 1, 2: 1}
    done(made, steps[2], 1, finished=(2,), prefilled=((2, 1),))
    arrive(made, 4)
    arrive(made, 5)
    assert outstanding(made) == {0: 2, 1: 2, 2: 1}
    arrive(made, 6)
    assert outstanding(made) == {0: 2, 1: 2, 2: 2}


def test_least_outstanding_survives_many_stale_entries():
    made = policy(20)
    for index in range(500):
        step = next(command for command in arrive(made, index) if isinstance(command, RunStep))
        done(made, step, made.lanes[step.lane].iteration + 1, (index,), ((index, made.lanes[step.lane].iteration + 1),))
    assert set(outstanding(made).values()) == {0}
    assert 20 <= len(made.dispatcher._least) < 300


def test_many_instances_and_few_are_chosen_alike(monkeypatch):
    """A heap of instances and a look at each give the same choices, also while instances come and go."""
    chosen = []
    for scanned in (1, 5, 100):
        monkeypatch.setattr("common.sched.dispatch.SCANNED", scanned)
        made, steps = policy(6, blocks=4096, up=3), {}
        picks = []
        for index in range(300):
            if index % 90 == 40:
                made.on_event(0, InstanceUp(-1, 3 + index // 90, Status.OK, 4096 * LAYERS))
            for command in arrive(made, index):
                picks.append((index, getattr(command, "lane", None)))
                if isinstance(command, RunStep):
                    steps[command.lane] = (command, index)
            if index % 3 == 1 and steps:
                lane, (step, request_id) = sorted(steps.items())[index % len(steps)]
                del steps[lane]
                clock = made.lanes[lane].iteration + 1
                for command in done(made, step, clock, (request_id,), ((request_id, clock),)):
                    if isinstance(command, RunStep) and command.add:
                        steps[command.lane] = (command, command.add[0].request_id)
        chosen.append((picks, outstanding(made)))
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize("dispatch", ("round_robin", "least_outstanding"))
def test_a_refused_request_is_aborted_and_counts_nowhere(dispatch):
    made = policy(2, dispatch=dispatch)
    assert arrive(made, 0, 4 * 16) == [Abort(0, "prompt of 64 tokens exceeds the KV cache of 16 blocks")]
    assert outstanding(made) == {0: 0, 1: 0}
    assert where(arrive(made, 1, 4 * 16 - 1))


def test_requests_wait_for_the_first_instance():
    made = policy(2, up=0)
    assert arrive(made, 0) == arrive(made, 1) == []
    commands = made.on_event(5, InstanceUp(-1, 1, Status.OK, 16 * LAYERS))
    assert where(commands) == [1, 1] and isinstance(commands[0], RunStep) and isinstance(commands[1], Interrupt)
    assert made.on_event(6, InstanceUp(7, 0, Status.FAILED, 0)) == [] and list(made.lanes) == [1]


def test_requests_of_a_lost_instance_start_anew_elsewhere_once_their_step_has_failed():
    made = policy(2)
    step = arrive(made, 0)[0]
    arrive(made, 1)
    assert made.on_event(9, InstanceLost(0)) == []
    commands = done(made, step, 3, prefilled=((0, 1),), status=Status.FAILED)
    assert where(commands) == [1]
    assert [seq.known for seq in made.lanes[1].waiting] == [4 + 3]  # one token by the prompt, two by decodes


def test_an_idle_instance_that_is_lost_is_simply_gone():
    made = policy(2)
    assert made.on_event(9, InstanceLost(1)) == made.on_event(9, InstanceLost(1)) == []
    arrive(made, 0)
    arrive(made, 1)
    assert outstanding(made) == {0: 2}


def test_an_instance_that_is_back_gets_a_lane_of_its_own():
    """Its clock starts at zero and its command ids are new, whatever the executor remembers of the old lane."""
    made = policy(2)
    old = arrive(made, 0)[0]
    made.on_event(9, InstanceLost(0))
    done(made, old, 3, prefilled=((0, 1),), status=Status.FAILED)
    made.on_event(20, InstanceUp(5, 0, Status.OK, 16 * LAYERS))
    new = arrive(made, 1)[0]
    assert new.lane not in (0, 1) and new.stages[0].instance == 0 and new.command_id != old.command_id
    done(made, new, 1, (1,), ((1, 1),))
    assert outstanding(made) == {1: 1, 0: 0}


def test_gauges_show_the_ledger():
    made = policy(2, prefix_caching=True)
    step = arrive(made, 0, 10)[0]
    first, second = made.gauges()
    assert (first.running, first.waiting, first.kv_used_blocks, first.kv_cached_blocks) == (1, 0, 3, 0)
    assert (second.running, second.kv_used_blocks, second.kv_capacity_blocks) == (0, 0, 16)
    assert first.param_bytes == LAYERS * 8 * 4096
    done(made, step, 1, finished=(0,), prefilled=((0, 1),))
    first, _ = made.gauges()
    assert (first.running, first.kv_used_blocks, first.kv_cached_blocks) == (0, 0, 2)
