"""The event log: every event before it is delivered and every command it led to, one JSON line each.

A log of a run, real or simulated, can be replayed (`common.executors.replay`): the same policy must give the same
commands. A file is streamed under a temporary name and gets its own when it is complete; its last line counts the
others, so a log cut short is noticed. Its first line holds the cluster as the policy was told of it, which on real
tensors depends on the machine: so any other machine can make the same policy anew.

Lines: at the head `{"log": version, "cluster": value}`, then `{"at": ns, "event": value}` and `{"command": value}`, at
the end `{"events": n, "commands": m}` (a log made without a cluster has no head). A value is a
JSON scalar, a list (a tuple), or an object with one key that names its type: `{"Span": [fields]}`, `{"Tier": "hbm"}`,
`{"list": [..]}`, `{"dict": [[key, value], ..]}`. So what is read back equals what was written, types included.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

from common import types as vocabulary
from common.errors import ConfigError, ContractError, TraceError
from common.policy import Executor
from common.types import ClusterInfo, Command, Event

VERSION = 1  # of the lines; what the vocabulary holds is checked line by line
LOG = "events.jsonl"  # in a run's folder
OTHER = "another version of this code"
PARTIAL = ".partial"  # suffix of a log that is still being written, or never was completed
_TYPES: dict[str, type] = {}


def register(*kinds: type) -> None:
    """Teach the log further named tuples or enums: those that a system puts into its messages."""
    for kind in kinds:
        if not (issubclass(kind, enum.Enum) or hasattr(kind, "_fields")):
            raise ContractError(f"{kind.__name__} is neither a NamedTuple nor an Enum: it cannot be logged")
        if _TYPES.setdefault(kind.__name__, kind) is not kind:
            raise ContractError(f"two types named {kind.__name__} cannot both be logged")


register(*(kind for kind in vars(vocabulary).values() if isinstance(kind, type)
           and kind.__module__ == vocabulary.__name__))  # fmt: skip


class Delivered(NamedTuple):
    """An event and its time."""

    now_ns: int
    event: Event


class Submitted(NamedTuple):
    """A command that the policy gave in answer to the last event."""

    command: Command


Line = Delivered | Submitted


# ---------------------------------------------------------------- values


def encode(value: Any) -> Any:
    """A value as JSON has it. ContractError for what would not come back the same."""
    if value is None or type(value) in (int, str, bool, float):
        return value
    kind = type(value)
    if kind is tuple:
        return [encode(item) for item in value]
    if _TYPES.get(kind.__name__) is kind:
        return {kind.__name__: value.value if isinstance(value, enum.Enum) else [encode(item) for item in value]}
    if kind is list:
        return {"list": [encode(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if hasattr(value, "__index__"):
        return value.__index__()  # an integer of numpy
    raise ContractError(f"a {kind.__name__} cannot be logged: {value!r:.80} (see common.log.register)")


def decode(value: Any) -> Any:
    """The inverse of `encode`. ValueError for what `encode` never wrote."""
    if isinstance(value, list):
        return tuple([decode(item) for item in value])
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"an object of {len(value)} keys where one should name a type")
    [(name, content)] = value.items()
    kind = _TYPES.get(name)
    if kind is not None and issubclass(kind, enum.Enum):
        return kind(content)
    if not isinstance(content, list):
        raise ValueError(f"{name} without a list of values")
    if name == "list":
        return [decode(item) for item in content]
    if name == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind is None:
        raise ValueError(f"unknown type {name!r} (of {OTHER}?)")
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    if len(content) != len(fields):
        raise ValueError(f"{name} with {len(content)} of {len(fields)} fields (of {OTHER}?)")
    return kind(*[decode(item) for item in content])


def to_text(line: Line) -> str:
    """One line of the file, without its end."""
    if isinstance(line, Delivered):
        return _dumps({"at": line.now_ns, "event": encode(line.event)})
    return _dumps({"command": encode(line.command)})


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


# ---------------------------------------------------------------- writing


class LogFile:
    """A log being written; use it in a `with`. After an error the lines so far stay in `<path>.partial`. With
    `at_once` each line is the operating system's before the next is written, so it outlives this process."""

    def __init__(self, path: str | Path, at_once: bool = False, cluster: ClusterInfo | None = None) -> None:
        self.path = Path(path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL)
        self._counts = {"events": 0, "commands": 0}
        try:
            self._file: TextIO = self.partial_path.open("w", 1 if at_once else -1, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self.partial_path}: cannot write the log ({error.strerror})") from error
        if cluster is not None:
            self._file.write(_dumps({"log": VERSION, "cluster": encode(cluster)}) + "\n")

    def append(self, line: Line) -> None:
        """Write one line (without `at_once` it reaches the disk by and by)."""
        self._file.write(to_text(line) + "\n")
        self._counts["events" if isinstance(line, Delivered) else "commands"] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._file.write(_dumps(self._counts) + "\n")
        self._file.close()
        if kind is None:
            self.partial_path.replace(self.path)


