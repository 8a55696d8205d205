"""A child that times cases in one tree: `python child.py ROOT`; a case's name comes in, CPU ns (or an error) go out."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any


def cases_of(path: Path) -> Any:
    """The module of cases, from its file."""
    spec = importlib.util.spec_from_file_location("micro_cases", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(root: str) -> None:
    """Answer lines until the input ends. What the code prints goes to stderr, where nobody reads it."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path[0] = root
    cases, ready = cases_of(Path(__file__).with_name("cases.py")), dict[str, Any]()
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in ready:
                ready[name] = cases.prepared(name)
            answers.write(f"{cases.timed(*ready[name])}\n")
        except Exception as error:
            answers.write(f"error {type(error).__name__}: {' '.join(str(error).split())[:150]}\n")


if __name__ == "__main__":
    main(sys.argv[1])
