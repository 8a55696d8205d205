"""Where a result comes from: code, packages and runtime."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

RUNTIME_LABELS = {"sim": "simulated", "local": "emulated on one device", "dist": "measured"}
PACKAGES = ("numpy", "pyarrow", "matplotlib", "hydra-core")


def runtime_label(runtime: Any) -> str:
    """What a reader must be told: simulated, emulated or measured."""
    return RUNTIME_LABELS.get(str(runtime), f"runtime {runtime}")


def git_state() -> dict[str, Any]:
    """Commit of the code that ran and whether tracked files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if commit.returncode:
            return {"commit": None, "dirty": None}
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(dirty.stdout.strip())}


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            out[name] = version(name)
    return out
