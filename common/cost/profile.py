"""`python -m common.cost.fit --measure`: this device's operators as a hardware profile that the simulator can use.

`bench.profile` measures (a process of its own: this package imports no torch); here its tables become a grid and a
hardware file, `<out>/hardware/<name>.npz` and `.yaml`. `hardware=<name>` finds them in $KVPLANE_PROFILES, or in
results/profiles; `hardware=<path of the yaml>` anywhere. With them go `cost.traits=profile` (host time as measured,
nothing overlapped, no padding) and, for fp32, `model.dtype_bytes=4`.

The "speed of light" of such a profile is the fastest that any of its own operators was: peak FLOP/s and bandwidth
bound nothing that was measured. Host time is what whole iterations take beyond their operators: host_ns + requests x
host_per_seq_ns, least squares of relative errors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cost.engine import ENGINES
from common.cost.fit import fit_tables
from common.cost.grids import Array, Grid
from common.cost.model import InstanceCost
from common.cost.operators import Operators, pairs_of
from common.cost.roofline import Roof
from common.cost.sources import Source
from common.cost.specs import HardwareSpec, ModelSpec, load_hardware
from common.cost.table import Table, read_frame
from common.cost.tables_vllm import known_models, read_vllm
from common.cost.transfer import LINK_EFFICIENCY
from common.errors import ConfigError

NOT_MEASURED = {"nic_latency_ns": 50_000, "disk_bandwidth": 3.0e9, "startup_ns": 2_000_000_000}


def measure(device: str, name: str, out: Path, more: Sequence[str] = ()) -> Path:
    """Measure and fit; the hardware file."""
    tables = out / "tables" / name
    command = [sys.executable, "-m", "bench.profile", "--device", device, "--out", str(tables), *more]
    root = Path(__file__).resolve().parents[2]
    if subprocess.run(command, cwd=root).returncode:
        raise ConfigError("measuring failed: see above")
    return fit_profile(tables, name, out / "hardware")


def fit_profile(tables: Path, name: str, folder: Path) -> Path:
    """From a folder of measured tables to a grid and a hardware file."""
    facts: dict[str, Any] = json.loads((tables / "device.json").read_text(encoding="utf-8"))
    found = list(read_vllm(tables))
    if not found:
        raise ConfigError(f"{tables}: no measured tables")
    _check_heads(found)
    flops, bandwidth = fastest(found, facts)
    source = Source(name, (), flops, bandwidth, facts["peer_bandwidth"], facts["num_sm"], "own",
                    f"measured on {facts['device']}", dtype_bytes=facts["dtype_bytes"])  # fmt: skip
    grid = fit_tables(source, found)
    hardware = hardware_of(name, facts, flops, bandwidth)
    hosts = host_times(tables, hardware, grid)
    hardware = replace(hardware, host_ns=hosts["host_ns"], host_per_seq_ns=hosts["host_per_seq_ns"])
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"{name}.npz")
    path = folder / f"{name}.yaml"
    path.write_text(yaml_of(hardware, facts), encoding="utf-8")
    print(f"{path}: {sum(len(t.time_ns) for t in found):,} points; whole iterations: {hosts['note']}")
    return path


def _check_heads(tables: Sequence[Table]) -> None:
    models = {t.get("model").name: t.get("model") for t in tables}.values()
    heads = [(model.num_heads, model.num_kv_heads) for model in models]
    if len(set(heads)) < len(heads):
        raise ConfigError("two models of one profile have the same numbers of heads: profile them apart")


def fastest(tables: Sequence[Table], facts: dict[str, Any]) -> tuple[float, float]:
    """FLOP/s and bytes/s that no measured operator exceeds."""
    flops, moved = [facts["matmul_flops"] / 1e9], [facts["copy_bandwidth"] / 1e9]
    free = Roof(1.0, float("inf"), facts["dtype_bytes"]), Roof(float("inf"), 1.0, facts["dtype_bytes"])
    for table in tables:
        for roof, rates in zip(free, (flops, moved)):
            work = _work(table, roof)
            if work is not None and len(table.time_ns):
                rates.append(float(np.max(work / table.time_ns)))
    return max(flops) * 1e9 * 1.001, max(moved) * 1e9 * 1.001  # above the rounding of the grid


def _work(table: Table, roof: Roof) -> Array | None:
    """FLOPs or bytes of a table's points, by the roof whose other rate is endless."""
    if table.family == "linear":
        return np.asarray(roof.linear(*(table.column(name).astype(float) for name in ("m", "n", "k"))))
    if table.family != "attention":
        return None
    model: ModelSpec = table.get("model")
    c, p, n, ctx = (table.column(name).astype(float) for name in table.columns)
    shape = (model.num_heads, model.num_kv_heads, model.head_dim)
    return np.asarray(roof.prefill(c, pairs_of(c, p), *shape) + roof.decode(n, ctx, *shape))


