"""Compile every Triton kernel for sm_80 and sm_90a, without a GPU, and record what each would use.

    python -m common.kernels.compile_check [--out results/kernels] [--quick]

Writes `compile.json` and `compile.md`: registers a thread, bytes spilled (stack and local memory), shared memory a
program. Exit code 1 if anything spills, 2 on an error. Nothing is run: that a kernel compiles says nothing about
its results. The launch choices are those that the backend makes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.errors import ConfigError, KVPlaneError
from common.kernels import triton_cache, triton_kernels
from common.kernels.triton_kernels import Launch
from common.results import replacing

TARGETS = {"sm_80": 80, "sm_90a": 90}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_SIZES = (64, 128)
GROUPS = (1, 4, 8)
SPLITS = (1, 8, 32)
BLOCK_SIZE = 16
COLUMNS = ("kernel", "target", "dtype", "head_size", "group", "splits", "registers", "spilled_bytes", "shared_bytes")


class Case(NamedTuple):
    """One compilation. Fields that a kernel does not depend on are None."""

    kernel: str
    dtype: str
    head_size: int | None
    group: int | None
    splits: int | None
    launch: Launch


def cases(quick: bool) -> Iterator[Case]:
    """All compilations; quick: each kernel once or twice."""
    for dtype in ("fp16",) if quick else DTYPES:
        for size in HEAD_SIZES[:1] if quick else HEAD_SIZES:
            for group in GROUPS[1:2] if quick else GROUPS:
                shape = (DTYPES[dtype], group, size, BLOCK_SIZE)
                for splits in SPLITS[:2]:  # further splits only change a constant
                    launch = triton_kernels.decode_launch(*shape, splits, wide=False)
                    yield Case("decode_kernel", dtype, size, group, splits, launch)
                launch = triton_kernels.prefill_launch(*shape, wide=False)
                yield Case("prefill_kernel", dtype, size, group, None, launch)
            for splits in SPLITS[1:2] if quick else SPLITS[1:]:
                yield Case("merge_kernel", dtype, size, None, splits, triton_kernels.merge_launch(size, splits))
        yield from cache_cases(dtype)


def cache_cases(dtype: str) -> Iterator[Case]:
    """The kernels that write and copy KV, for 8 KV heads of 128."""
    width = 8 * 128
    constants: dict[str, int | bool] = {"WIDTH": width, "BLOCK_SIZE": BLOCK_SIZE, "BLOCK_WIDTH": width}
    yield Case("write_kernel", dtype, 128, None, None, Launch(constants, 4, 2))
    constants = {"HAS_SRC": True, "HAS_DST": True, "CHUNK": triton_cache.CHUNK}
    yield Case("copy_kernel", dtype, None, None, None, Launch(constants, 4, 2))


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """Compile one case: a row of COLUMNS."""
    kernel = getattr(triton_kernels, case.kernel, None) or getattr(triton_cache, case.kernel)
    names: list[str] = kernel.arg_names
    types = {name: argument_type(name, case) for name in names if name not in case.launch.constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if name.endswith("_ptr") or "stride" in name or name == "numel"]
    source = ASTSource(
        kernel, signature, constexprs=case.launch.constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", TARGETS[target], 32), options=options)
    registers, spilled = resource_usage(compiled.asm["cubin"])
    values = (case.kernel, target, case.dtype, case.head_size, case.group, case.splits)
    return dict(zip(COLUMNS, (*values, registers, spilled, compiled.metadata.shared)))


def argument_type(name: str, case: Case) -> str:
    """Triton's type of a kernel argument, as the backend passes it."""
    if name in ("part_o_ptr", "part_lse_ptr", "lse_ptr") or (name == "o_ptr" and (case.splits or 1) > 1
                                                             and case.kernel == "decode_kernel"):  # fmt: skip
        return "*fp32"
    if name.endswith(("slots_ptr", "cells_ptr")):
        return "*i64"
    if name in ("table_ptr", "meta_ptr"):
        return "*i32"
    if name.endswith("_ptr"):
        return f"*{case.dtype}"
    return "fp32" if name == "scale_log2" else "i32"


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory a thread), as cuobjdump says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if set(used) != {"REG", "STACK", "LOCAL"}:
        raise ConfigError(f"cuobjdump says nothing of resources: {text.strip()[-200:]!r}")
    return used["REG"], used["STACK"] + used["LOCAL"]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for readers."""
    cells = [["" if row[column] is None else str(row[column]) for column in COLUMNS] for row in rows]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    head = (f"Triton {triton.__version__}, compiled without a GPU and not run; block size {BLOCK_SIZE}.\n"
            "Registers and spilled bytes are per thread, shared memory per program.\n\n")  # fmt: skip
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Both files, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"triton": triton.__version__, "block_size": BLOCK_SIZE, "kernels": list(rows)}
    for name, text in (("compile.json", json.dumps(content, indent=1) + "\n"), ("compile.md", markdown(rows))):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def check(out: Path, quick: bool) -> int:
    """Compile and write everything; the exit code."""
    if triton.knobs.runtime.interpret:
        raise ConfigError("compile_check cannot run under TRITON_INTERPRET: unset it")
    rows = [compile_case(case, target) for case in cases(quick) for target in (["sm_90a"] if quick else TARGETS)]
    write(out, rows)
    spilled = [row for row in rows if row["spilled_bytes"]]
    for row in spilled:
        print(f"spills {row['spilled_bytes']} bytes: {row}", file=sys.stderr)
    print(f"{len(rows)} compilations, {len(spilled)} with spills: {out / 'compile.md'}")
    return 1 if spilled else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m common.kernels.compile_check", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/kernels"), help="folder for the two files")
    parser.add_argument("--quick", action="store_true", help="each kernel for sm_90a only, in one shape")
    options = parser.parse_args(arguments)
    try:
        return check(options.out, options.quick)
    except (KVPlaneError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
