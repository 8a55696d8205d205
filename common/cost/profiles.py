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
    """Overrides with `hardware=<profile>` replaced by what makes Hydra find it, and the cost model its grid."""
    out: list[str] = []
    for override in overrides:
        path = find_profile(override.removeprefix("hardware=")) if override.startswith("hardware=") else None
        if path is None:
            out.append(override)
            continue
        out += [f"hydra.searchpath=[file://{path.parent.parent}]", f"hardware={path.stem}",
                f"hardware.grid={path.with_suffix('.npz')}"]  # fmt: skip
    return out
