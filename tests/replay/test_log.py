"""The event log: whatever is written is read back the same, and whatever is broken is named with file and line."""

from __future__ import annotations

import enum
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import log
from common.errors import ConfigError, ContractError, TraceError
from common.log import Delivered, LogFile, Submitted, decode, encode, read_log, register
from common.types import (
    Abort,
    AgentLost,
    Command,
    CopyDone,
    CopySpan,
    DropLayers,
    Entry,
    Event,
    FreeSpan,
    InstanceDown,
    InstanceLost,
    InstanceUp,
    Interrupt,
    LayersDropped,
    LayersLoaded,
    LoadLayers,
    Mark,
    MessageArrived,
    Progress,
    RequestArrived,
    Rule,
    RunStep,
    Send,
    SetTimer,
    ShrinkDone,
    ShrinkKV,
    Span,
    Stage,
    StartInstance,
    Status,
    StepDone,
    StopInstance,
    SwapDone,
    SwapSpan,
    Tier,
    TimerFired,
    Watch,
)

PLACEMENT = (Span(0, (0, 2), 0, 32), Span(1, (2, 4), 0, 32, Tier.DRAM), Span(0, (0, 4), 32, None))
CONTENT = (("doc:1", 0, 48), ('a "strange"\nsource \u2603', 7, 1), ("gen:3", 0, 5))
PAYLOAD = {"plan": [PLACEMENT, (1, (2, ())), None, True], (1, 2): {"rate": 0.1, "none": {}}, Status.FAILED: -1.5e-300}
LANES = ((0, 17), (3, 1 << 40))
EVENTS = (
    RequestArrived(3, 48, 1 << 20, CONTENT, 5, None, "scheduler"),
    RequestArrived(4, 1, 2, None, -1, 17),
    StepDone((1 << 32) + 1, 1, Status.OK, 12, 40, (3, 4), ((5, 39),), ((6, 100),), "x"),
    StepDone(1, 1, Status.FAILED, 0, 0),
    CopyDone(2, Status.CANCELLED, 1 << 33, LANES),
    SwapDone(3, Status.OK, 0),
    ShrinkDone(4, Status.OK, 12, LANES),
    LayersDropped(5, Status.OK, 4096),
    LayersLoaded(6, Status.FAILED, 0),
    InstanceUp(-1, 0, Status.OK, 512),
    InstanceDown(7, 0, Status.OK),
    InstanceLost(2, "manager"),
    TimerFired(8),
    MessageArrived("a", "b", PAYLOAD),
    AgentLost("a", True),
    Progress(1, LANES),
)
COMMANDS = (
    RunStep(9, 0, (Entry(3, 0, 48, 16, placement=PLACEMENT), Entry(4, 9, 10, decode=True)), (5,), (2,), (6,),
            ((7, PLACEMENT),), (Stage(0, (0, 2)), Stage(1, (2, 4))), 512, Rule.SARATHI, 3, 4),
    RunStep(10, 0),
    Interrupt(0),
    CopySpan(11, 3, 0, 1, (0, 4), (16, 48), after=9, by_layer=True, dst_tier=Tier.DRAM),
    SwapSpan(12, 3, 0, (0, 4), (0, 16), True),
    FreeSpan(0, None, cached_blocks=3),
    FreeSpan(0, 3, (0, 2), (0, 16), 1, 0, Tier.DRAM, CONTENT),
    ShrinkKV(13, 0, 12),
    DropLayers(14, 0, (2, 4)),
    LoadLayers(15, 0, (2, 4), None),
    StartInstance(16, 1),
    StopInstance(17, 1),
    SetTimer(18, 10**18, "manager"),
    Watch(0, 1000),
    Send("a", "b", PAYLOAD, 100),
    Abort(3, "reason"),
    Mark(0, "drop", "layers"),
)  # fmt: skip
LINES = [Delivered(at, event) for at, event in enumerate(EVENTS)] + [Submitted(command) for command in COMMANDS]


def same(left, right):
    """Equal, and of the same types all the way down (a Status is an int and an Interrupt is a tuple)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    return left == right


def write(path, lines):
    with LogFile(path) as file:
        for line in lines:
            file.append(line)
    return path


def test_samples_cover_the_whole_vocabulary():
    assert {type(event) for event in EVENTS} == set(Event.__args__)
    assert {type(command) for command in COMMANDS} == set(Command.__args__)


def test_every_event_and_command_comes_back_the_same(tmp_path):
    path = write(tmp_path / "events.jsonl", LINES)
    assert same(list(read_log(path)), LINES)
    assert len(path.read_text().splitlines()) == len(LINES) + 1, "one line each, and the counts"
    assert [entry.name for entry in tmp_path.iterdir()] == ["events.jsonl"]


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
              st.sampled_from((Status.OK, Tier.DRAM, Rule.CHUNKED))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.tuples(st.integers())), inner, max_size=3),
        st.builds(Abort, st.integers(), inner), st.builds(Stage, inner, inner)),
    max_leaves=12)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES)
def test_any_payload_comes_back_the_same(value):
    text = log.to_text(Delivered(0, MessageArrived("a", "b", value)))
    assert "\n" not in text
    assert same(decode(encode(value)), value)


def test_numbers_of_numpy_become_integers():
    np = pytest.importorskip("numpy")
    assert same(decode(encode((np.int64(3), np.int32(4)))), (3, 4))


class Plan(NamedTuple):
    """A system's own message."""

    moves: tuple[int, ...]