class Recorder:
    """An executor seen through a log: `sink` gets every event before the policy does, and every command.

    `sink` is `LogFile.append`, or the `append` of a list.
    """

    def __init__(self, executor: Executor, sink: Callable[[Line], object]) -> None:
        self._executor = executor
        self._sink = sink

    def submit(self, command: Command) -> None:
        """Log, then pass on: the command that an executor refuses is in the log."""
        self._sink(Submitted(command))
        self._executor.submit(command)

    def poll(self) -> tuple[int, Event] | None:
        """The executor's next event, logged."""
        item = self._executor.poll()
        if item is not None:
            self._sink(Delivered(*item))
        return item


# ---------------------------------------------------------------- reading


def find_log(folder: str | Path) -> Path | None:
    """The log in a run's folder: the complete one, else what a run that did not complete has left of it."""
    found = (Path(folder) / name for name in (LOG, LOG + PARTIAL))
    return next((path for path in found if path.is_file()), None)


def read_log(path: str | Path, partial: bool = False) -> Iterator[Line]:
    """The lines of a log, one by one. TraceError names file and line of whatever is broken.

    `partial`: a log without its last line is fine (that of an interrupted run).
    """
    path = Path(path)
    counts = {"events": 0, "commands": 0}
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                value = _parse(path, number, text, partial)
                if number == 1 and value is not None and "log" in value:
                    _check_head(path, value)
                    continue
                if value is None or "events" in value:
                    _check_end(path, number, value, counts, file)
                    return
                line = _line(path, number, value)
                counts["events" if isinstance(line, Delivered) else "commands"] += 1
                yield line
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}:{number + 1}: not text ({error.reason})") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot read the log ({error.strerror})") from error
    if not partial:
        raise TraceError(f"{path}:{number + 1}: the log ends without its last line (was the run interrupted?)")


def read_cluster(path: str | Path) -> ClusterInfo:
    """The cluster that a log's policy was told of. TraceError where the log has none that this code can read."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.readline()
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}:1: not text ({error.reason})") from error
    except OSError as error:
        raise TraceError(f"{path}: cannot read the log ({error.strerror})") from error
    if not text.endswith("\n"):
        raise TraceError(f"{path}:1: the log ends within its first line")
    value = _parse(path, 1, text, False)
    assert value is not None
    if "log" not in value:
        raise TraceError(f"{path}:1: the log does not begin with its cluster: it is of {OTHER}")
    _check_head(path, value)
    try:
        cluster = decode(value.get("cluster"))
    except (ValueError, TypeError) as error:
        raise TraceError(f"{path}:1: {error}: the log is of {OTHER}") from error
    if not isinstance(cluster, ClusterInfo):
        raise TraceError(f"{path}:1: the log does not begin with its cluster")
    return cluster


def _check_head(path: Path, value: dict[str, Any]) -> None:
    if value["log"] != VERSION:
        raise TraceError(f"{path}:1: the log is of {OTHER} (its lines are of version {value['log']!r}, not {VERSION})")


def _parse(path: Path, number: int, text: str, partial: bool) -> dict[str, Any] | None:
    """A line's object; None for the torn last line of a partial log."""
    try:
        value = json.loads(text)
    except ValueError as error:
        if partial and not text.endswith("\n"):
            return None
        raise TraceError(f"{path}:{number}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise TraceError(f"{path}:{number}: neither an event nor a command")
    return value


def _line(path: Path, number: int, value: dict[str, Any]) -> Line:
    try:
        if value.keys() == {"at", "event"}:
            now_ns, event = value["at"], decode(value["event"])
            if type(now_ns) is int and type(event) in Event.__args__:  # type: ignore[attr-defined]
                return Delivered(now_ns, event)
        elif value.keys() == {"command"}:
            command = decode(value["command"])
            if type(command) in Command.__args__:  # type: ignore[attr-defined]
                return Submitted(command)
    except (ValueError, TypeError) as error:
        raise TraceError(f"{path}:{number}: {error}") from error
    raise TraceError(f"{path}:{number}: neither an event nor a command")


def _check_end(
    path: Path, number: int, value: dict[str, Any] | None, counts: dict[str, int], rest: Iterable[str]
) -> None:
    if value is not None and value != counts:
        raise TraceError(f"{path}:{number}: the log should hold {value} but holds {counts}")
    for _ in rest:
        raise TraceError(f"{path}:{number + 1}: more lines after the last")
