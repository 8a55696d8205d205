"""JSONL traces with hash ids: Mooncake (512 tokens, ms), Bailian (16, s, chats), LLMServingSim's ShareGPT (16, ns)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from common.errors import TraceError
from workloads.config import File
from workloads.readers.rows import Rows, columns, from_start, integers, times_ns
from workloads.types import Ints

Record = dict[str, Any]
BLOCK_SIZES = (16, 512, 32, 64, 128, 256, 1024, 8)


def read_jsonl(handle: TextIO, file: str, config: File) -> Rows:
    records, numbers = _records(handle, file)
    arrival, prompt, output = columns(file, list(records[0]), need_arrival=True)
    assert arrival is not None
    is_chat = "chat_id" in records[0]
    unit = arrival[1] or ("s" if is_chat else "ms")
    if config.time_unit != "auto":
        unit = config.time_unit
    texts = {name: _column(records, numbers, file, name) for name in (arrival[0], prompt, output)}
    session, parent = _chats(records, numbers, file) if is_chat else (None, None)
    kind = "bailian" if is_chat else "llmservingsim" if unit == "ns" else "mooncake"
    return Rows(
        file,
        kind,
        np.array(numbers, np.int64),
        from_start(times_ns(texts[arrival[0]], numbers, file, arrival[0], unit)),
        integers(texts[prompt], numbers, file, prompt),
        integers(texts[output], numbers, file, output),
        session=session,
        parent=parent,
        hashes=_hashes(records, numbers, file) if "hash_ids" in records[0] else None,
    )


def _records(handle: TextIO, file: str) -> tuple[list[Record], list[int]]:
    records: list[Record] = []
    numbers: list[int] = []
    for number, line in enumerate(handle, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{file}, row {number}: not a JSON object ({error})") from None
        if not isinstance(record, dict):
            raise TraceError(f"{file}, row {number}: not a JSON object but {type(record).__name__}")
        records.append(record)
        numbers.append(number)
    return records, numbers


def _column(records: list[Record], numbers: Sequence[int], file: str, name: str) -> list[object]:
    try:
        return [record[name] for record in records]
    except KeyError:
        index = next(i for i, record in enumerate(records) if name not in record)
        raise TraceError(f"{file}, row {numbers[index]} has no {name!r}") from None


def _hashes(records: list[Record], numbers: Sequence[int], file: str) -> list[list[int]]:
    hashes = _column(records, numbers, file, "hash_ids")
    for index, row in enumerate(hashes):
        if not isinstance(row, list) or not all(type(block) is int and abs(block) < 2**63 for block in row):
            raise TraceError(f"{file}, row {numbers[index]}: hash_ids is not a list of whole numbers")
    return hashes  # type: ignore[return-value]


def _chats(records: list[Record], numbers: Sequence[int], file: str) -> tuple[Ints, Ints]:
    """Session and row of the parent turn; a parent outside the file (or later in it) starts a new session."""
    row_of: dict[object, int] = {}
    session = np.empty(len(records), np.int64)
    parent = np.full(len(records), -1, np.int64)
    num_sessions = 0
    chats = _column(records, numbers, file, "chat_id")
    for index, record in enumerate(records):
        for name in ("chat_id", "parent_chat_id"):
            if isinstance(record.get(name), list | dict):
                raise TraceError(f"{file}, row {numbers[index]}: {name} is {record[name]!r}, not an id")
        before = row_of.get(record.get("parent_chat_id", -1))
        if before is None:
            session[index] = num_sessions
            num_sessions += 1
        else:
            session[index], parent[index] = session[before], before
        row_of[chats[index]] = index
    return session, parent


def block_size(rows: Rows, config: File) -> int:
    """Tokens per hash id: from config, else the size that explains every row (full blocks, or a partial last)."""
    if config.block_size is not None:
        return config.block_size
    assert rows.hashes is not None
    count = np.fromiter(map(len, rows.hashes), np.int64, len(rows.hashes))
    usual = 512 if rows.format == "mooncake" else 16
    for size in (usual, *BLOCK_SIZES):
        if np.all((count == rows.prompt // size) | (count == -(-rows.prompt // size))):
            return size
    raise TraceError(f"{rows.file}: no block size explains its hash_ids; set workload.block_size")
