"""Instances of a fleet, and the bin that each of them serves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from common.sched.stock import Stock
from common.types import ClusterInfo

RANK = {"up": 0, "starting": 1, "down": 2}


@dataclass
class Host:
    """An instance and the bin that it serves."""

    state: str = "down"  # down, starting, up
    bin: int | None = None
    idle_since: int = -1
    starts: int = 0
    waits_for_down: bool = False


class Hosts:
    """Which bin is where."""

    def __init__(self, cluster: ClusterInfo, stock: Stock) -> None:
        self.all = {info.instance: Host("starting" if info.running else "down") for info in cluster.instances}
        self.stock = stock
        self.of_bin: dict[int, int] = {}  # bin -> instance

    def __getitem__(self, instance: int) -> Host:
        return self.all[instance]

    def __len__(self) -> int:
        return len(self.all)

    def vacate(self, instance: int) -> None:
        """It serves no bin any more."""
        host = self.all[instance]
        if host.bin is not None:
            del self.of_bin[host.bin]
            host.bin = None

    def assign(self, bins: Collection[int]) -> list[tuple[int, int]]:
        """Bins that have got an instance now: one that is up and free, else one that is starting, else one that is
        down. Those of bins that are gone are free."""
        for bin_id in [bin_id for bin_id in self.of_bin if bin_id not in bins]:
            self.vacate(self.of_bin[bin_id])
        wanting = [bin_id for bin_id in bins if bin_id not in self.of_bin]
        if not wanting:
            return []
        free = [index for index, host in self.all.items()
                if host.bin is None and not host.waits_for_down and self.stock.free(index)]  # fmt: skip
        free.sort(key=lambda index: (RANK[self.all[index].state], index))
        made = list(zip(wanting, free))
        for bin_id, instance in made:
            self.all[instance].bin, self.of_bin[bin_id] = bin_id, instance
        return made
