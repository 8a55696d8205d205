"""What a run leaves in its folder, written so that no reader ever sees half a file (read by `runs`).

Every file is written under a temporary name beside its place and then renamed. The manifest comes last: a
folder with a manifest holds everything else. `requests.parquet` holds nothing but the run's own time, so its
bytes are the same for the same seed; wall-clock time is in the manifest only. `docs/results.md` lists columns
and keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.log import LOG, PARTIAL
from common.metrics import Ints, Requests, as_numpy, num_up
from common.predictions import Prediction, predictions
from common.provenance import git_state, package_versions, runtime_label
from common.record import SEGMENT_COLUMNS, TIMELINE_COLUMNS, MoveColumns, RunRecord
from common.runs import MANIFEST, LoadedRun, load_run
from common.types import RequestStatus

__all__ = ["LoadedRun", "RunFolder", "load_run", "replacing"]

STATUS_NAMES = tuple(status.name.lower() for status in sorted(RequestStatus))
TABLES = ("requests", "timeline", "segments", "moves", "marks", "stalls", "stages", "remaps", "serving",
          "predictions")
OWN_FILES = ("config.yaml", "summary.json", "trace.json", "outputs.jsonl", "traceback.txt", LOG, LOG + PARTIAL,
             *(f"{name}.parquet" for name in TABLES))  # fmt: skip
FIGURES = ("overview", "latency_cdf", "instances")


class RunFolder:
    """The folder `<results root>/<name>` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started_at = time.strftime("%Y-%m-%dT%H:%M:%S%z")

    @classmethod
    def create(cls, results_root: str | Path, name: str, config_yaml: str, overwrite: bool = True) -> RunFolder:
        """Make the folder, with the configuration in it, or take it over: what an older run left there goes.

        Call it before the run, so that a folder that cannot be written stops it at once (ConfigError), and one whose
        process was killed says which run it was. Nothing of an older run may lie beside this run's configuration.
        """
        path = Path(results_root) / _checked_name(name)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not overwrite and (path / MANIFEST).exists():
                raise ConfigError(f"run.name={name}: {path} holds a finished run; choose another name")
            folder = cls(path)
            with tempfile.TemporaryFile(dir=path):  # before anything goes
                pass
            folder._remove_older()
            folder.write_text("config.yaml", config_yaml)
        except OSError as error:
            raise _unwritable(path, error) from error
        return folder

    def write(
        self,
        record: RunRecord,
        *,
        summary: Mapping[str, Any],
        facts: Mapping[str, Any],
        simulate_s: float,
        log_segments: bool = False,
        outputs: str | None = None,
    ) -> dict[str, Any]:
        """Write tables, summary and at last the manifest, which is returned.

        `facts` go into the manifest as they are: at least system, workload, model, hardware, runtime, seed.
        `wall_seconds` there is `simulate_s` plus the time that the two Parquet files took (`write_s`).
        """
        _preload()
        with self._user_errors():
            begin = time.perf_counter()
            self.write_table("requests", requests_columns(record))
            self.write_table("timeline", timeline_columns(record))
            write_s = time.perf_counter() - begin
            for table, columns in optional_tables(record, log_segments).items():
                self.write_table(table, columns)
            if outputs is not None:
                self.write_text("outputs.jsonl", outputs)
            self.write_text("summary.json", _json(summary))
            manifest = _manifest(record, facts, self._started_at, simulate_s, write_s)
            self.write_text(MANIFEST, _json(manifest))
        return manifest

    def write_table(self, table: str, columns: Mapping[str, Any]) -> None:
        """Write `<table>.parquet` from columns: integer or float arrays, or pyarrow's own."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = [arrow_array(c) if isinstance(c, np.ndarray) else c for c in columns.values()]
        texts = [name for name, array in zip(columns, arrays) if not pa.types.is_primitive(array.type)]
        with replacing(self.path / f"{table}.parquet") as temporary:
            pq.write_table(
                pa.Table.from_arrays(arrays, names=list(columns)), temporary, compression="none",
                use_dictionary=texts or False, write_statistics=False, version="2.6", row_group_size=1 << 20,
            )  # fmt: skip

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        with replacing(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _remove_older(self) -> None:
        """The manifest first: without one a folder is nobody's finished run."""
        figures = [f"{stem}.{kind}" for stem in FIGURES for kind in ("png", "pdf")]
        for name in (MANIFEST, *OWN_FILES, *figures):
            (self.path / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self.path, error) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: renamed to it on success, removed on any failure or interrupt."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _checked_name(name: str) -> PurePosixPath:
    """A run name is a relative path that stays inside the results folder."""
    path = PurePosixPath(name)
    if not name.strip() or path.is_absolute() or ".." in path.parts or "\0" in name or path == PurePosixPath("."):
        raise ConfigError(f"run.name={name!r}: give a plain folder name, such as run.name=my_run")
    return path


