"""v1's CPU rBlocks: host memory of an instance as a second pool, lent like its GPU's and as a creditor of its own.

Such a creditor's number is `HOST` + its instance. Debtors (its own instance first) turn to it when no GPU lends; what
lies there is read over PCIe in every step, so it is the last resort before a request is computed anew.
"""

from __future__ import annotations

from common.errors import ContractError
from common.types import Command, Tier

HOST = 1 << 20  # more instances than a cluster may have


def where(creditor: int) -> tuple[int, Tier]:
    """Instance and tier of a creditor."""
    return creditor % HOST, Tier.DRAM if creditor >= HOST else Tier.HBM


class HostPool:
    """The account of an instance's CPU rBlocks, with what `Creditor` asks of a lane: nothing runs here, so every time
    is a boundary."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = self.free = num_blocks
        self.lent = 0
        self.busy = False
        self.held_back = False

    def lend(self, blocks: int) -> None:
        """Give free blocks away."""
        if blocks > self.free:
            raise ContractError(f"host memory: lends {blocks} of {self.free} blocks")
        self.free -= blocks
        self.lent += blocks

    def interrupt(self, out: list[Command]) -> None:
        """Nothing runs."""

    def poke(self, out: list[Command]) -> None:
        """Nobody waits."""