class Colour(enum.Enum):
    RED = "red"


def test_a_system_registers_its_own_messages():
    with pytest.raises(ContractError, match="a Plan cannot be logged"):
        encode(Plan((1,)))
    try:
        register(Plan, Colour)
        register(Plan)  # again is fine
        assert same(decode(encode((Plan((1, 2)), Colour.RED))), (Plan((1, 2)), Colour.RED))
        other = type("Plan", (Plan,), {})
        with pytest.raises(ContractError, match="two types named Plan"):
            register(other)
    finally:
        log._TYPES.pop("Plan")
        log._TYPES.pop("Colour")
    with pytest.raises(ContractError, match="neither a NamedTuple nor an Enum"):
        register(dict)


@pytest.mark.parametrize("value", ({1, 2}, object(), b"bytes"))
def test_what_has_no_order_or_no_text_is_refused(value):
    with pytest.raises(ContractError, match="cannot be logged"):
        encode((value,))


# ---------------------------------------------------------------- damage


def test_after_an_error_the_lines_so_far_stay_under_another_name(tmp_path):
    path = tmp_path / "events.jsonl"
    with pytest.raises(KeyboardInterrupt), LogFile(path) as file:
        file.append(LINES[0])
        file.append(LINES[1])
        raise KeyboardInterrupt
    assert not path.exists()
    partial = tmp_path / "events.jsonl.partial"
    assert list(read_log(partial, partial=True)) == LINES[:2]
    with pytest.raises(TraceError, match=r"events\.jsonl\.partial:3: .*interrupted"):
        list(read_log(partial))
    with partial.open("a") as torn:
        torn.write('{"at":3,"eve')
    assert list(read_log(partial, partial=True)) == LINES[:2]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing.*cannot write"):
        LogFile(tmp_path / "missing" / "events.jsonl")
    with pytest.raises(TraceError, match="cannot read"):
        list(read_log(tmp_path / "missing"))


BROKEN = (
    ("{", "not JSON"),
    ("[1]", "neither an event nor a command"),
    ("{}", "neither an event nor a command"),
    ('{"at":1,"event":{"Stage":[0,[0,1]]}}', "neither an event nor a command"),
    ('{"at":1,"event":{"Interrupt":[0]}}', "neither an event nor a command"),
    ('{"at":1.5,"event":{"TimerFired":[0,""]}}', "neither an event nor a command"),
    ('{"command":{"TimerFired":[0,""]}}', "neither an event nor a command"),
    ('{"command":{"Interrupt":[0,1]}}', "Interrupt with 2 of 1 fields"),
    ('{"command":{"Interupt":[0]}}', "unknown type 'Interupt'"),
    ('{"command":{"Interrupt":7}}', "Interrupt without a list"),
    ('{"command":{"Interrupt":[0],"Watch":[0,0,""]}}', "2 keys where one"),
    ('{"command":{"Interrupt":[{"Status":9}]}}', "9 is not a valid Status"),
    ('{"command":{"Interrupt":[{"dict":[[1]]}]}}', "not enough values"),
    ('{"events":5,"commands":0}', "should hold"),
)


@pytest.mark.parametrize(("line", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_gives_one_clear_error_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "events.jsonl", LINES)
    lines = path.read_text().splitlines()
    lines[4] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError) as caught:
        list(read_log(path))
    text = str(caught.value)
    assert text.startswith(f"{path}:5: ") and message in text and "\n" not in text


def test_lines_that_are_gone_or_added_are_noticed(tmp_path):
    path = write(tmp_path / "events.jsonl", LINES)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    with pytest.raises(TraceError, match=r"should hold .*but holds"):
        list(read_log(path))
    path.write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(TraceError, match="more lines after the last"):
        list(read_log(path))
    path.write_text("")
    with pytest.raises(TraceError, match="without its last line"):
        list(read_log(path))
    path.write_bytes(b'{"at":0,"event":{"TimerFired":[0,"\xff"]}}\n')
    with pytest.raises(TraceError, match=r"events\.jsonl:1: not text"):
        list(read_log(path))