def _unwritable(path: Path, error: OSError) -> ConfigError:
    why = error.strerror or str(error).splitlines()[0]
    return ConfigError(f"results folder {path} cannot be written ({why}): choose another folder or free this one")


def _preload() -> None:
    """Import what writing needs: imports are not part of `write_s`."""
    import pyarrow.fs
    import pyarrow.parquet  # noqa: F401


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def arrow_array(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None = None) -> Any:
    """The same memory as a pyarrow array, null where not `valid` (`pyarrow.array` imports pandas: 0.3 s)."""
    import pyarrow as pa

    kinds = {"int64": pa.int64(), "int8": pa.int8(), "float64": pa.float64()}
    bits = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kinds[values.dtype.name], len(values), [bits, data])


def requests_columns(record: RunRecord) -> dict[str, Any]:
    """Columns of requests.parquet; what never happened is null in s and ms, -1 in ns."""
    columns, view = record.requests, Requests.of(record.requests)

    def seconds(time_ns: Ints) -> Any:
        return arrow_array(time_ns / 1e9, time_ns >= 0)

    def millis(values: npt.NDArray[np.float64]) -> Any:
        return arrow_array(values, ~np.isnan(values))

    return {
        "request_id": np.arange(len(view.arrival_ns), dtype=np.int64),
        "arrival_s": seconds(view.arrival_ns),
        "first_token_s": seconds(view.first_ns),
        "finish_s": seconds(view.finish_ns),
        "prompt_tokens": view.prompt_tokens,
        "output_tokens": view.output_tokens,
        "status": _dictionary(as_numpy(columns.status).astype(np.int8), STATUS_NAMES),
        "num_preemptions": as_numpy(columns.num_preemptions),
        "num_migrations": as_numpy(columns.num_migrations),
        "cached_tokens": as_numpy(columns.cached_tokens),
        "instance": as_numpy(columns.instance),
        **({} if columns.model is None else {"model": as_numpy(columns.model)}),
        "ttft_ms": millis(view.ttft_ms),
        "tpot_ms": millis(view.tpot_ms),
        "e2el_ms": millis(view.e2el_ms),
        "arrival_ns": view.arrival_ns,
        "first_token_ns": view.first_ns,
        "finish_ns": view.finish_ns,
        "reject_reason": _reasons(columns.reasons, len(view.arrival_ns)),
    }


def _dictionary(codes: npt.NDArray[np.int8], names: tuple[str, ...]) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(arrow_array(codes), _strings(names))


def _reasons(reasons: Mapping[int, str], num_requests: int) -> Any:
    import pyarrow as pa

    if not reasons:
        return pa.nulls(num_requests, pa.string())
    rows = sorted(reasons)
    valid, lengths = np.zeros(num_requests, bool), np.zeros(num_requests, np.int32)
    texts = [reasons[row].encode() for row in rows]
    valid[rows], lengths[rows] = True, [len(text) for text in texts]
    return _text_array(valid, lengths, b"".join(texts))


def _strings(values: Sequence[str | None]) -> Any:
    texts = [(value or "").encode() for value in values]
    lengths = np.array([len(text) for text in texts], np.int32)
    return _text_array(np.array([value is not None for value in values], bool), lengths, b"".join(texts))


def _text_array(valid: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int32], texts: bytes) -> Any:
    """Texts one behind the other as a pyarrow array, null where not `valid` (and then of length 0)."""
    import pyarrow as pa

    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    bits = np.packbits(valid, bitorder="little")
    return pa.StringArray.from_buffers(len(valid), *map(pa.py_buffer, (offsets, texts, bits)))