def hardware_of(name: str, facts: dict[str, Any], flops: float, bandwidth: float) -> HardwareSpec:
    """Numbers of the device; links as measured copies (a link reaches `LINK_EFFICIENCY` of its wire)."""
    host = min(facts["to_host_bandwidth"], facts["from_host_bandwidth"])
    latency = max(facts["to_host_latency_ns"], facts["from_host_latency_ns"])
    return load_hardware({
        "name": name,
        "memory_bytes": facts["memory_bytes"],
        "peak_flops": flops,
        "mem_bandwidth": bandwidth,
        "nvlink_bandwidth": facts["peer_bandwidth"] / LINK_EFFICIENCY,
        "nvlink_latency_ns": int(facts["peer_latency_ns"]),
        "pcie_bandwidth": host / LINK_EFFICIENCY,
        "pcie_latency_ns": int(latency),
        "nic_bandwidth": facts["peer_bandwidth"] / LINK_EFFICIENCY,
        "host_memory_bytes": facts["host_memory_bytes"],
        "grid": name,
        "dtype_bytes": facts["dtype_bytes"],
        **NOT_MEASURED,
    })  # fmt: skip


def host_times(tables: Path, hardware: HardwareSpec, grid: Grid) -> dict[str, Any]:
    """What whole iterations take beyond their operators, and how far off the sum then is."""
    models = known_models()
    rows, times, devices = [], [], []
    for path in sorted(tables.glob("*/iterations.csv")):
        model = replace(models[path.parent.name.lower()], dtype_bytes=hardware.dtype_bytes)
        cost = InstanceCost(model, hardware, engine=_bare(), operators=Operators(hardware, grid))
        for chunks, new, cached, decodes, context, us in read_frame(path).itertuples(index=False):
            work = [(int(new), int(cached))] * int(chunks)
            count = int(chunks + decodes)
            devices.append(cost.iteration_ns(work, int(decodes), int(context), count))
            rows.append((1.0, float(count)))
            times.append(us * 1e3)
    measured, device = np.array(times), np.array(devices, dtype=np.float64)
    host = nonnegative(np.array(rows), measured - device, 1.0 / measured)
    error = (device + np.array(rows) @ host) / measured - 1.0
    note = (f"operators alone {np.median(device / measured) - 1:+.1%} (median), with host time "
            f"{np.median(error):+.1%}, worst {error[np.argmax(np.abs(error))]:+.1%}")  # fmt: skip
    return {"host_ns": max(1, int(host[0])), "host_per_seq_ns": max(1, int(host[1])), "note": note}


def nonnegative(rows: Array, target: Array, weight: Array) -> Array:
    """Two coefficients, neither below 0, of a weighted least-squares fit."""
    best, lowest = np.zeros(2), float("inf")
    for used in ([0, 1], [0], [1], []):
        found = np.zeros(2)
        if used:
            found[used] = np.linalg.lstsq(rows[:, used] * weight[:, None], target * weight, rcond=None)[0]
        loss = float((((rows @ found) - target) ** 2 * weight**2).sum())
        if (found >= 0).all() and loss < lowest:
            best, lowest = found, loss
    return best


def _bare() -> Any:
    return replace(ENGINES["device-only"], cuda_graphs=False, async_scheduling=False)


def yaml_of(hardware: HardwareSpec, facts: dict[str, Any]) -> str:
    """The hardware file; its grid lies beside it."""
    import yaml

    values = {
        field: getattr(hardware, field) for field in hardware.__slots__ if field not in ("description", "derived_from")
    }
    values["description"] = f"measured: {facts['device']}, {facts['dtype']}"
    git = facts["git"].get("commit") or "unknown"
    values["provenance"] = (
        f"our engine's operators ({facts['attention']}; torch {facts['torch']}), shapes of "
        f"{', '.join(facts['models'])}, commit {git[:7]}{'+changes' if facts['git'].get('dirty') else ''}; "
        f"not measured: {', '.join(NOT_MEASURED)} and nic_bandwidth (the peer copy's)"
    )  # fmt: skip
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
