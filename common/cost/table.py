"""One measured operator family as flat arrays, and how every reader makes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.cost.grids import Array
from common.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Table:
    """Measured points of one operator family. `keys` columns are integers; `context` labels a source (file, tp)."""

    family: str
    columns: tuple[str, ...]
    keys: npt.NDArray[np.int64]  # (rows, columns)
    time_ns: Array
    context: tuple[tuple[str, object], ...] = ()

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """One key column."""
        return self.keys[:, self.columns.index(name)]

    def get(self, name: str, default: Any = None) -> Any:
        """One label of the source."""
        return dict(self.context).get(name, default)

    def take(self, mask: npt.NDArray[np.bool_]) -> Table:
        """The rows where `mask` holds."""
        return Table(self.family, self.columns, self.keys[mask], self.time_ns[mask], self.context)


def read_frame(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read as a table ({error})") from None


def make_table(
    family: str,
    frame: pd.DataFrame,
    columns: dict[str, str],
    time: str,
    scale: float,
    source: Path,
    **context: object,
) -> Table:
    """Median time per distinct key of `columns` (our name -> theirs)."""
    missing = [theirs for theirs in [*columns.values(), time] if theirs not in frame]
    if missing:
        raise ConfigError(f"{source}: column {missing[0]!r} is missing")
    frame = frame[[*columns.values(), time]].dropna()
    median = frame.groupby(list(columns.values()), sort=True)[time].median().reset_index()
    keys = np.stack([median[theirs].to_numpy(dtype=np.int64) for theirs in columns.values()], axis=1)
    labels = tuple({"source": str(source), **context}.items())
    return Table(family, tuple(columns), keys, median[time].to_numpy(dtype=np.float64) * scale, labels)
