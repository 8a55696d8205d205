"""What every reader produces, and the checks that all of them share. Row numbers count from 1, header included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.errors import TraceError
from workloads.config import File
from workloads.transform import ABSURD_TOKENS, Mask, overlong_message, zero_message
from workloads.types import Ints

UNITS_NS = {"s": 1e9, "ms": 1e6, "us": 1e3, "ns": 1.0}
EPOCH_S = 1e8  # numbers beyond three years are dates, not times since the start of a trace
MOST_NS = 4e18  # what fits into 64-bit nanoseconds


@dataclass(frozen=True)
class Rows:
    """Columns of a trace. `number` is each row's place in its file, for messages."""

    file: str
    format: str
    number: Ints
    arrival_ns: Ints | None
    prompt: Ints
    output: Ints
    failed: Mask | None = None
    session: Ints | None = None
    parent: Ints | None = None  # row index of the turn before, -1: none
    hashes: Sequence[Sequence[int]] | None = None

    def where(self, index: int) -> str:
        return f"{self.file}, row {int(self.number[index])}"


def select(rows: Rows, index: Ints) -> Rows:
    """The rows of `index`, in that order; parents that are not among them are forgotten."""
    position = np.full(len(rows.prompt) + 1, -1, np.int64)  # the last cell answers for "no parent"
    position[index] = np.arange(len(index))
    return replace(
        rows,
        number=rows.number[index],
        arrival_ns=None if rows.arrival_ns is None else rows.arrival_ns[index],
        prompt=rows.prompt[index],
        output=rows.output[index],
        failed=None if rows.failed is None else rows.failed[index],
        session=None if rows.session is None else rows.session[index],
        parent=None if rows.parent is None else position[rows.parent[index]],
        hashes=None if rows.hashes is None else [rows.hashes[i] for i in index.tolist()],
    )


def checked(rows: Rows, config: File) -> tuple[Rows, dict[str, int]]:
    """Rows in order of arrival, failures dropped, and what that did; bad rows are TraceErrors."""
    _refuse(rows, (rows.prompt < 0) | (rows.output < 0), "a negative number of tokens; remove the row")
    counts = {"dropped_failures": 0, "sorted_rows": 0}
    if rows.failed is not None and rows.failed.any():
        counts["dropped_failures"] = int(rows.failed.sum())
        rows = select(rows, np.flatnonzero(~rows.failed))
    if len(rows.prompt) == 0:
        raise TraceError(f"{rows.file}: every row is a failed request; nothing is left to replay")
    if rows.arrival_ns is not None:
        _refuse(rows, rows.arrival_ns < 0, "a negative timestamp; shift the times to start at 0")
        rows, counts["sorted_rows"] = _in_order(rows, config)
    _check_lengths(rows, config)
    return rows, counts


def _refuse(rows: Rows, bad: Mask, what: str) -> None:
    if bad.any():
        raise TraceError(f"{rows.where(int(np.argmax(bad)))} has {what}")


def _in_order(rows: Rows, config: File) -> tuple[Rows, int]:
    assert rows.arrival_ns is not None
    back = np.diff(rows.arrival_ns) < 0
    if not back.any():
        return rows, 0
    if config.unordered == "error":
        index = int(np.argmax(back)) + 1
        raise TraceError(f"{rows.where(index)} is earlier than the row before it; set workload.unordered=sort")
    return select(rows, np.argsort(rows.arrival_ns, kind="stable")), int(back.sum())


def _check_lengths(rows: Rows, config: File) -> None:
    """Only the policies `error` speak here, where the row is known; the others act in `transform.limit`."""
    if config.zero_tokens == "error":
        empty = (rows.prompt == 0) | (rows.output == 0)
        if empty.any():
            raise TraceError(zero_message(rows.where(int(np.argmax(empty)))))
    most = config.max_prompt_tokens or ABSURD_TOKENS
    over = rows.prompt * config.length_scale > most
    if config.overlong == "error" and over.any():
        index = int(np.argmax(over))
        raise TraceError(overlong_message(rows.where(index), int(rows.prompt[index]), most))


