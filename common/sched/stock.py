"""GPUs that several pools share: which instance has which, and who is short of them."""

from __future__ import annotations

from collections.abc import Sequence

from common.types import InstanceInfo


class Stock:
    """Every pool has an instance for each GPU; a GPU is held by at most one of them, from its start until it is down.
    With one model every instance has a GPU of its own."""

    def __init__(self, infos: Sequence[InstanceInfo]) -> None:
        self.num_instances = len(infos)
        self._gpu = {info.instance: info.gpu if info.gpu >= 0 else info.instance for info in infos}
        self._holder = {self._gpu[info.instance]: info.instance for info in infos if info.running}
        self._short: dict[int, int] = {}  # pool -> bins without an instance

    def free(self, instance: int) -> bool:
        """May this instance be started?"""
        return self._holder.get(self._gpu[instance], instance) == instance

    def take(self, instance: int) -> None:
        """It is started."""
        assert self.free(instance), f"instance {instance}: its GPU is in use"
        self._holder[self._gpu[instance]] = instance

    def give(self, instance: int) -> None:
        """It is down, or lost."""
        if self._holder.get(self._gpu[instance]) == instance:
            del self._holder[self._gpu[instance]]

    def in_use(self) -> int:
        """GPUs that somebody holds."""
        return len(self._holder)

    def lacks(self, pool: int, bins: int) -> None:
        """A pool has so many bins without an instance."""
        self._short[pool] = bins

    def pressed(self, pool: int) -> bool:
        """Does another pool wait for GPUs? Then empty ones are given back at once."""
        return any(bins for other, bins in self._short.items() if other != pool)
