"""A test that hangs fails."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Overdue(Exception):
    """A run that hangs."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Overdue, if what is inside takes longer (main thread)."""

    def ring(number: int, frame: object) -> None:
        raise Overdue(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
