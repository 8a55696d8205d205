"""python -m bench.gpu_suite: all that needs a GPU, in one go; `--device cpu` does what a CPU can.

Sections, each in a process of its own with a time limit: `kernels` (every kernel against fp64: at most twice the
error of plain torch in the same type), `attention` (decode and prefill against this card's measured copy bandwidth and
matmul rate, and against every other attention that is importable), `copies`, `arena`, `engine` (CUDA graphs and eager
decode against the roofline) and `tests` (those marked gpu). What fails is recorded in one line, and the rest goes on.
Writes suite.json (raw numbers, commit, versions) and suite.md to --out, by default results/gpu/<date>-<card>/.
Exit status: 0, or 1 if a check or a section failed. Written without a GPU at hand: its CUDA side has never run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.harness import markdown
from bench.suite import SIZES, Context, Section, first_line
from common.provenance import git_state
from common.results import replacing

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = {"kernels": 100, "attention": 150, "copies": 40, "arena": 60, "engine": 120, "tests": 120}
TOTAL_S = 460
"""The whole suite: a section starts with what is left, at most its own limit."""
PACKAGES = ("torch", "triton", "numpy", "transformers", "flash-attn", "flashinfer-python", "cuda-bindings", "pytest")


def section_named(name: str) -> Callable[[Context], Section]:
    """A section's function; imported late, so that one that cannot be imported fails alone."""
    if name == "kernels":
        from bench.suite_kernels import kernels as found
    elif name == "copies":
        from bench.suite_kernels import copies as found
    elif name == "attention":
        from bench.suite_attention import attention as found
    elif name == "arena":
        from bench.suite_engine import arena as found
    elif name == "engine":
        from bench.suite_engine import engine as found
    else:
        return gpu_tests
    return found


def gpu_test_files() -> list[str]:
    """Those that have tests marked gpu. The others may want packages that a GPU machine has not, and pytest runs
    nothing at all where one file cannot be imported."""
    files = (file for name in ("kernels", "engine") for file in sorted((ROOT / "tests" / name).glob("test_*.py")))
    return [str(file) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def gpu_tests(context: Context) -> Section:
    """pytest over the tests marked gpu."""
    if not context.cuda:
        return Section(notes=["Tests: none of those marked gpu can run without one."])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *gpu_test_files()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    failed = [line[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:
        failed = [f"pytest exited with {done.returncode}: {lines[-1][:160] if lines else ''}"]
    return Section({"Tests": [{"pytest": lines[-1] if lines else "nothing"}]}, failed)


def run_here(name: str, device: str, sizes: str, out: Path) -> None:
    """One section in this process; its result goes to a file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with torch.inference_mode():
            section = section_named(name)(Context(torch.device(device), SIZES[sizes]))
    except Exception as error:
        section = Section(failed=[first_line(error)])
    out.write_text(json.dumps(asdict(section)), encoding="utf-8")


def run_apart(name: str, device: str, sizes: str, limit_s: float) -> dict[str, Any]:
    """One section in a process of its own: a crash, or a GPU that is lost, ends it and nothing else."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, "-m", "bench.gpu_suite", "--section", name, "--device", device, "--sizes", sizes,
                   "--out", str(out)]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        reason = supervised(command, environment, limit_s)
        found: dict[str, Any] = (json.loads(out.read_text(encoding="utf-8")) if out.is_file() and out.stat().st_size
                                 else asdict(Section(failed=[reason])))  # fmt: skip
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def supervised(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> str:
    """Run a command with all that it starts, for so long at most; how it ended, in one line."""
    process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), stdout=subprocess.DEVNULL, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        _, stderr = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"stopped after {limit_s:.0f} s"
    said = [line for line in stderr.splitlines() if line.strip()]
    return f"exited with {process.returncode}: {said[-1][:160] if said else ''}"


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: str) -> str:
    """As a reader knows it."""
    return torch.cuda.get_device_name(0) if device == "cuda" else f"CPU ({platform.machine()}), one thread"


def report(results: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """The Markdown page."""
    git = facts["git"]
    state = f"commit {git.get('commit')}" + (" with uncommitted changes" if git.get("dirty") else "")
    lines = [f"# Suite on {facts['device']}\n", f"{facts['time']}, {state}. "
             + ", ".join(f"{name} {value}" for name, value in facts["versions"].items()) + ".\n"]  # fmt: skip
    lines.append(markdown([{"section": name, "seconds": result["seconds"],
                            "failed": "; ".join(result["failed"]) or "nothing"}
                           for name, result in results.items()]))  # fmt: skip
    for result in results.values():
        lines += [f"{note}\n" for note in result["notes"]]
        lines += [f"## {title}\n\n{markdown(rows)}" for title, rows in result["tables"].items() if rows]
    return "\n".join(lines)


def write(out: Path, name: str, results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Both files, each whole or not at all; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    page = report(results, facts)
    with replacing(out / f"{name}.json") as path:
        path.write_text(json.dumps({**facts, "sections": results}, indent=1) + "\n", encoding="utf-8")
    with replacing(out / f"{name}.md") as path:
        path.write_text(page, encoding="utf-8")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", choices=tuple(SIZES))
    parser.add_argument("--only", action="append", choices=tuple(LIMIT_S), help="may be given more than once")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="suite", help="of the two files")
    parser.add_argument("--section", choices=tuple(LIMIT_S), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = options.sizes or ("full" if options.device == "cuda" else "cpu")
    if options.section:
        run_here(options.section, options.device, sizes, options.out)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is visible; --device cpu does what a CPU can", file=sys.stderr)
        return 2
    began, results = time.perf_counter(), dict[str, dict[str, Any]]()
    now = datetime.now(UTC)
    facts: dict[str, Any] = {
        "device": device_name(options.device), "time": f"{now:%Y-%m-%d %H:%M} UTC", "git": git_state(),
        "versions": versions(), "sizes": sizes,
    }  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    out = options.out or ROOT / "results" / "gpu" / f"{now:%Y-%m-%d}-{slug}"
    for name in options.only or LIMIT_S:
        left = TOTAL_S - (time.perf_counter() - began)
        results[name] = run_apart(name, options.device, sizes, max(5.0, min(LIMIT_S[name], left)))
        failed = results[name]["failed"]
        print(f"{name}: {results[name]['seconds']} s, {len(failed)} failed" + "".join(f"\n  {line}" for line in failed),
              file=sys.stderr, flush=True)  # fmt: skip
        page = write(out, options.name, results, facts)  # after each: what there is survives whatever comes
    print(page)
    return 1 if any(result["failed"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
