"""The pinned reference: this repository's own code at the commit that results/baselines/micro.json names."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.provenance import git_state
from common.results import replacing

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "results" / "baselines" / "micro.json"
TREES = ROOT / "results" / "runs" / "pinned"
PARTS = ("common", "systems", "workloads", "bench", "conf", "run.py")


def read(path: Path = BASELINE) -> dict[str, Any]:
    """The commit and why it was pinned."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"reasons": []}
    return known


def tree(commit: str) -> Path:
    """The code of a commit, unpacked once; ConfigError where this copy of the repository does not have it."""
    folder = TREES / commit
    if (folder / "run.py").exists():
        return folder
    done = subprocess.run(["git", "archive", commit, *PARTS], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ConfigError(f"the pinned reference {commit[:12]} is not in this copy of the repository (fetch it)")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def pin(reason: str, path: Path = BASELINE) -> str:
    """From now on the committed code is the reference; the reason goes into the file. Returns the commit."""
    git = git_state()
    if git.get("dirty") or not git.get("commit"):
        raise ConfigError("a reference is pinned at a commit: commit first (nothing may differ from it)")
    with replacing(path) as temporary:
        known = {"commit": git["commit"], "reasons": [*read(path)["reasons"], reason]}
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return str(git["commit"])
