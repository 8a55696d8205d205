"""Where wall time goes: functions replaced by timed ones, each charged for its own time, not for timed callees."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Seconds by name. `under` times a block of code; `watch` times every call of an attribute."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0
        self._patched: list[tuple[Any, str, Any]] = []

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Charge the block to a name, except for what is timed inside it."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Charge all calls of `owner.attribute` to a name until `restore`."""
        function: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.under(name):
                return function(*args, **kwargs)

        self._patched.append((owner, attribute, function))
        setattr(owner, attribute, timed)

    def restore(self) -> None:
        """Put every watched attribute back."""
        while self._patched:
            owner, attribute, function = self._patched.pop()
            setattr(owner, attribute, function)
