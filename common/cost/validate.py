"""Hold the committed cost model against measured operator tables.

`python -m common.cost.validate DIR --hardware NAME [--format aiconfigurator|vidur|vllm]` prints one JSON line per
operator family and regime: `family, regime (memory|compute|latency: under 15 us), count, median, p95` of the relative
error, and `bias`, the median signed error. DIR may be any folder with tables of these formats, at any depth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cost.fit import merge_all_reduce
from common.cost.operators import Operators
from common.cost.predict import compare, summarise
from common.cost.specs import HardwareSpec, load_hardware
from common.cost.tables import read_tables
from common.errors import ConfigError, KVPlaneError

HARDWARE_CONF = Path(__file__).resolve().parents[2] / "conf" / "hardware"


def hardware_named(name: str) -> HardwareSpec:
    """A card of conf/hardware."""
    import yaml

    path = HARDWARE_CONF / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in HARDWARE_CONF.glob("*.yaml")))
        raise ConfigError(f"hardware {name!r} is unknown; known: {known}")
    return load_hardware(yaml.safe_load(path.read_text()))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; exit code 2 when nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m common.cost.validate", description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--format", choices=("aiconfigurator", "vidur", "vllm"))
    args = parser.parse_args(argv)
    try:
        hardware = hardware_named(args.hardware)
        tables = merge_all_reduce(read_tables(args.dir, args.format))
        if not tables:
            raise ConfigError(f"{args.dir}: no operator tables of a known format found")
        if hardware.derived_from:
            print(f"note: {hardware.name} is derived from {hardware.derived_from}", file=sys.stderr)
        for row in summarise(compare(Operators(hardware), tables)):
            print(json.dumps(row))
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
