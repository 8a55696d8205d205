"""A run as Chrome trace events, for ui.perfetto.dev or chrome://tracing.

One process per instance: its counters, its lanes (one thread each) with their iterations, its copies and marks.
One process for the requests. Sizes are capped: what was left out is said in `otherData.notes` and in the trace's first
process name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.metrics import as_numpy, sample_starts
from common.provenance import label
from common.record import SEGMENT_COLUMNS, RunRecord
from common.results import replacing
from common.runs import MANIFEST

MAX_REQUESTS = 2_000
MAX_SEGMENTS = 50_000  # about 7 MB
MAX_MOVES = 10_000
MAX_MARKS = 10_000
MAX_COUNTER_ROWS = 30_000  # about 7 MB
REQUESTS_PID = 1
FIRST_INSTANCE_PID = 10


def write_trace(record: RunRecord, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write `trace.json` (at most about 20 MB) from a run's record; facts default to the manifest beside it."""
    if facts is None:
        manifest = path.with_name(MANIFEST)
        facts = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    notes: list[str] = []
    events = _counters(record, notes) + _segments(record, notes) + _requests(record, notes)
    events += _moves(record, notes) + _marks(record, notes)
    events = _names(record, notes) + events
    other = {"label": label(facts), "notes": notes, **facts}
    with replacing(path) as temporary:
        temporary.write_text(
            '{"displayTimeUnit":"ms","otherData":' + json.dumps(other, default=str) + ',"traceEvents":[\n'
            + ",\n".join(events) + "\n]}\n",
            encoding="utf-8",
        )  # fmt: skip


def _pid(instance: int) -> int:
    return FIRST_INSTANCE_PID + instance


def _us(time_ns: int) -> str:
    """Microseconds, the unit of the format, to the nanosecond."""
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"


def _names(record: RunRecord, notes: list[str]) -> list[str]:
    """Metadata events: names of processes."""
    instances = {*record.timeline.instance, *record.segments.instance, *record.up_intervals}
    names = {REQUESTS_PID: "requests" + "".join(f" [{note}]" for note in notes)}
    names |= {_pid(i): f"instance {i}" for i in sorted(instances) if i >= 0}
    return [
        json.dumps({"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}})
        for pid, name in names.items()
    ]


def _counters(record: RunRecord, notes: list[str]) -> list[str]:
    """KV blocks and requests of each instance, of every n-th sample where there are many."""
    timeline = record.timeline
    time_ns = as_numpy(timeline.time_ns)
    if not len(time_ns):
        return []
    every = -(-len(time_ns) // MAX_COUNTER_ROWS)
    if every > 1:
        notes.append(f"counters: every {every}th sample")
    sample = np.zeros(len(time_ns), np.int64)
    sample[sample_starts(time_ns)[1:]] = 1
    rows = np.flatnonzero(np.cumsum(sample) % every == 0)
    names = ("instance", "kv_used_blocks", "kv_cached_blocks", "kv_capacity_blocks", "running", "waiting")
    columns = [as_numpy(getattr(timeline, name))[rows].tolist() for name in names]
    events = []
    for now, instance, used, cached, capacity, running, waiting in zip(time_ns[rows].tolist(), *columns):
        head = f'{{"ph":"C","pid":{_pid(instance)},"ts":{_us(now)},"name":'
        events.append(f'{head}"KV blocks","args":{{"used":{used},"cached":{cached}}}}}')
        events.append(f'{head}"KV capacity","args":{{"blocks":{capacity}}}}}')
        events.append(f'{head}"requests","args":{{"running":{running},"waiting":{waiting}}}}}')
    return events


def _segments(record: RunRecord, notes: list[str]) -> list[str]:
    """Runs of equal iterations as slices on their lane."""
    columns = [getattr(record.segments, name)[:MAX_SEGMENTS] for name in SEGMENT_COLUMNS]
    total = len(record.segments.start_ns)
    if total > MAX_SEGMENTS:
        notes.append(f"slices: the first {MAX_SEGMENTS:,} of {total:,}")
    return [
        f'{{"ph":"X","pid":{_pid(instance)},"tid":{lane},"ts":{_us(start)},"dur":{_us(end - start)},'
        f'"name":"{_segment_name(decodes, prefill)}",'
        f'"args":{{"iterations":{iterations},"decodes":{decodes},"prefill_tokens":{prefill}}}}}'
        for start, end, lane, instance, iterations, decodes, prefill in zip(*columns)
    ]


def _segment_name(decodes: int, prefill_tokens: int) -> str:
    if not prefill_tokens:
        return "decode"
    return "mixed" if decodes else "prefill"


def _requests(record: RunRecord, notes: list[str]) -> list[str]:
    """Each request from arrival to finish, with its first token, as an asynchronous slice."""
    requests, events, shown = record.requests, [], 0
    for i, (arrival, first, finish) in enumerate(zip(requests.arrival_ns, requests.first_token_ns, requests.finish_ns)):
        if arrival < 0 or finish < arrival:
            continue
        if shown == MAX_REQUESTS:
            notes.append(f"requests: the first {MAX_REQUESTS:,} that finished, of {len(requests.arrival_ns):,}")
            break
        shown += 1
        head = f'"cat":"request","pid":{REQUESTS_PID},"tid":0,"id":{i},"name":"request {i}"'
        args = f'"args":{{"prompt_tokens":{requests.prompt_tokens[i]},"output_tokens":{requests.output_tokens[i]}}}'
        events.append(f'{{"ph":"b",{head},"ts":{_us(arrival)},{args}}}')
        if first >= 0:
            events.append(f'{{"ph":"n",{head},"ts":{_us(first)},"args":{{"what":"first token"}}}}')
        events.append(f'{{"ph":"e",{head},"ts":{_us(finish)}}}')
    return events


def _moves(record: RunRecord, notes: list[str]) -> list[str]:
    """Copies, swaps and loads as asynchronous slices of their source: they may overlap."""
    moves, events = record.moves, []
    columns = (moves.start_ns, moves.end_ns, moves.src, moves.dst, moves.num_bytes, moves.request_id, moves.kind)
    for i, (start, end, src, dst, num_bytes, request, kind) in enumerate(zip(*columns)):
        if i == MAX_MOVES:
            notes.append(f"moves: the first {MAX_MOVES:,} of {len(moves.start_ns):,}")
            break
        pid = _pid(src if src >= 0 else dst)
        head = f'"cat":"move","pid":{pid},"tid":0,"id":"m{i}","name":{json.dumps(kind)}'
        args = f'"args":{{"src":{src},"dst":{dst},"bytes":{num_bytes},"request":{request}}}'
        events.append(f'{{"ph":"b",{head},"ts":{_us(start)},{args}}}')
        events.append(f'{{"ph":"e",{head},"ts":{_us(end)}}}')
    return events


def _marks(record: RunRecord, notes: list[str]) -> list[str]:
    """What policies marked, as instants of their instance."""
    if len(record.marks) > MAX_MARKS:
        notes.append(f"marks: the first {MAX_MARKS:,} of {len(record.marks):,}")
    return [
        f'{{"ph":"i","s":"p","pid":{_pid(instance)},"tid":0,"ts":{_us(now)},"name":{json.dumps(kind)},'
        f'"args":{{"text":{json.dumps(text)}}}}}'
        for now, instance, kind, text in record.marks[:MAX_MARKS]
    ]
