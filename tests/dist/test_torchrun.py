"""Started by torchrun: two nodes of one machine, in network namespaces of their own where that is permitted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run as cli

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = Path(sys.executable).with_name("torchrun")
SCENE = ["system=kunserve", "system.against=null", "workload=poisson", "workload.length_scale=0.25", "workload.rate=60",
         "workload.num_requests=12", "engine.kv_blocks=40", "system.poll_ms=5", "model=tiny_llama", "hardware=cpu",
         "cluster.num_instances=2", "run.figures=false", "run.trace=false", "log.outputs=true"]  # fmt: skip


def namespaces_permitted() -> bool:
    """May this user make network namespaces?"""
    name = f"kvplane-{os.getpid()}-may"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return True


@pytest.mark.skipif(not TORCHRUN.exists() or shutil.which("bash") is None, reason="no torchrun, or no bash")
def test_two_nodes(tmp_path: Path) -> None:
    """The tokens of `local`, and nothing left behind."""
    script = subprocess.run(["bash", str(ROOT / "bench" / "two_nodes.sh"), *SCENE, f"run.results={tmp_path}",
                             "run.name=nodes"], env={**os.environ, "TORCHRUN": str(TORCHRUN)}, text=True, timeout=240,
                            capture_output=True)  # fmt: skip
    assert script.returncode == 0, script.stderr[-2000:]
    where = "two network namespaces" if namespaces_permitted() else "one network"
    assert script.stdout.startswith(f"two nodes, {where}") and "12 of 12 finished" in script.stdout
    assert cli.main([*SCENE, "runtime=local", "runtime.clock=modelled", f"run.results={tmp_path}", "run.name=one"]) == 0
    nodes, one = ((tmp_path / name / "outputs.jsonl").read_text() for name in ("nodes", "one"))
    assert nodes == one and len(nodes.splitlines()) == 12
    manifest = json.loads((tmp_path / "nodes" / "manifest.json").read_text())
    assert sum(manifest["engine"]["sent_bytes"].values()) > 0
    assert manifest["engine"]["sent_bytes"] == manifest["engine"]["acknowledged_bytes"]
    if shutil.which("ip"):
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert "kvplane-" not in left or any(Path(f"/proc/{word.split('-')[1]}").exists() for word in left.split()
                                             if word.startswith("kvplane-"))  # fmt: skip


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["-m", "runtime=dist", "seed=0,1"]) == 2
    assert capsys.readouterr().err.startswith("error: runtime=dist under torchrun is one run")
