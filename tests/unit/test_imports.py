"""Who may import what: the rule of the design, kept by reading the source, and by looking at a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = ("systems", "workloads", *(f"common/{name}" for name in ("types", "policy", "driver", "kv", "sched", "cost")))
BANNED_IN_PURE = {"torch", "time", "random", "asyncio", "threading", "hydra"}
HEAVY = ("torch", "pandas", "matplotlib", "triton", "ray", "wandb")
# Systems that are made of others, by design: (the one, whom it may import).
COMPOSITIONS: tuple[tuple[str, str], ...] = ()


def sources(*places):
    """Source files under these places, relative to the root."""
    for place in places:
        path = ROOT / place
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            yield file.relative_to(ROOT)


def imported(file, top_level_only=False):
    """Dotted names of everything that a file imports, also inside functions; `if TYPE_CHECKING` does not count."""
    tree = ast.parse((ROOT / file).read_text())
    todo, found = [tree], []
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join(file.parts[: -node.level])
                module = f"{base}.{node.module}" if node.module else base
            else:
                module = node.module or ""
            found += [f"{module}.{name.name}" for name in node.names]
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
        elif not (top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            todo += ast.iter_child_nodes(node)
    return found


def test_the_reader_of_imports_sees_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "x.py").write_text(
        "import os.path, torch.nn as nn\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import time\n"
        "else:\n    import random\ndef f():\n    from asyncio import run\nfrom . import y\nfrom .y import z\n"
    )
    [file] = sources("systems")
    assert sorted(imported(file)) == [
        "asyncio.run", "os.path", "random", "systems.y", "systems.y.z", "torch.nn", "typing.TYPE_CHECKING"]  # fmt: skip
    assert "asyncio.run" not in imported(file, top_level_only=True)


@pytest.mark.parametrize("place", PURE)
def test_pure_code_imports_no_clock_no_chance_no_tensors(place):
    files = list(sources(place))
    assert files
    found = [f"{file}: {name}" for file in files for name in imported(file) if name.split(".")[0] in BANNED_IN_PURE]
    assert not found


def test_common_never_imports_systems():
    found = [f"{file}: {name}" for file in sources("common") for name in imported(file)
             if name.split(".")[0] == "systems"]  # fmt: skip
    assert not found


def test_systems_never_import_each_other():
    found = []
    for file in sources("systems"):
        mine = file.parts[1]
        if mine == "registry.py":  # names them all
            continue
        for name in imported(file):
            parts = name.split(".")
            if parts[0] == "systems" and len(parts) > 1 and parts[1] != mine and (mine, parts[1]) not in COMPOSITIONS:
                found.append(f"{file}: {name}")
    assert not found


def test_only_config_and_entry_points_know_hydra():
    allowed = {"common/config.py", "common/sweep.py", "run.py", "report.py"}
    found = [str(file) for file in sources("common", "bench") for name in imported(file)
             if name.split(".")[0] in ("hydra", "omegaconf") and str(file) not in allowed]  # fmt: skip
    assert not found


SIM_PATH = (
    "common.driver", "common.log", "common.executors.sim", "common.executors.replay", "common.metrics",
    "common.results", "common.config", "systems.baselines.vllm", "workloads.build", "run",
    "bench.replay",
)  # fmt: skip


def test_the_simulators_path_imports_nothing_heavy():
    """A run starts in well under a second: no torch, no pandas, no plotting until figures are drawn."""
    there = [name for name in SIM_PATH if (ROOT / (name.replace(".", "/") + ".py")).exists()]
    assert len(there) >= 7
    script = f"import sys, {', '.join(there)}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_simulator_itself_needs_no_package():
    """Policies and the simulator import the standard library only: so any bare interpreter can check that a run is
    the same there (`tests/laws/test_determinism_laws.py`)."""
    script = (
        "import sys\nfrom importlib.abc import MetaPathFinder\n"
        "class Refuse(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('numpy', 'pyarrow', 'yaml', 'hydra', 'pandas'):\n"
        "            raise ImportError(f'{name} is not to be imported here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import common.driver, common.log, common.executors.sim, common.executors.replay, systems.baselines.vllm\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
