"""docs/adding-a-system.md, done: a fifth policy in under 80 lines runs in `sim`, `local` and `dist`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import run as cli
from systems import registry
from tests import toy_policy

ARGUMENTS = ["workload=poisson", "workload.num_requests=12", "cluster.num_instances=2", "run.figures=false",
             "run.trace=false"]  # fmt: skip
TENSORS = ["model=tiny_llama", "hardware=cpu", "log.outputs=true", "runtime.clock=modelled"]


def summary(folder: Path, *arguments: str) -> dict[str, object]:
    assert cli.main([*ARGUMENTS, *arguments, f"run.results={folder.parent}", f"run.name={folder.name}"]) == 0
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in systems/registry.py."""
    make = toy_policy.FewestTokens
    monkeypatch.setitem(registry.FACTORIES, "fewest", lambda cluster, engine, options: make(cluster, engine))


def test_it_is_short() -> None:
    assert len(Path(toy_policy.__file__).read_text().splitlines()) < 80


def test_it_runs_in_sim(tmp_path: Path) -> None:
    assert summary(tmp_path / "toy", "system.name=fewest")["completed"] == 12


@pytest.mark.parametrize("runtime", ["local", "dist"])
def test_it_runs_with_real_tensors_and_its_tokens_are_those_of_another_system(tmp_path: Path, runtime: str) -> None:
    pytest.importorskip("torch")
    if runtime == "dist":
        from tests.dist.pool import own_hub_closed

        own_hub_closed()  # another test's workers, in this process
    assert summary(tmp_path / "toy", "system.name=fewest", *TENSORS, f"runtime={runtime}")["completed"] == 12
    assert summary(tmp_path / "vllm", *TENSORS, "runtime=local")["completed"] == 12
    tokens = [(tmp_path / name / "outputs.jsonl").read_text() for name in ("toy", "vllm")]
    assert tokens[0] == tokens[1] and tokens[0].count("\n") == 12
