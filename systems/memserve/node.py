"""What the pool's tree is made of, and what it answers."""

from __future__ import annotations

from typing import NamedTuple, cast

from common.errors import ContractError
from common.kv import radix
from common.kv.radix import Run
from common.types import Content, Tier


class Node(radix.Node):
    """An edge in one tier. `num_hbm`: children in HBM or on their way. Its run ends where its blocks do."""

    __slots__ = ("alive", "num_hbm", "tier")

    def __init__(self, parent: Node | None, key: Content, run: Run, num_blocks: int, tier: Tier | None) -> None:
        super().__init__(parent, key, run, num_blocks)
        self.tier = tier
        self.num_hbm = 0
        self.alive = True

    def up(self) -> Node:
        """Its parent."""
        return cast(Node, self.parent)


class Lease:
    """A holder's pin on the first `tokens` tokens of its content."""

    __slots__ = ("node", "tokens")

    def __init__(self, node: Node, tokens: int) -> None:
        self.node: Node | None = node
        self.tokens = tokens


class Found(NamedTuple):
    """Leading tokens cached: readable in HBM, and with those that a swap-in would bring."""

    hbm: int
    total: int


class Gone(NamedTuple):
    """Blocks of a path that left a tier; `content` ends where they do."""

    tier: Tier
    content: Content
    start: int
    end: int


class Inserted(NamedTuple):
    """`end`: tokens of the path now pinned; `num_new` blocks of the holder's own went over to the cache."""

    num_new: int
    end: int
    gone: tuple[Gone, ...]


def held_node(lease: Lease) -> Node:
    """Where a lease that lives ends."""
    if lease.node is None:
        raise ContractError("the lease was released before")
    return lease.node
