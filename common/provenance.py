"""Where a result comes from: code, packages and runtime."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUNTIME_LABELS = {"sim": "simulated", "local": "emulated on one device", "dist": "emulated by a process each"}
PACKAGES = ("numpy", "pyarrow", "matplotlib", "hydra-core")


def runtime_label(runtime: Any, engine: Any = None) -> str:
    """What a reader must be told: simulated, emulated or measured. `engine`: what the run's engine told of itself."""
    if runtime == "dist" and (engine or {}).get("clock") == "measured":
        return "measured, a process each"
    return RUNTIME_LABELS.get(str(runtime), f"runtime {runtime}")


def label(manifest: Mapping[str, Any]) -> str:
    """The runtime's label of a run, and `partial` for an interrupted one."""
    known = runtime_label(manifest["runtime"], manifest.get("engine")) if "runtime" in manifest else "runtime unknown"
    return known + (", partial" if manifest.get("partial", not manifest) else "")


def provenance_line(manifests: Sequence[Mapping[str, Any]]) -> str:
    """'simulated · vllm · llama2-70b · a100-80g · burst · seed 0 · 0f0cac3'; where runs differ, their number."""
    parts = [" + ".join(dict.fromkeys(label(manifest) for manifest in manifests))]
    for key, plural in (("system", "systems"), ("model", "models"), ("hardware", "cards"), ("workload", "workloads")):
        parts.append(_shared([str(manifest.get(key, f"{key} unknown")) for manifest in manifests], plural))
    parts.append(_shared([f"seed {manifest.get('seed', '?')}" for manifest in manifests], "seeds"))
    parts.append(_shared([_commit(manifest) for manifest in manifests], "commits"))
    return "  ·  ".join(parts)


def _shared(values: Sequence[str], plural: str) -> str:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else f"{len(distinct)} {plural}"


def _commit(manifest: Mapping[str, Any]) -> str:
    git = manifest.get("git") or {}
    if not git.get("commit"):
        return "commit unknown"
    return str(git["commit"])[:7] + ("+changes" if git.get("dirty") else "")


def git_state() -> dict[str, Any]:
    """Commit of the code that ran and whether tracked files other than results differ; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if commit.returncode:
            return {"commit": None, "dirty": None}
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"],
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
