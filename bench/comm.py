"""python -m bench.comm: latency and bandwidth of every primitive between two workers of this machine, over size.

Two worker processes, as `runtime=dist` starts them; the policy process is the third. What it writes: a report, and
(--base, --name) the hardware file of a profile whose links are those measured here."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from bench.comm_end import percentiles, run_end
from bench.harness import exit_with, write_report
from common.comm import messages as say
from common.comm.hub import FORKS, HOST, Hub
from common.comm.join import join_groups
from common.errors import ConfigError, KVPlaneError

OUT = Path(__file__).resolve().parent.parent / "results" / "comm"


def between_workers(backend: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What `comm_end` measured."""
    store = TCPStore(HOST, 0, 3, is_master=True, wait_for_workers=False)
    ours, theirs = FORKS.Pipe()
    processes = []
    for rank in (1, 2):
        environment = {"MASTER_ADDR": HOST, "MASTER_PORT": str(store.port), "WORLD_SIZE": "3", "RANK": str(rank)}
        processes.append(FORKS.Process(target=run_end, args=(environment, backend, rounds, theirs)))
        processes[-1].start()
    theirs.close()
    join_groups(store, 0, 3, backend, 60.0, 120.0)
    try:
        found: dict[str, list[dict[str, Any]]] = ours.recv()
    except EOFError:
        raise KVPlaneError("bench.comm: the measuring processes ended without an answer") from None
    for process in processes:
        process.join()
    torch.distributed.destroy_process_group()
    return found


def orders(rounds: int) -> list[dict[str, Any]]:
    """From the policy process to a worker and back: an order and its answer."""
    hub = Hub(1)
    seconds = []
    for _ in range(rounds + 5):
        begin = time.perf_counter()
        hub.ask(1, say.Stop())
        seconds.append(time.perf_counter() - begin)
    hub.close()
    return [percentiles(seconds[5:], 0)]


def link(rows: list[dict[str, float]]) -> tuple[int, float]:
    """(latency in ns, bytes per second) of the fastest twentieth, as a neighbour on the core does not count: the
    quickest message of up to 1 KiB, and the median of what those of at least 1 MiB do beyond it."""
    latency = min(row["P5 (us)"] for row in rows if row["bytes"] <= 1 << 10)
    rates = [row["bytes"] / (row["P5 (us)"] - latency) for row in rows if row["bytes"] >= 1 << 20]
    return int(latency * 1e3), float(sorted(rates)[len(rates) // 2]) * 1e6


def links_of(found: dict[str, list[dict[str, Any]]]) -> tuple[tuple[int, float], tuple[int, float]]:
    """Links of activations and of copies, from what was found between workers."""
    activation, copy = (link(next(rows for name, rows in found.items() if name.startswith(start)))
                        for start in ("activation", "copy in"))  # fmt: skip
    return activation, copy


def write_profile(
    base: Path, name: str, activation: tuple[int, float], copy: tuple[int, float], order_us: float
) -> Path:  # fmt: skip
    """A copy of a hardware file (and its grid) with the links measured here, within a node and beyond it alike, as
    this is one machine; and an order and its answer as part of each iteration's host time."""
    import yaml

    try:
        values = yaml.safe_load(base.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--base {base}: not a hardware file ({error})") from None
    latency, bandwidth = activation[0], min(activation[1], copy[1])
    for medium in ("nvlink", "nic"):
        values[f"{medium}_latency_ns"], values[f"{medium}_bandwidth"] = latency, bandwidth
    values["host_ns"] = int((values.get("host_ns") or 0) + order_us * 1e3)
    values.update(name=name, provenance=f"{values.get('provenance', '')}; links: python -m bench.comm")
    return beside(base, values)


def beside(base: Path, values: dict[str, Any]) -> Path:
    """A hardware file of this `name` beside another, with a copy of that one's grid: a profile is found by its name."""
    import yaml

    path, grid = base.with_name(f"{values['name']}.yaml"), base.with_suffix(".npz")
    if grid.is_file():
        path.with_suffix(".npz").write_bytes(grid.read_bytes())
        values["grid"] = values["name"]
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    return path


def main() -> int:
    """Measure, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.comm", description=__doc__)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--base", type=Path, help="a measured hardware file (python -m common.cost.fit --measure)")
    parser.add_argument("--name", default="measured-links", help="of the hardware file that gets the links")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.backend == "nccl" and torch.cuda.device_count() < 2:
        raise ConfigError(f"--backend nccl needs two GPUs, {torch.cuda.device_count()} are visible")
    load = os.getloadavg()[0]
    found = between_workers(options.backend, options.rounds)
    tables = {"order and answer, policy process to worker": orders(options.rounds), **found}
    activation, copy = links_of(found)
    order = tables["order and answer, policy process to worker"][0]["P5 (us)"]
    waits = {row["an activation of 16 KiB"]: row["P95 (us)"] for row in found["An activation beside a copy"]}
    hidden = found["Overlap of copy and compute"][0]["share of the shorter that is hidden"]
    notes = [
        f"Measured: two worker processes over {options.backend}, one machine ({os.cpu_count()} cores, shared with "
        f"others: load {load:.1f} to {os.getloadavg()[0]:.1f}; torch {torch.__version__}), {options.rounds} rounds. "
        "P5 is what the machine can do, P95 what its neighbours leave of it.",
        f"As links: activations {activation[0] / 1e3:.0f} us and {activation[1] / 1e6:,.0f} MB/s, copies "
        f"{copy[0] / 1e3:.0f} us and {copy[1] / 1e6:,.0f} MB/s.",
        "An activation of 16 KiB takes (P95) " + ", ".join(f"{value:,.0f} us {name}" for name, value in waits.items())
        + f". {hidden:.0%} of the shorter of copy and compute is hidden behind the other.",
    ]
    if options.base is not None:
        notes.append(f"Hardware file: {write_profile(options.base, options.name, activation, copy, order).name}.")
    write_report("comm", "What workers send each other", notes, tables, options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
