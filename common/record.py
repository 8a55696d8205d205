"""What a run leaves behind, in columns: filled by the executor and the driver, read by metrics and figures."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from struct import Struct

from common.policy import Gauge


def _column() -> array[int]:
    return array("q")


@dataclass(slots=True)
class RequestColumns:
    """One row per request of the workload, in its order; times in ns, -1 = never happened."""

    arrival_ns: array[int]
    first_token_ns: array[int]
    finish_ns: array[int]
    prompt_tokens: array[int]
    output_tokens: array[int]  # generated so far: the true length once finished
    status: array[int]  # RequestStatus
    num_preemptions: array[int]
    num_migrations: array[int]
    cached_tokens: array[int]  # prompt tokens found in a prefix cache at the first admission
    instance: array[int]  # where it finished, -1 unknown
    reasons: dict[int, str] = field(default_factory=dict)  # of rejected requests
    model: array[int] | None = None  # which of the cluster's models it asked for; None: there is one

    @classmethod
    def empty(cls, num_requests: int) -> RequestColumns:
        """Columns for `num_requests` requests, none of which has arrived."""
        never = array("q", [-1]) * num_requests
        zero = array("q", [0]) * num_requests
        return cls(never[:], never[:], never[:], zero[:], zero[:], zero[:], zero[:], zero[:], zero[:], never[:])


def _unpack(packed: bytearray, columns: list[array[int]]) -> None:
    """Move rows into columns."""
    with memoryview(packed) as rows, rows.cast("q") as values:
        for index, column in enumerate(columns):
            column.frombytes(values[index :: len(columns)].tobytes())
    packed.clear()


SEGMENT_COLUMNS = ("start_ns", "end_ns", "lane", "instance", "iterations", "decodes", "prefill_tokens")
pack_segment = Struct(f"{len(SEGMENT_COLUMNS)}q").pack  # in this order


@dataclass(slots=True)
class SegmentColumns:
    """Runs of equal iterations of a lane: `iterations` of them from start to end, each giving one token to each of
    `decodes` requests and computing `prefill_tokens` (all iterations together). The source of ITL and of busy time."""

    start_ns: array[int] = field(default_factory=_column)
    end_ns: array[int] = field(default_factory=_column)
    lane: array[int] = field(default_factory=_column)
    instance: array[int] = field(default_factory=_column)  # of the first stage
    iterations: array[int] = field(default_factory=_column)
    decodes: array[int] = field(default_factory=_column)
    prefill_tokens: array[int] = field(default_factory=_column)
    packed: bytearray = field(default_factory=bytearray)  # rows not yet in the columns, by `pack_segment`

    def flush(self, at_least: int = 1) -> None:
        """Move `packed` rows (one append each, which is faster) into the columns once they are that many bytes."""
        if len(self.packed) >= at_least:
            _unpack(self.packed, [getattr(self, name) for name in SEGMENT_COLUMNS])


TIMELINE_COLUMNS = ("time_ns", *Gauge._fields)
_pack_sample = Struct(f"{len(TIMELINE_COLUMNS)}q").pack  # in this order


@dataclass(slots=True)
class TimelineColumns:
    """Samples of the policy's gauges."""

    time_ns: array[int] = field(default_factory=_column)
    instance: array[int] = field(default_factory=_column)
    running: array[int] = field(default_factory=_column)
    waiting: array[int] = field(default_factory=_column)
    kv_used_blocks: array[int] = field(default_factory=_column)
    kv_capacity_blocks: array[int] = field(default_factory=_column)
    kv_cached_blocks: array[int] = field(default_factory=_column)
    kv_lent_blocks: array[int] = field(default_factory=_column)
    kv_borrowed_blocks: array[int] = field(default_factory=_column)
    param_bytes: array[int] = field(default_factory=_column)
    packed: bytearray = field(default_factory=bytearray)  # rows not yet in the columns

    def sample(self, now_ns: int, gauge: Gauge) -> None:
        """Append one row."""
        self.packed += _pack_sample(now_ns, *gauge)

    def flush(self, at_least: int = 1) -> None:
        """Move packed rows into the columns once they are that many bytes."""
        if len(self.packed) >= at_least:
            _unpack(self.packed, [getattr(self, name) for name in TIMELINE_COLUMNS])


