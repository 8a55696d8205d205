"""Two trees timed in turns: a case has regressed if it is slower by more than a factor and that is no accident."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median

from bench.micro.cases import CASES

FACTOR = 1.10  # slower than the pinned reference by more than this,
SIGNIFICANT = 0.01  # by a one-sided sign test over rounds, twice
ROUNDS, QUICK_ROUNDS = 21, 9
CHILD = Path(__file__).with_name("child.py")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


@dataclass(frozen=True)
class Timing:
    """CPU ns of each round, current and pinned; `error` where one of them cannot run the case."""

    name: str
    pairs: tuple[tuple[int, int], ...] = ()
    error: str | None = None

    @property
    def ratio(self) -> float:
        """How many times as long as the pinned reference: the median over rounds."""
        return median(ours / theirs for ours, theirs in self.pairs)

    @property
    def chance(self) -> float:
        """How likely so many slower rounds are where both are equally fast (sign test)."""
        number, slower = len(self.pairs), sum(ours > theirs for ours, theirs in self.pairs)
        return float(sum(comb(number, k) for k in range(slower, number + 1)) / 2**number)

    @property
    def slower(self) -> bool:
        """By more than the factor, and significantly."""
        return self.error is None and self.ratio > FACTOR and self.chance < SIGNIFICANT

    def line(self) -> str:
        """What moved and by how much."""
        slower = sum(ours > theirs for ours, theirs in self.pairs)
        return (f"{self.name}: {100 * (self.ratio - 1):+.1f}% against the pinned reference, slower in {slower} of "
                f"{len(self.pairs)} rounds (chance {self.chance:.2g})")  # fmt: skip


@contextmanager
def child(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that times cases with the code below `root`."""
    environment = {**os.environ, **ONE_THREAD, "PYTHONHASHSEED": "0"}
    with subprocess.Popen([sys.executable, str(CHILD), str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, env=environment, cwd=root) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str], name: str) -> int | str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(name + "\n")
    process.stdin.flush()
    answer = process.stdout.readline().strip()
    return int(answer) if answer.isdigit() else answer or "error: the process died"


def timings(current: Path, pinned: Path, rounds: int, names: Sequence[str] = tuple(CASES)) -> list[Timing]:
    """Every case, in rounds of both trees in turn; who is first alternates."""
    with child(current) as ours, child(pinned) as theirs:
        return [_timing(ours, theirs, name, rounds) for name in names]


def _timing(ours: subprocess.Popen[str], theirs: subprocess.Popen[str], name: str, rounds: int) -> Timing:
    pairs: list[tuple[int, int]] = []
    for turn in range(rounds):
        order = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
        found = {id(process): _ask(process, name) for process in order}
        a, b = found[id(ours)], found[id(theirs)]
        if isinstance(a, str) or isinstance(b, str):
            where = "current" if isinstance(a, str) else "pinned reference"
            return Timing(name, error=f"{where}: {a if isinstance(a, str) else b}")
        pairs.append((a, b))
    return Timing(name, tuple(pairs))


def checked(current: Path, pinned: Path, rounds: int, names: Sequence[str] = tuple(CASES)) -> list[Timing]:
    """As `timings`; a case that seems slower is measured again in new processes, and the second verdict counts."""
    first = timings(current, pinned, rounds, names)
    again = [timing.name for timing in first if timing.slower]
    second = {timing.name: timing for timing in timings(current, pinned, 2 * rounds, again)} if again else {}
    return [second.get(timing.name, timing) for timing in first]
