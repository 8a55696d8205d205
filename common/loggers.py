"""Where results go besides their folder: `logger=none|wandb`. A logger never fails a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.runs import LoadedRun, load_run

KINDS = ("none", "wandb")
MAX_TABLE_ROWS = 10_000
SERIES = ("running", "waiting", "kv_used_blocks", "kv_cached_blocks", "moved_bytes")


def log_run(
    kind: str,
    run: LoadedRun | str | Path,
    figures: Sequence[Path] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Log a finished run's configuration, summary, requests and figures (None: every PNG in its folder).

    A failure is one line of warning.
    """
    if kind not in KINDS:
        raise ConfigError(f"logger={kind}: there are {', '.join(KINDS)}")
    if kind == "none":
        return
    folder = run.path if isinstance(run, LoadedRun) else Path(run)
    try:
        loaded = run if isinstance(run, LoadedRun) else load_run(run)
        _to_wandb(loaded, sorted(folder.glob("*.png")) if figures is None else figures, options or {})
    except (Exception, SystemExit) as error:  # whatever wandb does, the results folder is complete
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"warning: logger=wandb failed ({reason[0]}); the results in {folder} are complete", file=sys.stderr)


def _to_wandb(run: LoadedRun, figures: Sequence[Path], options: Mapping[str, Any]) -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    session = wandb.init(
        project=str(options.get("project", "kvplane")),
        name=run.name,
        dir=str(options.get("dir") or run.path),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        config={**run.config, "manifest": run.manifest},
        settings=wandb.Settings(console="off", disable_git=True, x_disable_stats=True),
    )
    try:
        session.summary.update({key: value for key, value in run.summary.items() if value is not None})
        content: dict[str, Any] = {f"figures/{p.stem}": wandb.Image(str(p)) for p in figures if p.suffix == ".png"}
        if run.requests:
            content["requests"] = _table(run)
        for step in _series(run):
            session.log(step)
        session.log(content)
    finally:
        session.finish()


def _series(run: LoadedRun) -> list[dict[str, float]]:
    """The run over its own time: sums over instances at each sample of the timeline."""
    import numpy as np

    from common.plots.series import samples, thin

    out: list[dict[str, float]] = []
    for name in SERIES:
        times, _, values = samples(run, name)
        times, total = thin(times, np.nansum(values, axis=1)) if len(times) else (times, times)
        out = out or [{"time_s": float(time)} for time in times]
        for step, value in zip(out, total):
            step[f"timeline/{name}"] = float(value)
    return out


def _table(run: LoadedRun) -> Any:
    """The first requests as a table; all of them are in requests.parquet."""
    import wandb

    names = [name for name in run.requests if not name.endswith("_ns") and name != "reject_reason"]
    columns = [run.requests[name][:MAX_TABLE_ROWS].tolist() for name in names]
    return wandb.Table(columns=list[str | int](names), data=[list(row) for row in zip(*columns)])
