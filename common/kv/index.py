"""The prefix index by content: which blocks an instance has cached (MemServe 4.2, SGLang's radix cache).

Only full blocks are stored. A `Lease` pins the path from the root to its deepest node; pinning and unpinning
climb until they meet a node that others hold. The tree itself (runs, walks, splits) is `common.kv.radix`.

Order of eviction: least recently released first, tail first, as vLLM does. `node.used` stamps the last
release that ended at the node; one that ended deeper is handed up when the deeper node goes. Leaves wait in a
heap, each at most once; a stale entry is put right when it surfaces. No clock and no hash order has a say.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace

from common.errors import ContractError
from common.kv import radix
from common.kv.content import length, normalise, slice
from common.kv.radix import Evicted, Node
from common.types import Content

__all__ = ["Evicted", "Lease", "PrefixIndex"]


class Lease:
    """A holder's pin on the first `tokens` tokens of its content. Made, moved and ended only by its index."""

    __slots__ = ("node", "tokens")

    def __init__(self, node: Node, tokens: int) -> None:
        self.node: Node | None = node
        self.tokens = tokens


class PrefixIndex:
    """Cached blocks of one instance and tier, found by content. Query with `match` and `would_pin`, then `acquire`."""

    __slots__ = (
        "_leaves",
        "_num_leases",
        "_pushes",
        "_root",
        "_tick",
        "_uses",
        "block_size",
        "cached_blocks",
        "evictable_blocks",
    )

    def __init__(self, block_size: int) -> None:
        assert block_size > 0, f"block_size {block_size}"
        self.block_size = block_size
        self.cached_blocks = 0  # pinned and evictable
        self.evictable_blocks = 0
        self._num_leases = 0
        self._root = radix.root()
        self._leaves: list[tuple[int, int, Node]] = []
        self._uses = 0
        self._pushes = 0
        self._tick = 0

    # ------------------------------------------------------------ queries

    @property
    def pinned_blocks(self) -> int:
        """Blocks that some lease holds."""
        return self.cached_blocks - self.evictable_blocks

    @property
    def num_leases(self) -> int:
        """Leases that live."""
        return self._num_leases

    @property
    def tick(self) -> int:
        """The caller's time, in any unit, stamped on what is released. Only `expire` reads it."""
        return self._tick

    @tick.setter
    def tick(self, tick: int) -> None:
        if tick < self._tick:
            raise ContractError(f"tick goes back from {self._tick} to {tick}")
        self._tick = tick

    def match(self, content: Content, max_tokens: int) -> int:
        """Leading cached tokens: whole blocks, at most `max_tokens`. Changes nothing, nor the LRU order."""
        limit = min(max_tokens, length(content))
        limit -= limit % self.block_size
        return radix.walk(self._root, normalise(content), 0, limit, self.block_size)[1]

    def would_pin(self, content: Content, tokens: int) -> int:
        """Evictable blocks that `acquire` of the same would pin. Changes nothing, nor the LRU order."""
        found, matched = radix.walk(self._root, normalise(content), 0, tokens, self.block_size)
        if matched < tokens:
            raise ContractError(f"would_pin {tokens} tokens, but only {matched} are cached")
        num, node = 0, found if tokens else None
        while node is not None and not node.pins:
            num += min(node.num_blocks, (tokens - node.start) // self.block_size)
            node = node.parent
        return num

    # ------------------------------------------------------------ leases

    def acquire(self, content: Content, tokens: int) -> Lease:
        """Pin the first `tokens` tokens: whole blocks, as `match` found them."""
        if tokens < 0 or tokens % self.block_size or tokens > length(content):
            raise ContractError(f"acquire {tokens} tokens: not whole blocks of {length(content)} tokens")
        node, matched = radix.walk(self._root, normalise(content), 0, tokens, self.block_size)
        if matched < tokens:
            raise ContractError(f"acquire {tokens} tokens, but only {matched} are cached")
        node = radix.cut(node, tokens, self.block_size)
        self._pin(node)
        self._num_leases += 1
        return Lease(node, tokens)

    def extend(self, lease: Lease, content: Content, tokens: int) -> int:
        """`tokens` of `content` are computed: store and pin the full blocks; returns how many are new.

        Blocks that somebody else stored meanwhile are not stored twice: the lease then pins theirs, and the
        holder's own copies are free to go.
        """
        held = _held(lease)
        target = tokens - tokens % self.block_size
        if tokens > length(content):
            raise ContractError(f"extend to {tokens} tokens of a content of {length(content)}")
        if target <= lease.tokens:
            return 0
        content = normalise(content)
        _check_continues(held, content, lease.tokens)
        node, matched = radix.walk(held, content, lease.tokens, target, self.block_size)
        if node is not held:
            node = radix.cut(node, matched, self.block_size)
        if matched < target:
            node = self._store(node, slice(content, matched, target), in_place=node is held)
        if node is not held:
            lease.node = node
            self._pin(node)
            self._unpin(held)
        lease.tokens = target
        return (target - matched) // self.block_size

    def release(self, lease: Lease) -> None:
        """Unpin. The blocks stay cached, most recently used; deeper ones go before shallower ones."""
        node = _held(lease)
        self._uses += 1
        node.used = self._uses
        node.tick = self._tick
        lease.node = None
        self._num_leases -= 1
        self._unpin(node)

    # ------------------------------------------------------------ eviction

    def evict(self, num_blocks: int) -> list[Evicted]:
        """Drop exactly `num_blocks` unpinned blocks, least recently used first, each path from its tail."""
        if not 0 <= num_blocks <= self.evictable_blocks:
            raise ContractError(f"evict {num_blocks} blocks, but {self.evictable_blocks} are evictable")
        gone: list[Evicted] = []
        while num_blocks:
            node = self._oldest()
            assert node is not None, "evictable blocks without an unpinned leaf"
            num = min(num_blocks, node.num_blocks)
            gone.append(self._drop(node, num))
            num_blocks -= num
        return gone

    def expire(self, older_than: int) -> int:
        """Drop unpinned blocks whose last release has a tick before `older_than`; returns how many."""
        before = self.evictable_blocks
        node = self._oldest()
        while node is not None and node.tick < older_than:
            self._drop(node, node.num_blocks)
            node = self._oldest()
        return before - self.evictable_blocks

    def clear(self) -> None:
        """Forget everything. Nobody may hold a lease."""
        if self._num_leases:
            raise ContractError(f"clear while {self._num_leases} leases live")
        assert self.pinned_blocks == 0, "blocks are pinned by no lease"
        self._root = radix.root()
        self._leaves.clear()
        self.cached_blocks = self.evictable_blocks = 0

    # ------------------------------------------------------------ pins and leaves

    def _store(self, node: Node, pieces: Content, in_place: bool) -> Node:
        """Add blocks behind `node`: to its own edge if nobody but the asking lease ends there."""
        num_new = length(pieces) // self.block_size
        self.cached_blocks += num_new
        if in_place and node.pins == 1 and not node.children and node.parent is not None:
            radix.grow(node, pieces, num_new, self.block_size)
            return node
        self.evictable_blocks += num_new  # for a moment: `extend` now moves its pin here
        return radix.branch(node, pieces, num_new, self.block_size)

    def _pin(self, node: Node) -> None:
        above: Node | None = node
        while above is not None:
            above.pins += 1
            if above.pins > 1:
                return
            self.evictable_blocks -= above.num_blocks
            above = above.parent

    def _unpin(self, node: Node) -> None:
        above: Node | None = node
        while above is not None:
            above.pins -= 1
            assert above.pins >= 0, "unpinned more often than pinned"
            if above.pins:
                return
            self.evictable_blocks += above.num_blocks
            if not above.children:
                self._queue(above)
            above = above.parent

    def _queue(self, node: Node) -> None:
        if not node.queued and node.parent is not None:
            node.queued = True
            self._pushes += 1
            heappush(self._leaves, (node.used, self._pushes, node))

    def _oldest(self) -> Node | None:
        """The unpinned leaf that was used longest ago. Drops, or puts right, the stale entries before it."""
        leaves = self._leaves
        while leaves:
            used, order, node = leaves[0]
            if node.pins or node.children:
                heappop(leaves)
                node.queued = False
            elif node.used != used:
                heapreplace(leaves, (node.used, order, node))
            else:
                return node
        return None

    def _drop(self, node: Node, num_blocks: int) -> Evicted:
        """Cut `num_blocks` from the oldest leaf's tail; when it is empty its parent inherits its last use."""
        end = node.start // self.block_size + node.num_blocks
        node.num_blocks -= num_blocks
        self.cached_blocks -= num_blocks
        self.evictable_blocks -= num_blocks
        if not node.num_blocks:
            parent = node.parent
            assert parent is not None and self._leaves[0][2] is node, "only the oldest leaf is dropped"
            heappop(self._leaves)
            del parent.children[node.key]
            if node.used > parent.used:
                parent.used, parent.tick = node.used, node.tick
            if not parent.children and not parent.pins:
                self._queue(parent)
        return Evicted(node.run, end - num_blocks, end, self.block_size)

    def check(self) -> None:
        """Assert every invariant of the whole structure. Costs O(tree): for tests."""
        entries: dict[Node, int] = {}
        for used, _, node in self._leaves:
            entries[node] = entries.get(node, 0) + 1
            assert used <= node.used, "a heap entry is younger than its node"
        cached = evictable = leases = 0
        for node in radix.nodes(self._root):
            pinned_children = sum(1 for child in node.children.values() if child.pins)
            assert node.pins >= pinned_children, "a pinned child does not pin its parent"
            assert entries.pop(node, 0) == node.queued, "the heap and a node's flag disagree"
            leases += node.pins - pinned_children
            cached += node.num_blocks
            evictable += 0 if node.pins else node.num_blocks
            if node is not self._root:
                radix.check_edge(node, self.block_size)
                assert node.queued or node.pins or node.children, "an evictable leaf is not queued"
        assert not entries, "the heap holds nodes that left the tree"
        assert (cached, evictable) == (self.cached_blocks, self.evictable_blocks), "counts are off"
        assert leases == self._num_leases, f"{leases} leases in the tree, {self._num_leases} live"


def _held(lease: Lease) -> Node:
    if lease.node is None:
        raise ContractError("the lease was released before")
    return lease.node


def _check_continues(node: Node, content: Content, tokens: int) -> None:
    """The last pinned token must be the content's at that place. (To compare them all would cost O(path).)"""
    if not tokens:
        return
    mine = slice(node.run.pieces, tokens - node.start - 1, tokens - node.start)
    theirs = slice(content, tokens - 1, tokens)
    if mine != theirs:
        raise ContractError(f"extend with another content: token {tokens - 1} is {theirs}, held: {mine}")