@dataclass(slots=True)
class MoveColumns:
    """Bytes that crossed a link: copies, swaps and parameter loads, `kind` names the command."""

    start_ns: array[int] = field(default_factory=_column)
    end_ns: array[int] = field(default_factory=_column)
    src: array[int] = field(default_factory=_column)
    dst: array[int] = field(default_factory=_column)
    num_bytes: array[int] = field(default_factory=_column)
    request_id: array[int] = field(default_factory=_column)
    kind: list[str] = field(default_factory=list)


@dataclass(slots=True)
class StallColumns:
    """From leaving a lane to the next token; `cause` is how it left (see `common.executors.simstalls`)."""

    request_id: array[int] = field(default_factory=_column)
    begin_ns: array[int] = field(default_factory=_column)
    end_ns: array[int] = field(default_factory=_column)
    cause: list[str] = field(default_factory=list)


@dataclass(slots=True)
class StageColumns:
    """Times in which an instance's pipeline had work, and how much of it the instance was busy."""

    start_ns: array[int] = field(default_factory=_column)
    end_ns: array[int] = field(default_factory=_column)
    instance: array[int] = field(default_factory=_column)
    busy_ns: array[int] = field(default_factory=_column)


@dataclass(slots=True)
class ServingColumns:
    """Remote attention that an instance served, and its own iterations meanwhile (see `common.executors.simserving`).
    `token_ns`: every own token's iteration, summed; `served_ns`: time given to others."""

    start_ns: array[int] = field(default_factory=_column)
    end_ns: array[int] = field(default_factory=_column)
    instance: array[int] = field(default_factory=_column)
    iterations: array[int] = field(default_factory=_column)
    busy_ns: array[int] = field(default_factory=_column)
    slowed_ns: array[int] = field(default_factory=_column)
    tokens: array[int] = field(default_factory=_column)
    token_ns: array[int] = field(default_factory=_column)
    token_slowed_ns: array[int] = field(default_factory=_column)
    served_ns: array[int] = field(default_factory=_column)


@dataclass(slots=True)
class RemapColumns:
    """Drops, shrinks and loads that are done. `start_ns` is the command's; afterwards the KV range has `kv_cells`
    cells, `spare_bytes` of the dropped layers make no whole cell, and `spare_cells` make no block of all layers that
    the instance still holds."""

    start_ns: array[int] = field(default_factory=_column)
    end_ns: array[int] = field(default_factory=_column)
    instance: array[int] = field(default_factory=_column)
    layers: array[int] = field(default_factory=_column)
    kv_cells: array[int] = field(default_factory=_column)
    spare_bytes: array[int] = field(default_factory=_column)
    spare_cells: array[int] = field(default_factory=_column)
    kind: list[str] = field(default_factory=list)


@dataclass(slots=True)
class RunRecord:
    """Everything that a run leaves behind besides its configuration."""

    requests: RequestColumns
    segments: SegmentColumns = field(default_factory=SegmentColumns)
    timeline: TimelineColumns = field(default_factory=TimelineColumns)
    moves: MoveColumns = field(default_factory=MoveColumns)
    stalls: StallColumns = field(default_factory=StallColumns)
    stages: StageColumns = field(default_factory=StageColumns)
    remaps: RemapColumns = field(default_factory=RemapColumns)
    serving: ServingColumns = field(default_factory=ServingColumns)
    marks: list[tuple[int, int, str, str]] = field(default_factory=list)  # (time_ns, instance, kind, text)
    up_intervals: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # instance -> (from, to) ns
    end_ns: int = 0
    num_events: int = 0
    num_commands: int = 0
    num_iterations: int = 0
    partial: bool = False  # the run stopped early
    stopped: str = ""  # why
