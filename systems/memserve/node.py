"""What the pool's tree is made of, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from common.errors import ContractError
from common.kv import radix
from common.kv.radix import Run
from common.types import Content, Tier


class Node(radix.Node):
    """An edge in one tier. `num_hbm`: children in HBM or on their way; `born`: when it was stored; `releases`: that
    ended here, at least. Its run ends where its blocks do."""

    __slots__ = ("alive", "born", "num_hbm", "releases", "tier")

    def __init__(self, parent: Node | None, key: Content, run: Run, num_blocks: int, tier: Tier | None) -> None:
        super().__init__(parent, key, run, num_blocks)
        self.tier = tier
        self.num_hbm = 0
        self.born = 0
        self.releases = 0
        self.alive = True

    def up(self) -> Node:
        """Its parent."""
        return cast(Node, self.parent)

    def hand_up(self) -> None:
        """Its last use becomes its parent's: it leaves the parent's tier, or for good."""
        parent = self.up()
        parent.releases = max(parent.releases, self.releases)
        if self.used > parent.used:
            parent.used, parent.tick = self.used, self.tick


def _lru(node: Node) -> tuple[int, int]:
    return node.used, 0


def _fifo(node: Node) -> tuple[int, int]:
    return node.born, 0


def _lfu(node: Node) -> tuple[int, int]:
    return node.releases, node.used


def _largest(node: Node) -> tuple[int, int]:
    return -node.num_blocks, node.used


# which leaf goes first: the least of these (the paper names no order; SGLang's is LRU)
ORDERS: dict[str, Callable[[Node], tuple[int, int]]] = {"lru": _lru, "fifo": _fifo, "lfu": _lfu, "largest": _largest}


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
