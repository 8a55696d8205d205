"""CSV traces: Azure LLM inference 2023 and 2024, BurstGPT (6 and 8 columns), and plain ones, told by their header."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TextIO

import numpy as np

from common.errors import TraceError
from workloads.config import File
from workloads.readers.rows import Rows, columns, from_start, integers, normal, times_ns
from workloads.types import Ints

FIRST_YEAR, LAST_YEAR = "1678", "2262"  # of 64-bit nanoseconds; as text, which dates begin with
BATCH = 100_000  # rows held as text at a time: a week of Azure 2024 is tens of millions


def read_csv(handle: TextIO, file: str, config: File) -> Rows:
    lines = csv.reader(handle)
    header = [name.strip() for name in next(lines, [])]
    arrival, prompt, output = columns(file, header, need_arrival=False)
    kind = {"contexttokens": "azure", "requesttokens": "burstgpt"}.get(normal(prompt), "plain")
    session = next((name for name in header if normal(name) == "sessionid"), None) if kind == "burstgpt" else None
    wanted = [name for name in (arrival and arrival[0], prompt, output, session) if name]
    place = [header.index(name) for name in wanted]
    numbers: list[Ints] = []
    parts: list[list[Ints]] = []
    sessions: dict[str, int] = {}
    for rows, lineno in _batches(lines):
        numbers.append(np.array(lineno, np.int64))
        texts = dict(zip(wanted, _columns(rows, place, lineno, file, len(header)), strict=True))
        part = [integers(texts[name], lineno, file, name) for name in (prompt, output)]
        if arrival:
            unit = arrival[1] or (config.time_unit if config.time_unit != "auto" else "s")
            part.append(_times(texts[arrival[0]], lineno, file, arrival[0], unit))
        if session:
            part.append(_sessions(texts[session], sessions))
        parts.append(part)
    if not parts:
        raise TraceError(f"{file}: a header but no rows; there is nothing to replay")
    whole = [np.concatenate([part[i] for part in parts]) for i in range(len(parts[0]))]
    return Rows(
        file,
        kind,
        np.concatenate(numbers),
        from_start(whole[2]) if arrival else None,
        whole[0],
        whole[1],
        failed=whole[1] == 0 if kind == "burstgpt" else None,
        session=whole[-1] if session else None,
    )


def _batches(lines: Iterator[list[str]]) -> Iterator[tuple[list[list[str]], list[int]]]:
    """Rows with their numbers; blank lines are skipped."""
    rows: list[list[str]] = []
    numbers: list[int] = []
    for number, row in enumerate(lines, start=2):
        if not row:
            continue
        rows.append(row)
        numbers.append(number)
        if len(rows) == BATCH:
            yield rows, numbers
            rows, numbers = [], []
    if rows:
        yield rows, numbers


def _columns(
    rows: list[list[str]], place: Sequence[int], numbers: Sequence[int], file: str, width: int
) -> list[list[str]]:
    try:
        found = [list(map(itemgetter(index), rows)) for index in place]
        # A longer row is shifted somewhere, unless commas at its end are all that there is.
        wrong = next((i for i, row in enumerate(rows) if len(row) > width and any(row[width:])), None)
    except IndexError:
        found, wrong = [], next(i for i, row in enumerate(rows) if len(row) <= max(place))
    if wrong is not None:
        raise TraceError(f"{file}, row {numbers[wrong]} has {len(rows[wrong])} columns where the header has {width}")
    return found


def _times(values: list[str], numbers: Sequence[int], file: str, column: str, unit: str) -> Ints:
    """Numbers, or dates as in Azure's traces (2024's carry a time zone)."""
    if "-" not in values[0][1:] or "e-" in values[0].lower():
        return times_ns(values, numbers, file, column, unit)
    dates = values
    shift = np.zeros(1, np.int64)
    if values[0].endswith("Z") or (values[0][-6:-5] in ("+", "-") and values[0][-3:-2] == ":"):
        dates, shift = _without_zone(values)
    try:
        if min(dates) < FIRST_YEAR or max(dates) >= LAST_YEAR:
            raise ValueError
        return np.array(dates, "datetime64[ns]").astype(np.int64) - shift
    except ValueError:
        index = next((i for i, date in enumerate(dates) if not _is_date(date)), None)
    if index is not None:
        raise TraceError(f"{file}, row {numbers[index]}: {column} is {values[index]!r}, not a date and time")
    return np.array(dates, "datetime64[ns]").astype(np.int64) - shift


def _without_zone(values: list[str]) -> tuple[list[str], Ints]:
    """Dates without their zone, and the zone in nanoseconds east of UTC (bad zones become bad dates)."""
    dates: list[str] = []
    minutes: list[int] = []
    for value in values:
        zone = "+00:00" if value.endswith("Z") else value[-6:]
        hours, colon, rest = zone[1:].partition(":")
        if zone[:1] not in "+-" or not (colon and hours.isdigit() and rest.isdigit()):
            dates.append("no zone")
            minutes.append(0)
            continue
        dates.append(value.removesuffix("Z") if value.endswith("Z") else value[:-6])
        minutes.append((int(hours) * 60 + int(rest)) * (-1 if zone[0] == "-" else 1))
    return dates, np.array(minutes, np.int64) * 60_000_000_000


def _is_date(text: str) -> bool:
    """numpy also knows "today", takes "" for no time at all, and wraps years that nanoseconds do not reach."""
    text = text.strip()
    try:
        return FIRST_YEAR <= text < LAST_YEAR and bool(np.datetime64(text, "ns") == np.datetime64(text, "ns"))
    except ValueError:
        return False


def _sessions(values: list[str], known: dict[str, int]) -> Ints:
    """Ids in order of appearance; a row without one is a session of its own."""
    return np.array([known.setdefault(value or f"\0{len(known)}", len(known)) for value in values], np.int64)
