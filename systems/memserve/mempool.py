"""MemPool: one instance's HBM and host DRAM behind nine calls (MemServe Table 1), on the planner's side.

It keeps the ledger in blocks (free + active + historical + in transfer = total, per tier) and emits the commands that
make an executor follow. A call that cannot be done returns None (or 0) and leaves no trace. What it evicts it names by
content, so the executor's own order of eviction has no say. Ids of blocks are the executor's: an address here is an
extent of so many blocks of an instance and tier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.errors import ContractError
from common.types import Command, Content, CopySpan, FreeSpan, InstanceInfo, Layers, Status, SwapSpan, Tier
from systems.memserve.address import AddrList, Extent, Swap, Transfer
from systems.memserve.tree import Found, Gone, Inserted, Lease, PoolTree

__all__ = ["AddrList", "Extent", "MemPool", "Swap", "Transfer"]


class MemPool:
    """See the module docstring. `ids`: fresh command ids; `order`: of eviction."""

    def __init__(self, info: InstanceInfo, num_blocks: int, block_size: int, ids: Callable[[], int],
                 order: str = "lru") -> None:  # fmt: skip
        self.instance = info.instance
        self.layers: Layers = (0, info.num_layers)
        self.size = block_size
        self.ids = ids
        self.tree = PoolTree(block_size, order)
        self.total = {Tier.HBM: num_blocks, Tier.DRAM: info.host_cells // info.num_layers}
        self.free = dict(self.total)
        self.active = {Tier.HBM: 0, Tier.DRAM: 0}
        self.moving = {Tier.HBM: 0, Tier.DRAM: 0}
        self.dead = False
        self.counters = {"evicted": 0, "swapped_out": 0, "swapped_in": 0, "expired": 0, "inserted": 0}
        self._extents: dict[int, Extent] = {}
        self._swaps: dict[int, Swap] = {}

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.size)

    # ------------------------------------------------------------ alloc_mem, free_mem

    def can(self, num_blocks: int, tier: Tier = Tier.HBM) -> bool:
        """Could so many blocks be had, by evicting what nobody reads?"""
        return num_blocks <= self.free[tier] + self.tree.evictable[tier]

    def take(self, num_blocks: int, out: list[Command], tier: Tier = Tier.HBM) -> bool:
        """Make blocks active, evicting what is needed; False, and no trace, if they cannot be had."""
        if not self.can(num_blocks, tier):
            return False
        self.evict(num_blocks - self.free[tier], out, tier)
        self.free[tier] -= num_blocks
        self.active[tier] += num_blocks
        return True

    def give(self, num_blocks: int, tier: Tier = Tier.HBM) -> None:
        """Active blocks become free."""
        self.free[tier] += num_blocks
        self.active[tier] -= num_blocks

    def alloc_mem(self, num_blocks: int, out: list[Command], tier: Tier | None = Tier.HBM) -> AddrList | None:
        """Fixed-size blocks of this instance; `tier` None: HBM first, the rest in DRAM."""
        hbm = num_blocks if tier is Tier.HBM else 0
        if tier is None:
            hbm = min(num_blocks, self.free[Tier.HBM] + self.tree.evictable[Tier.HBM])
        parts = [(Tier.HBM, hbm), (Tier.DRAM, num_blocks - hbm)]
        if num_blocks <= 0 or not all(self.can(num, where) for where, num in parts):
            return None
        found = []
        for where, num in parts:
            if num and self.take(num, out, where):
                extent = Extent(self.instance, where, num, self.ids())
                self._extents[extent.serial] = extent
                found.append(extent)
        return tuple(found)

    def free_mem(self, addresses: AddrList) -> None:
        """Give an address list back. One that is not held here is an error and changes nothing."""
        if any(self._extents.get(extent.serial) != extent for extent in addresses):
            raise ContractError(f"instance {self.instance}: {addresses} are not (all) allocated here")
        for extent in addresses:
            del self._extents[extent.serial]
            self.give(extent.num_blocks, extent.tier)

    # ------------------------------------------------------------ insert, match, delete

    def match(self, content: Content, max_tokens: int) -> Found:
        """Cached leading tokens, in HBM and in all; `pin` what is used."""
        return self.tree.match(content, max_tokens)

    def pin(self, content: Content, tokens: int) -> Lease:
        """Protect a matched prefix from eviction."""
        return self.tree.acquire(content, tokens)

    def unpin(self, lease: Lease | None, read: bool = True) -> None:
        """Let it go; None and what died with the instance is nothing. `read` False: it was nobody's use of the blocks,
        and their place in the order of eviction and their age stay."""
        if lease is not None and lease.node is not None:
            self.tree.release(lease, read)

    def insert(self, content: Content, tokens: int, lease: Lease, out: list[Command]) -> Inserted:
        """Active blocks behind the lease become historical, where they lie: nothing is copied. The caller tells the
        executor by `retain`; copies in DRAM of the same tokens are freed."""
        done = self.tree.insert(lease, content, tokens)
        self.active[Tier.HBM] -= done.num_new
        self.counters["inserted"] += done.num_new
        self._freed(done.gone, out)
        return done

    def retire(self, request_id: int, content: Content, have: tuple[int, int], blocks: int, lease: Lease,
               out: list[Command]) -> int:  # fmt: skip
        """`insert` for KV held under a request's name: tokens `have`, `blocks` of them active. What cannot be inserted
        is freed. Returns the tokens cached from the start on; the lease pins them."""
        done = self.insert(content, have[1], lease, out)
        if done.num_new:
            out.append(FreeSpan(self.instance, request_id, tokens=(have[0], done.end), retain=done.num_new))
        out.append(FreeSpan(self.instance, request_id))
        self.give(blocks - done.num_new)
        return done.end

    def delete(self, content: Content, out: list[Command]) -> int:
        """Drop the tail of a content's path that nobody reads and no other content shares; returns blocks."""
        dropped = 0
        while (node := self.tree.tail(content)) is not None:
            gone = self.tree.drop(node)
            self._freed(gone, out)
            dropped += sum(part.end - part.start for part in gone) // self.size
        return dropped

    # ------------------------------------------------------------ eviction

    def evict(self, num_blocks: int, out: list[Command], tier: Tier = Tier.HBM) -> None:
        """Leaf by leaf, in the tree's order (the paper names none); below what leaves HBM nothing stays in DRAM."""
        while num_blocks > 0:
            node = self.tree.oldest(tier, num_blocks)
            assert node is not None, "evictable blocks without an unpinned leaf"
            num_blocks -= node.num_blocks
            self.counters["evicted"] += node.num_blocks
            self._freed(self.tree.drop(node), out)

    def expire(self, older_than: int, out: list[Command]) -> None:
        """TTL: drop what was last released before then."""
        for tier in (Tier.DRAM, Tier.HBM):
            while (node := self.tree.expired(tier, older_than)) is not None:
                self.counters["expired"] += node.num_blocks
                self._freed(self.tree.drop(node), out)

    def _freed(self, gone: list[Gone] | tuple[Gone, ...], out: list[Command]) -> None:
        for tier, content, start, end in gone:
            num = (end - start) // self.size
            self.free[tier] += num
            out.append(FreeSpan(self.instance, None, tokens=(start, end), cached_blocks=num, tier=tier,
                                content=content))  # fmt: skip

    # ------------------------------------------------------------ swap_out, swap_in

    def swap_out(self, num_blocks: int, out: list[Command]) -> int:
        """HBM -> DRAM; the pool picks leaves as for eviction. Returns blocks on their way."""
        begun = 0
        while begun < num_blocks:
            node = self.tree.oldest(Tier.HBM, num_blocks - begun)
            if node is None:
                break
            num, end = node.num_blocks, node.start + node.num_blocks * self.size
            content = node.run.content(end)
            lease = self.tree.acquire(content, end)
            if not self.take(num, out, Tier.DRAM):
                self.unpin(lease, read=False)
                break
            self.give(num, Tier.DRAM)
            self._begin(Swap(self.ids(), lease, node.start, True), content, num, out)
            begun += num
        self.counters["swapped_out"] += begun
        return begun

    def swap_in(self, content: Content, found: Found, out: list[Command]) -> Swap | None:
        """DRAM -> HBM, before a prefill may read it. The lease of the answer pins the whole prefix."""
        num = (found.total - found.hbm) // self.size
        lease = self.tree.acquire(content, found.total)
        if not num or not self.take(num, out):
            self.unpin(lease, read=False)
            return None
        self.give(num)
        swap = Swap(self.ids(), lease, found.hbm, False)
        self._begin(swap, content, num, out)
        self.counters["swapped_in"] += num
        return swap

    def _begin(self, swap: Swap, content: Content, num: int, out: list[Command]) -> None:
        source, goal = (Tier.HBM, Tier.DRAM) if swap.out else (Tier.DRAM, Tier.HBM)
        for node in self.tree.span(swap.lease, swap.start):
            self.tree.move(node, None)
        self.free[goal] -= num
        for tier in (source, goal):
            self.moving[tier] += num
        self._swaps[swap.command_id] = swap
        out.append(SwapSpan(swap.command_id, -1, self.instance, self.layers, (swap.start, swap.lease.tokens), swap.out,
                            content))  # fmt: skip

    def swap_done(self, command_id: int, status: Status) -> Swap | None:
        """A swap was answered: its blocks are in their new tier. None: not one of this pool's."""
        swap = self._swaps.pop(command_id, None)
        if swap is None or self.dead:
            return None
        assert status is Status.OK, "a swap of a live instance was refused: the ledger is wrong"
        source, goal = (Tier.HBM, Tier.DRAM) if swap.out else (Tier.DRAM, Tier.HBM)
        num = (swap.lease.tokens - swap.start) // self.size
        for node in self.tree.span(swap.lease, swap.start):
            self.tree.move(node, goal)
        self.free[source] += num
        for tier in (source, goal):
            self.moving[tier] -= num
        if swap.out:
            self.unpin(swap.lease, read=False)
        return swap

    # ------------------------------------------------------------ transfer, transfer_with_insert

    def transfer(self, dst: MemPool, request_id: int, tokens: tuple[int, int], out: list[Command], *,
                 lease: Lease | None = None, addresses: AddrList | None = None, reserve: int = 0, num_calls: int = 1,
                 after: int | None = None, by_layer: bool = False, private: Any = None,
                 insert: Content | None = None) -> Transfer | None:  # fmt: skip
        """Push tokens to another instance; without `addresses` the receiver allocates (beside `reserve` others, or not
        at all). `private` travels along. `lease`: pins at the receiver what comes before `tokens`."""
        blocks = dst.blocks(tokens[1]) - tokens[0] // self.size
        if addresses is not None:
            if sum(extent.num_blocks for extent in addresses) != blocks:
                raise ContractError(f"{addresses} are not {blocks} blocks of instance {dst.instance}")
            dst.free_mem(addresses)
        if self.dead or dst.dead or not dst.can(blocks + reserve) or not dst.take(blocks, out):
            return None
        dst.active[Tier.HBM] -= blocks
        dst.moving[Tier.HBM] += blocks
        move = Transfer(self.ids(), request_id, self, dst, tokens, blocks, lease, insert, private)
        out.append(CopySpan(move.command_id, request_id, self.instance, dst.instance, self.layers, tokens, after,
                            by_layer, num_calls=num_calls))  # fmt: skip
        return move

    def transfer_with_insert(self, dst: MemPool, request_id: int, content: Content, tokens: tuple[int, int],
                             out: list[Command], **flags: Any) -> Transfer | None:  # fmt: skip
        """As `transfer`; when the data is there, and not before, the receiver inserts it."""
        return self.transfer(dst, request_id, tokens, out, insert=content, **flags)

    def arrived(self, move: Transfer, status: Status, out: list[Command]) -> bool:
        """The receiver's end of a transfer: False if it failed (its blocks are free again, its lease is let go)."""
        self.moving[Tier.HBM] -= move.blocks
        self.active[Tier.HBM] += move.blocks
        if status is Status.OK:
            return True
        self.give(move.blocks)
        self.unpin(move.lease)
        move.lease = None
        return False

    # ------------------------------------------------------------ law

    def check(self) -> None:
        """Assert the ledger's law in both tiers. Costs O(tree): for tests."""
        self.tree.check()
        for tier in Tier:
            parts = (self.free[tier], self.active[tier], self.tree.cached[tier], self.moving[tier])
            assert min(parts) >= 0 and sum(parts) == self.total[tier], f"{tier}: {parts} of {self.total[tier]}"
        assert sum(extent.num_blocks for extent in self._extents.values()) <= sum(self.active.values())
