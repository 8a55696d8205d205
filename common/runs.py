"""A run's folder read back, as much of it as there is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.log import find_log
from common.provenance import label

MANIFEST = "manifest.json"
COLUMNS = {  # without these, figures and tables have gaps that a reader should know of
    "requests.parquet": ("status", "arrival_s", "prompt_tokens", "ttft_ms", "tpot_ms", "e2el_ms"),
    "timeline.parquet": ("time_s", "instance", "running", "waiting", "kv_used_blocks", "kv_capacity_blocks"),
}
MAPPINGS = {MANIFEST: ("git", "engine"), "config.yaml": ("slo", "system")}
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class LoadedRun:
    """A run's folder as read: what is missing or unreadable is empty, and named in `problems`."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    requests: Columns = field(default_factory=dict)
    timeline: Columns = field(default_factory=dict)
    marks: Columns = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self.path.name

    @property
    def label(self) -> str:
        """simulated, emulated or measured; `partial` is added for an interrupted run."""
        return label(self.manifest)

    @property
    def warning(self) -> str | None:
        """One line that says what is wrong with the folder, None when nothing is."""
        return f"{self.path}: {'; '.join(self.problems)}" if self.problems else None


def load_run(path: str | Path) -> LoadedRun:
    """Read a run's folder, as much of it as there is. ConfigError when it is no run at all."""
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such results folder")
    if not any((folder / name).exists() for name in (MANIFEST, "summary.json", "requests.parquet", "timeline.parquet")):
        raise ConfigError(f"{folder}: {_without_results(folder)}")
    problems: list[str] = []
    manifest = _mappings(MANIFEST, _read(folder / MANIFEST, _read_json, problems), problems)
    if manifest.get("partial"):
        why = manifest.get("stopped") or "interrupted"
        how = "was interrupted" if why == "interrupted" else f"stopped early ({why})"
        problems.append(f"the run {how}, its results are partial")
    if find_log(folder) and manifest.get("partial", True):
        problems.append(_use_of_log(folder))
    return LoadedRun(
        folder,
        config=_mappings("config.yaml", _read(folder / "config.yaml", _read_yaml, problems), problems),
        manifest=manifest,
        summary=_numbers(_read(folder / "summary.json", _read_json, problems), problems),
        requests=_columns(folder / "requests.parquet", problems),
        timeline=_columns(folder / "timeline.parquet", problems),
        marks=_read(folder / "marks.parquet", read_columns, problems) if (folder / "marks.parquet").exists() else {},
        problems=tuple(problems),
    )


def _without_results(folder: Path) -> str:
    """What a folder with neither tables nor a manifest is, and what can still be done with it."""
    config = _read(folder / "config.yaml", _read_yaml, [])
    if not config and not find_log(folder):
        return "not a run (no manifest, summary, requests or timeline in it)"
    names = [(key, config[key].get("name")) for key in ("system", "runtime") if isinstance(config.get(key), dict)]
    known = [f"{key}={value}" for key, value in (*names, ("seed", config.get("seed"))) if value is not None]
    left = f"; {_use_of_log(folder)}" if find_log(folder) else " and has left no log of its events"
    return f"the run did not complete ({', '.join(known) or 'config.yaml is missing'}){left}"


def _use_of_log(folder: Path) -> str:
    log = find_log(folder)
    assert log is not None
    return f"{log.name} has its events and commands so far: python -m bench.replay {folder}"


def _read(path: Path, reader: Callable[[Path], dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        problems.append(f"{path.name} is missing" + (" (the run did not complete)" if path.name == MANIFEST else ""))
        return {}
    try:
        return reader(path)
    except Exception as error:  # any damage at all: the rest of the folder is still worth drawing
        problems.append(f"{path.name} is damaged ({str(error).splitlines()[0][:80] if str(error) else type(error)})")
        return {}


def _columns(path: Path, problems: list[str]) -> Columns:
    """A table as it is; which of the columns that everything rests on it lacks is a problem."""
    known = len(problems)
    found: Columns = _read(path, read_columns, problems)
    lost = [name for name in COLUMNS[path.name] if name not in found]
    if lost and len(problems) == known:
        problems.append(f"{path.name} has no column {', '.join(lost)}")
    return found


def _numbers(summary: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Metrics are finite numbers or None (nothing to measure); anything else is left out and named."""
    bad = [key for key, value in summary.items() if value is not None
           and not (isinstance(value, int | float) and math.isfinite(value))]  # fmt: skip
    if bad:
        problems.append(f"summary.json: no number at {', '.join(bad[:3])}" + (" and others" if len(bad) > 3 else ""))
    return {key: value for key, value in summary.items() if key not in bad}


def _mappings(name: str, tree: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Parts that must be mappings are, or are left out and named."""
    bad = [key for key in MAPPINGS[name] if not isinstance(tree.get(key, {}), dict | None)]
    problems += [f"{name}: {key} is no mapping" for key in bad]
    return {key: value for key, value in tree.items() if key not in bad}


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    value = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def read_columns(path: Path) -> Columns:
    """A Parquet file as numpy arrays; nulls of numbers become NaN, text becomes numpy strings or objects."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:  # pq.read_table would import pyarrow.dataset and pandas
        table = file.read()
    chunks = {name: column.chunks for name, column in zip(table.column_names, table.columns)}
    return {
        name: np.concatenate([_to_numpy(part) for part in parts]) if parts else np.empty(0)
        for name, parts in chunks.items()
    }


def _to_numpy(array: Any) -> npt.NDArray[Any]:
    """One pyarrow array as numpy, without the pandas that `to_numpy` imports."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        names: npt.NDArray[Any] = np.array(array.dictionary.to_pylist() or [""])
        return np.asarray(names[_to_numpy(array.indices).astype(np.int64)])
    if not pa.types.is_primitive(array.type):
        all_null = array.null_count == len(array)
        return np.full(len(array), None) if all_null else np.array(array.to_pylist(), object)
    if not len(array):
        return np.empty(0)
    valid, data = array.buffers()
    rows = slice(array.offset, array.offset + len(array))
    dtype = {"double": "float64"}.get(str(array.type), str(array.type))
    values: npt.NDArray[Any] = np.frombuffer(data, dtype)[rows]
    if not array.null_count:
        return values
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[rows]
    return np.where(bits == 1, values, np.nan)
