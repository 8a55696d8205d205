"""Addresses of a pool's blocks, and blocks on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from common.types import Content, Tier
from systems.memserve.node import Lease

if TYPE_CHECKING:
    from systems.memserve.mempool import MemPool


class Extent(NamedTuple):
    """Blocks of an instance and tier: an entry of an address list."""

    instance: int
    tier: Tier
    num_blocks: int
    serial: int


AddrList = tuple[Extent, ...]


class Transfer:
    """A copy on its way from `src` to `dst`. `lease`: what `dst` had cached before its first token, pinned there."""

    __slots__ = (
        "blocks", "command_id", "dst", "insert", "lease", "private", "request_id", "src", "src_lease", "tokens",
    )  # fmt: skip

    def __init__(self, command_id: int, request_id: int, src: MemPool, dst: MemPool, tokens: tuple[int, int],
                 blocks: int, lease: Lease | None, insert: Content | None, private: Any) -> None:  # fmt: skip
        self.command_id = command_id
        self.request_id = request_id
        self.src = src
        self.dst = dst
        self.tokens = tokens
        self.blocks = blocks
        self.lease = lease
        self.insert = insert
        self.private = private
        self.src_lease: Lease | None = None


class Swap(NamedTuple):
    """Cached blocks on their way between tiers; the lease pins their path."""

    command_id: int
    lease: Lease
    start: int
    out: bool
