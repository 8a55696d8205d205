"""Byte-accurate memory of simulated instances, counted in cells (K and V of one block of one layer).

A `Held` rectangle is KV that lives outside any lane: parked, copied in, swapped out, or lent. What runs in a lane is
counted by the lane. Content-named cached blocks are a count. Law: used = lanes + held + cached <= capacity, always.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from common.errors import ContractError
from common.types import InstanceInfo, Layers, Tier


@dataclass(slots=True, eq=False)
class Held:
    """KV of tokens [start, end) x layers of a request on one instance and tier. `ready`: its data is there and
    nothing that moves (a copy or load into it, a swap out of it) has a claim on it."""

    instance: int
    tier: Tier
    layers: Layers
    start: int
    end: int
    ready: bool = True

    def cells(self, block_size: int) -> int:
        """Cells occupied; partly filled blocks count whole."""
        blocks = -(-self.end // block_size) - self.start // block_size
        return blocks * (self.layers[1] - self.layers[0])


class InstanceMemory:
    """One instance's KV range, its resident layers and its host tier."""

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.resident = [True] * info.num_layers
        self.capacity = info.kv_cells  # cells now; ShrinkKV lowers it before parameters return
        self.used = 0
        self.cached = 0  # part of `used`: content-named cells that nobody runs on
        self.host_used = 0
        self.host_cached = 0  # part of `host_used`
        self.loading: set[int] = set()  # layers on their way back: their pages are taken

    def room(self) -> int:
        """Free cells."""
        return self.capacity - self.used

    def take(self, cells: int) -> None:
        """Charge cells; more than there are is the policy's error."""
        self.used += cells
        if self.used > self.capacity:
            raise ContractError(
                f"instance {self.info.instance}: {self.used} KV cells used of {self.capacity}: the ledger overbooked"
            )

    def give(self, cells: int) -> None:
        """Return cells."""
        self.used -= cells
        if self.used < 0:
            raise ContractError(f"instance {self.info.instance}: more KV cells freed than held")

    def host_room(self) -> int:
        """Free cells of the host tier."""
        return self.info.host_cells - self.host_used

    def full_capacity(self, returning: int = 0) -> int:
        """Cells that the pages outside parameters hold, once `returning` more layers have taken theirs."""
        dropped = self.resident.count(False) - len(self.loading) - returning
        return self.info.kv_cells + dropped * self.info.layer_param_bytes // self.info.cell_bytes

    def spare_bytes(self) -> int:
        """Bytes of dropped layers that make no whole cell."""
        dropped = self.resident.count(False) - len(self.loading)
        return dropped * self.info.layer_param_bytes % self.info.cell_bytes

    def spare_cells(self) -> int:
        """Cells that make no whole block of the layers that are resident."""
        return self.capacity % max(1, self.resident.count(True))

    def has(self, layers: Layers) -> bool:
        """Are all these layers' parameters here?"""
        return all(self.resident[layers[0] : layers[1]])

    def param_bytes(self) -> int:
        """Bytes of resident decoder layers."""
        return self.resident.count(True) * self.info.layer_param_bytes


def union_cells(rectangles: list[Held], block_size: int) -> int:
    """Cells that rectangles of one request on one instance and tier occupy; a block that two of them share is one."""
    borders = sorted({border for held in rectangles for border in held.layers})
    total = 0
    for low, high in pairwise(borders):
        band = [held for held in rectangles if held.layers[0] <= low and high <= held.layers[1]]
        reached = 0
        for first, last in sorted((held.start // block_size, -(-held.end // block_size)) for held in band):
            total += max(0, last - max(first, reached)) * (high - low)
            reached = max(reached, last)
    return total


def overlap(first: Layers, second: Layers) -> Layers | None:
    """The common layers of two ranges."""
    low, high = max(first[0], second[0]), min(first[1], second[1])
    return (low, high) if low < high else None


def subtract(held: Held, layers: Layers, tokens: tuple[int, int]) -> list[Held]:
    """What is left of a rectangle after a corner, side or all of it is taken away (at most four rectangles)."""
    common = overlap(held.layers, layers)
    start, end = max(held.start, tokens[0]), min(held.end, tokens[1])
    if common is None or start >= end:
        return [held]
    rest: list[Held] = []

    def keep(band: Layers, low: int, high: int) -> None:
        if band[0] < band[1] and low < high:
            rest.append(Held(held.instance, held.tier, band, low, high, held.ready))

    keep((held.layers[0], common[0]), held.start, held.end)
    keep((common[1], held.layers[1]), held.start, held.end)
    keep(common, held.start, start)
    keep(common, end, held.end)
    return rest
