"""Where measured hardware profiles are, and how `hardware=` names one that is not in conf/hardware."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def profile_folder() -> Path:
    """$KVPLANE_PROFILES, or results/profiles; profiles are in `hardware/` below it."""
    return Path(os.environ.get("KVPLANE_PROFILES") or ROOT / "results" / "profiles")


def find_profile(value: str) -> Path | None:
    """The hardware file that a value of `hardware=` means, if it is a measured profile: by name or by path."""
    if value.endswith(".yaml"):
        path = Path(value)
    else:
        path = profile_folder() / "hardware" / f"{value}.yaml"
        if (ROOT / "conf" / "hardware" / f"{value}.yaml").is_file():
            return None
    return path.resolve() if path.is_file() else None


def with_profile(overrides: Sequence[str]) -> list[str]:
    """Overrides with the names of the profiles in `hardware=` (one, or several of a sweep), and their folders."""
    if any(override.startswith("hydra.searchpath=") for override in overrides):
        return list(overrides)  # done before
    out: list[str] = []
    folders: list[str] = []
    for override in overrides:
        key, _, text = override.partition("=")
        values = text.split(",") if key == "hardware" else []
        paths = [find_profile(value.strip()) for value in values]
        if any(paths):
            override = "hardware=" + ",".join(path.stem if path else value for path, value in zip(paths, values))
            folders += [f"file://{path.parent.parent}" for path in paths if path]
        out.append(override)
    return out + ([f"hydra.searchpath=[{','.join(dict.fromkeys(folders))}]"] if folders else [])


def grid_beside(name: str, grid: str, folders: Sequence[str]) -> str:
    """The grid of a measured profile, which lies beside its hardware file in one of Hydra's folders; else as it was."""
    found = (Path(folder.removeprefix("file://")) / "hardware" / f"{name}.npz" for folder in folders)
    return next((str(path) for path in found if grid == name and path.is_file()), grid)