def timeline_columns(record: RunRecord) -> dict[str, Any]:
    """Columns of timeline.parquet: the samples, what had crossed each instance's links, and instances up."""
    timeline = record.timeline
    time_ns, instance = as_numpy(timeline.time_ns), as_numpy(timeline.instance)
    names = [name for name in TIMELINE_COLUMNS if name not in ("time_ns", "instance")]
    spans = [span for spans in record.up_intervals.values() for span in spans]
    begin, end = np.array(spans or [(0, 0)], np.int64).T
    end = np.where(end < begin, np.iinfo(np.int64).max, end)
    return {
        "time_s": time_ns / 1e9,
        "time_ns": time_ns,
        "instance": instance,
        **{name: as_numpy(getattr(timeline, name)) for name in names},
        "moved_bytes": moved_bytes(record.moves, instance, time_ns),
        "num_instances_up": num_up(begin, end, time_ns),
    }


def moved_bytes(moves: MoveColumns, instance: Ints, time_ns: Ints) -> Ints:
    """Bytes of moves from or to `instance` that had ended by `time_ns`, row by row."""
    if not len(moves.end_ns) or not len(time_ns):
        return np.zeros(len(time_ns), np.int64)
    src, dst, end = as_numpy(moves.src), as_numpy(moves.dst), as_numpy(moves.end_ns)
    num_bytes = as_numpy(moves.num_bytes)
    other = (dst != src) & (dst >= 0)  # a swap stays on one instance: count it once
    where = np.concatenate((src, dst[other]))
    when, amount = np.concatenate((end, end[other])), np.concatenate((num_bytes, num_bytes[other]))
    order = np.lexsort((when, where))
    stride = int(max(when.max(), time_ns.max())) + 1
    keys = where[order] * stride + when[order]
    total = np.concatenate(([0], np.cumsum(amount[order])))
    until = np.searchsorted(keys, instance * stride + time_ns, side="right")
    return np.asarray(total[until] - total[np.searchsorted(keys, instance * stride, side="left")])


def optional_tables(record: RunRecord, log_segments: bool) -> dict[str, dict[str, Any]]:
    """Tables that only some runs have: marks, stalls, stages, remaps and serving where there are any, segments and
    moves where asked for."""
    tables: dict[str, dict[str, Any]] = {}
    if record.marks:
        time_ns, instance, kind, text = zip(*record.marks)
        tables["marks"] = {"time_ns": np.array(time_ns, np.int64), "instance": np.array(instance, np.int64),
                           "kind": _strings(kind), "text": _strings(text)}  # fmt: skip
    for name in ("stalls", "stages", "remaps", "serving"):
        columns = _columns(getattr(record, name))
        if len(next(iter(columns.values()))):
            tables[name] = columns
    rows = predictions(record)
    if rows:
        tables["predictions"] = {name: np.array([getattr(row, name) for row in rows]) for name in Prediction._fields}
    if log_segments:
        tables["segments"] = {name: as_numpy(getattr(record.segments, name)) for name in SEGMENT_COLUMNS}
        tables["moves"] = _columns(record.moves)
    return tables


def _columns(rows: Any) -> dict[str, Any]:
    """Columns of integers as arrays, lists of words as strings."""
    found = {name: getattr(rows, name) for name in rows.__slots__}
    return {name: _strings(one) if isinstance(one, list) else as_numpy(one) for name, one in found.items()}


def _manifest(
    record: RunRecord, facts: Mapping[str, Any], started_at: str, simulate_s: float, write_s: float
) -> dict[str, Any]:
    return {
        **facts,
        "label": runtime_label(facts.get("runtime"), facts.get("engine")),
        "partial": record.partial,
        "started_at": started_at,
        "wall_seconds": simulate_s + write_s,
        "simulate_s": simulate_s,
        "write_s": write_s,
        "num_events": record.num_events,
        "num_commands": record.num_commands,
        "num_iterations": record.num_iterations,
        "git": git_state(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "machine": {"num_cpus": os.cpu_count(), "architecture": platform.machine()},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
