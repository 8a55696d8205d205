"""A simulated run is the same, bit for bit, under any hash seed and on any Python: columns, events and commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("3.12", "3.13")

SCRIPT = """
import hashlib, random
from dataclasses import astuple
from common.types import Rule
from tests.laws.lawlib import Request, Scenario

digest = hashlib.sha256()
for seed, rule in enumerate(Rule):
    rng = random.Random(seed)
    draw = lambda *choices: choices[int(rng.random() * len(choices))]  # the same on all versions
    requests = tuple(
        Request(draw(0, 0, 1, 4), draw(1, 5, 16, 33), draw(1, 6, 20, 40), draw(-1, 0, 1, 2), draw(0, 1),
                index - 5 if index > 5 and draw(0, 0, 1) else -1)
        for index in range(150))
    scenario = Scenario(requests, 3, 40, 4, rule, 48, 6, caching=seed % 2 == 0, alpha=0.3 * seed, grid=seed < 2,
                        dispatch=("least_outstanding", "round_robin")[seed // 2], losses=((40, 2),), watch=7)
    outcome = scenario.run()
    record = outcome.record
    for columns in (record.requests, record.segments, record.moves):
        digest.update(repr(astuple(columns)).encode())
    digest.update(repr(outcome.trace).encode())
    assert sum(record.requests.num_preemptions) and record.num_iterations > 500
print(digest.hexdigest())
"""


def digest(python: str, hash_seed: int) -> str:
    env = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT),
           "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    done = subprocess.run([python, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def interpreter(version: str) -> str | None:
    """A working Python of this version: on the path, or where pyenv keeps its own."""
    candidates = [shutil.which(f"python{version}")]
    candidates += [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python{version}"))]
    for candidate in candidates:
        env = {"PATH": os.environ["PATH"]}  # as `digest` runs it: a version manager's shim may need more
        if candidate and not subprocess.run([candidate, "-c", ""], env=env, capture_output=True).returncode:
            return candidate
    return None


@pytest.fixture(scope="module")
def reference() -> str:
    return digest(sys.executable, 0)


@pytest.mark.parametrize("hash_seed", (1, 2))
def test_the_hash_seed_changes_nothing(reference, hash_seed):
    assert digest(sys.executable, hash_seed) == reference


@pytest.mark.parametrize("version", OTHERS)
def test_the_python_version_changes_nothing(reference, version):
    """The simulator needs no package at all, so a bare interpreter will do."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no python{version} on this machine")
    assert digest(python, 1) == reference
