"""Cells of KV ranges that several lanes, and KV held outside lanes, draw from: one account per instance.

A lane over several stages takes a block at each of them at once, so its free blocks are those of its scarcest stage.
"""

from __future__ import annotations

from common.errors import ContractError
from common.types import Stage


class CellLedger:
    """`free` cells are nobody's: neither a lane's (granted blocks included) nor held under a request's name."""

    def __init__(self) -> None:
        self.capacity: dict[int, int] = {}
        self.free: dict[int, int] = {}

    def open(self, instance: int, cells: int) -> None:
        """An instance serves, empty."""
        self.capacity[instance] = self.free[instance] = cells

    def close(self, instance: int) -> None:
        """An instance is gone with all that was on it; what was taken there needs no giving back."""
        self.capacity.pop(instance, None)
        self.free.pop(instance, None)

    def resize(self, instance: int, cells: int) -> None:
        """The KV range grew or shrank; what is taken must fit."""
        free = self.free[instance] + cells - self.capacity[instance]
        if free < 0:
            raise ContractError(f"instance {instance}: a KV range of {cells} cells lacks {-free} that are in use")
        self.capacity[instance] = cells
        self.free[instance] = free

    def blocks(self, stages: tuple[Stage, ...]) -> int:
        """Free blocks of a route."""
        free = self.free
        return min([free.get(s.instance, 0) // (s.layers[1] - s.layers[0]) for s in stages])

    def capacity_blocks(self, stages: tuple[Stage, ...]) -> int:
        """Blocks that a route has when nothing else is there."""
        return min([self.capacity.get(s.instance, 0) // (s.layers[1] - s.layers[0]) for s in stages])

    def whole_blocks(self, stages: tuple[Stage, ...]) -> tuple[int, int]:
        """Blocks that a route can hold, and cells of its instances that are in none of them: what the scarcest stage
        leaves over at the others, and what makes no whole block."""
        blocks = self.capacity_blocks(stages)
        cells = sum(self.capacity.get(stage.instance, 0) for stage in stages)
        return blocks, cells - blocks * sum(high - low for _, (low, high) in stages)

    def take(self, stages: tuple[Stage, ...], blocks: int) -> None:
        """Charge blocks at every stage (negative: give them back)."""
        for stage in stages:
            self.take_cells(stage.instance, blocks * (stage.layers[1] - stage.layers[0]))

    def take_cells(self, instance: int, cells: int) -> None:
        """Charge cells of one instance (negative: give them back)."""
        if instance not in self.free:
            return
        left = self.free[instance] - cells
        if not 0 <= left <= self.capacity[instance]:
            raise ContractError(f"instance {instance}: {cells} cells of {self.free[instance]} free ones, "
                                f"capacity {self.capacity[instance]}")  # fmt: skip
        self.free[instance] = left
