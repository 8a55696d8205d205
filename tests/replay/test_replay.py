"""Parity: a recorded run, replayed, draws the same commands from the same policy, and any other is caught."""

from __future__ import annotations

import pytest
from hypothesis import given

from common.driver import drive
from common.errors import ContractError
from common.executors.replay import ReplayExecutor
from common.log import Delivered, LogFile, Recorder, Submitted, read_log
from common.record import RequestColumns, RunRecord
from common.types import Interrupt, RunStep, StepDone, Watch
from tests.laws.lawlib import Request, Scenario
from tests.laws.strategies import law, scenarios

SCENARIO = Scenario(
    tuple(Request(index % 4, 5 + index % 9, 3 + index % 13, index % 3 - 1, index % 2) for index in range(40)),
    instances=2, blocks=14, max_num_seqs=6, caching=True, losses=((20, 1),),
)  # fmt: skip


def recorded(scenario, sink):
    """Drive the scenario through a log."""
    executor = scenario.executor()
    drive(scenario.policy(), Recorder(executor, sink), executor.record)
    return executor.record


def replay(scenario, lines):
    record = RunRecord(RequestColumns.empty(0))
    drive(scenario.policy(), ReplayExecutor(lines), record)
    return record


@law(60)
@given(scenarios())
def test_the_same_policy_gives_the_same_commands(scenario):
    lines = []
    record = recorded(scenario, lines.append)
    again = replay(scenario, lines)
    assert (again.num_events, again.num_commands) == (record.num_events, record.num_commands)
    assert record.num_events + record.num_commands == len(lines)


def test_parity_through_a_file(tmp_path):
    path = tmp_path / "events.jsonl"
    with LogFile(path) as file:
        record = recorded(SCENARIO, file.append)
    assert replay(SCENARIO, read_log(path)).num_commands == record.num_commands > 60


def test_a_recorded_run_is_the_run():
    lines = []
    assert recorded(SCENARIO, lines.append).requests == SCENARIO.run().record.requests


def test_a_log_has_every_event_before_the_commands_that_answer_it():
    lines = []
    recorded(SCENARIO, lines.append)
    assert isinstance(lines[0], Delivered)
    times = [line.now_ns for line in lines if isinstance(line, Delivered)]
    assert times == sorted(times)


# ---------------------------------------------------------------- tampering


@pytest.fixture
def lines():
    found = []
    recorded(SCENARIO, found.append)
    return found


def first(lines, kind, after=0):
    """Index of the first command of a kind at or after an index."""
    return next(index for index in range(after, len(lines))
                if isinstance(lines[index], Submitted) and isinstance(lines[index].command, kind))  # fmt: skip


def test_another_command_is_named_with_its_field(lines):
    index = first(lines, RunStep, after=30)
    command = lines[index].command
    lines[index] = Submitted(command._replace(reclaim=command.reclaim + 1))
    event = sum(isinstance(line, Delivered) for line in lines[:index])
    with pytest.raises(ContractError) as caught:
        replay(SCENARIO, lines)
    assert f"event {event} (" in str(caught.value)
    assert f"first difference: reclaim = {command.reclaim}, recorded {command.reclaim + 1}" in str(caught.value)


def test_a_command_of_another_kind_with_equal_fields_is_another_command(lines):
    index = first(lines, Interrupt)
    lines[index] = Submitted(Watch(*lines[index].command, 0))
    with pytest.raises(ContractError, match=r"is Interrupt\(.*recorded was Watch\("):
        replay(SCENARIO, lines)


def test_a_command_that_is_missing_or_too_many(lines):
    index = first(lines, Interrupt)
    extra = [*lines[:index], Submitted(Interrupt(99)), *lines[index:]]
    with pytest.raises(ContractError, match=r"recorded was Interrupt\(lane=99\)"):
        replay(SCENARIO, extra)
    last = max(at for at, line in enumerate(lines) if isinstance(line, Submitted))
    with pytest.raises(ContractError, match=r"command \d+ was not recorded"):
        replay(SCENARIO, lines[:last] + lines[last + 1 :])
    with pytest.raises(ContractError, match=r"command \d+ is missing: Interrupt\(lane=99\)"):
        replay(SCENARIO, [*lines, Submitted(Interrupt(99))])


def test_another_event_leads_to_another_command(lines):
    """What was tampered with may also be the input: the first decision that it changes is caught."""
    index = next(at for at, line in enumerate(lines) if isinstance(line, Delivered)
                 and isinstance(line.event, StepDone) and line.event.finished)  # fmt: skip
    event = lines[index].event
    lines[index] = Delivered(lines[index].now_ns, event._replace(lane_iterations=event.lane_iterations + 9))
    with pytest.raises(AssertionError):
        replay(SCENARIO, lines)


def test_a_log_that_starts_with_a_command_is_no_log():
    with pytest.raises(ContractError, match="before any event: command 1 is missing"):
        replay(SCENARIO, [Submitted(Interrupt(0))])
    assert ReplayExecutor([]).poll() is None