def integers(values: Sequence[object], numbers: Sequence[int], file: str, column: str) -> Ints:
    """Token counts; whole numbers written as floats are accepted."""
    try:
        if all(type(value) is int or type(value) is str for value in values):
            return np.array([int(value) for value in values], np.int64)  # type: ignore[call-overload]
    except (ValueError, OverflowError):
        pass
    out = np.empty(len(values), np.int64)
    for index, value in enumerate(values):
        number = None if isinstance(value, bool) else _number(value)
        if number is None or number != int(number) or abs(number) > 2**62:
            raise TraceError(f"{file}, row {numbers[index]}: {column} is {value!r}, not a number of tokens")
        out[index] = int(number)
    return out


def times_ns(values: Sequence[object], numbers: Sequence[int], file: str, column: str, unit: str) -> Ints:
    """Numbers in `unit` (nanoseconds stay exact)."""
    if unit == "ns" and all(type(value) is int and abs(value) < MOST_NS for value in values):
        return np.array(values, np.int64)
    try:
        floats = np.array([float(value) for value in values])  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        floats = np.array([np.nan if (n := _number(v)) is None else n for v in values])
    bad = ~(np.abs(floats) < MOST_NS / UNITS_NS[unit])
    if bad.any():
        index = int(np.argmax(bad))
        hint = f" in {unit}; workload.time_unit may be s, ms, us or ns" if np.isfinite(floats[index]) else ""
        raise TraceError(f"{file}, row {numbers[index]}: {column} is {values[index]!r}, not a time{hint}")
    return np.rint(floats * UNITS_NS[unit]).astype(np.int64)


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def from_start(times: Ints) -> Ints:
    """Dates become times since the first row; times since a start stay as they are."""
    return times - times.min() if len(times) and times.min() > EPOCH_S * 1e9 else times


# Column names, normalised (lower case, letters and digits only), without a unit at the end.
ARRIVAL = ("timestamp", "arrival", "arrivals", "arrivedat", "arrivaltime", "arrivaltimestamp", "time", "requesttime")
PROMPT = (
    "contexttokens", "requesttokens", "numprefilltokens", "prompt", "prompttokens", "promptlen", "promptlength",
    "numprompttokens", "input", "inputtokens", "inputtoks", "inputlen", "inputlength", "isl",
)  # fmt: skip
OUTPUT = (
    "generatedtokens", "responsetokens", "numdecodetokens", "output", "outputtokens", "outputtoks", "outputlen",
    "outputlength", "completiontokens", "generated", "numoutputtokens", "decodetokens", "osl",
)  # fmt: skip


def normal(name: object) -> str:
    return "".join(letter for letter in str(name).lower() if letter.isalnum())


def match(names: Sequence[str], known: Sequence[str], units: bool = False) -> tuple[str, str | None] | None:
    """The first of `names` that is a `known` one, and the unit that its ending states."""
    for name in names:
        plain = normal(name)
        if plain in known:
            return name, None
        for unit in UNITS_NS if units else ():
            if name.lower().endswith(f"_{unit}") and normal(name[: -len(unit) - 1]) in known:
                return name, unit
    return None


def columns(file: str, names: Sequence[str], need_arrival: bool) -> tuple[tuple[str, str | None] | None, str, str]:
    """(arrival column and its unit), prompt column, output column; missing ones are a TraceError."""
    arrival, prompt, output = match(names, ARRIVAL, units=True), match(names, PROMPT), match(names, OUTPUT)
    missing = [what for what, found in (("prompt tokens", prompt), ("output tokens", output)) if not found]
    if need_arrival and not arrival:
        missing.insert(0, "arrival times")
    if missing or prompt is None or output is None:
        given = ", ".join(str(name)[:40] for name in names[:12])
        raise TraceError(
            f"{file}, row 1: no column for {' and '.join(missing)} among [{given}]; "
            "name them arrival_s, prompt_tokens, output_tokens (docs/workloads.md lists the formats)"
        )
    return arrival, prompt[0], output[0]
