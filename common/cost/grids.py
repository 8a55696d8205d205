"""The committed efficiency grids: compact copies of measured operator times, one .npz per measured card.

A time is stored as uint16, round(1500 ln ns): 0.03% of rounding at most; 0 is a hole. Holes are filled when the grid
is fitted (`common.cost.fit`), so reading is plain. In the file, codes are differences along the last axis with their
bytes apart, which compresses best. Sources and licences: `grids/README.md`.
"""

from __future__ import annotations

# `np.load`, zipfile and `np.unique` import three of these at their first call: not while a run is timed.
import encodings.cp437  # noqa: F401
import json
import zipfile  # noqa: F401
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma
import numpy.typing as npt

from common.errors import ConfigError

LOG_STEPS = 1500.0
FOLDER = Path(__file__).parent / "grids"
Array = npt.NDArray[np.float64]


def pack(time_ns: Array) -> npt.NDArray[np.uint16]:
    """Times to stored codes; NaN becomes a hole."""
    code = np.round(LOG_STEPS * np.log(np.where(np.isfinite(time_ns), np.maximum(time_ns, 1.001), 1.0)))
    if np.any(code > 65535):
        raise ValueError("an operator time above 0.23 s cannot be packed")
    return code.astype(np.uint16)


def unpack(code: npt.NDArray[np.uint16]) -> Array:
    """Stored codes to ns; holes become NaN."""
    return np.where(code > 0, np.exp(code / LOG_STEPS), np.nan)


@dataclass(frozen=True)
class Grid:
    """One card's measurements. `meta` has its name, peaks and source; `arrays` the knots and times."""

    meta: dict[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]

    def knots(self, name: str) -> Array:
        """Coordinates of a table's axis."""
        return self.arrays[name].astype(np.float64)

    def times(self, name: str, rows: Any = ...) -> Array:
        """Times of a table, or of some rows of it, ns."""
        return unpack(self.arrays[name][rows])

    def has(self, name: str) -> bool:
        """Whether the card was measured so."""
        return name in self.arrays

    def save(self, path: Path) -> None:
        """Write the .npz."""
        arrays = {name: _encode(value) for name, value in self.arrays.items()}
        meta = np.array(json.dumps(self.meta, sort_keys=True))
        np.savez_compressed(path, meta=meta, **arrays)  # type: ignore[arg-type]


def _encode(codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if codes.dtype != np.uint16:
        return codes
    delta = np.diff(codes, axis=-1, prepend=np.zeros_like(codes[..., :1]))
    return np.stack([(delta >> 8).astype(np.uint8), (delta & 255).astype(np.uint8)])


def _decode(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if stored.dtype != np.uint8:
        return stored
    delta = (stored[0].astype(np.uint16) << 8) | stored[1]
    return np.cumsum(delta, axis=-1, dtype=np.uint16)


class _Stored(Mapping[str, npt.NDArray[Any]]):
    """The arrays of a grid's file, each decoded when first asked for: a run needs a third of them, and of a sibling's
    grid one table."""

    def __init__(self, path: Path) -> None:
        self._file = np.load(BytesIO(path.read_bytes()))  # whole: whoever rewrites the file changes nothing here
        self._names = [name for name in self._file.files if name != "meta"]
        self._decoded: dict[str, npt.NDArray[Any]] = {}
        self.meta: dict[str, Any] = json.loads(str(self._file["meta"]))

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        found = self._decoded.get(name)
        if found is None:
            found = self._decoded[name] = _decode(self._file[name])
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@cache
def load_grid(name: str) -> Grid:
    """A committed grid by name, or a measured profile's by path."""
    path = Path(name) if name.endswith(".npz") else FOLDER / f"{name}.npz"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.npz")))
        raise ConfigError(f"hardware grid {name!r} does not exist; known: {known}")
    stored = _Stored(path)
    return Grid(stored.meta, stored)
