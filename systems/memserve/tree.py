"""The pool's index: a radix tree of full blocks whose nodes say in which tier their blocks are (MemServe 4.2).

What is in HBM is closed under prefixes: eviction and swap-out take a leaf, from its tail: the least recently released
one, or by another of `node.ORDERS`. So a path reads HBM first, then DRAM. A node whose tier is None is on its way
between tiers: nobody reads it, nothing is inserted behind it. Walks are `common.kv.radix`:
O(pieces) of a content, however many blocks they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from typing import cast

from common.errors import ContractError
from common.kv import radix
from common.kv.content import length, normalise, slice
from common.kv.radix import Run
from common.types import Content, Tier
from systems.memserve.node import ORDERS, Found, Gone, Inserted, Lease, Node, held_node

__all__ = ["Found", "Gone", "Inserted", "Lease", "Node", "PoolTree"]


class PoolTree:
    """Cached blocks of one instance, in both tiers."""

    def __init__(self, block_size: int, order: str = "lru") -> None:
        self.size = block_size
        self._rank, self._by_time = ORDERS[order], order == "lru"
        self.cached: dict[Tier | None, int] = {Tier.HBM: 0, Tier.DRAM: 0, None: 0}
        self.evictable: dict[Tier | None, int] = {Tier.HBM: 0, Tier.DRAM: 0, None: 0}
        self.num_leases = 0
        self.tick = 0
        self._root = Node(None, (), Run(None, 0, ()), 0, Tier.HBM)
        self._heaps: dict[Tier, list[tuple[tuple[int, int], int, Node]]] = {Tier.HBM: [], Tier.DRAM: []}
        self._uses = 0
        self._pushes = 0

    # ------------------------------------------------------------ queries

    def match(self, content: Content, max_tokens: int) -> Found:
        """Leading cached tokens, whole blocks, at most `max_tokens`. Changes nothing."""
        limit = min(max_tokens, length(content))
        node, matched = self._walk(self._root, normalise(content), 0, limit - limit % self.size)
        hbm = total = 0
        for step in self._path(node, self._root):
            end = min(step.start + step.num_blocks * self.size, matched)
            if step.tier is None:
                break
            if step.tier is Tier.HBM:
                hbm = end
            total = end
        return Found(hbm, total)

    # ------------------------------------------------------------ leases

    def acquire(self, content: Content, tokens: int) -> Lease:
        """Pin the first `tokens` tokens: whole blocks, as `match` found them."""
        node, matched = self._walk(self._root, normalise(content), 0, tokens)
        if matched < tokens or tokens % self.size:
            raise ContractError(f"acquire {tokens} tokens: not whole blocks, or only {matched} are cached")
        node = self._cut(node, tokens)
        self.pin(node)
        self.num_leases += 1
        return Lease(node, tokens)

    def release(self, lease: Lease, read: bool = True) -> None:
        """Unpin; the blocks stay, most recently used if they were `read`."""
        node, lease.node = held_node(lease), None
        if read:
            self._uses += 1
            node.used, node.tick = self._uses, self.tick
            node.releases += 1
        self.num_leases -= 1
        self.unpin(node)

    def insert(self, lease: Lease, content: Content, tokens: int) -> Inserted:
        """The holder's blocks up to `tokens` become cached and pinned (full ones). It stops at what is on its way."""
        held, target = held_node(lease), tokens - tokens % self.size
        if target <= lease.tokens:
            return Inserted(0, lease.tokens, ())
        content = normalise(content)
        node, matched = self._walk(held, content, lease.tokens, target)
        if node is not held:
            node = self._cut(node, matched)
        num_new, gone = 0, []
        for step in self._path(node, held):
            if step.tier is None:
                node, target, matched = step.up(), step.start, step.start
                break
            if step.tier is Tier.DRAM:  # the holder has them in HBM: the copy in DRAM is one too many
                end = step.start + step.num_blocks * self.size
                gone.append(Gone(Tier.DRAM, slice(content, 0, end), step.start, end))
                num_new += step.num_blocks
                self.move(step, Tier.HBM)
        if matched < target:
            num_new += (target - matched) // self.size
            node = self._branch(node, slice(content, matched, target), Tier.HBM)
        if node is not held:
            self.pin(node)
            self.unpin(held)
        lease.node, lease.tokens = node, target
        return Inserted(num_new, target, tuple(gone))

    def pin(self, node: Node) -> None:
        """One holder more for a path."""
        above: Node | None = node
        while above is not None:
            above.pins += 1
            if above.pins > 1:
                return
            self.evictable[above.tier] -= above.num_blocks
            above = cast("Node | None", above.parent)

    def unpin(self, node: Node) -> None:
        """One less."""
        above: Node | None = node
        while above is not None:
            above.pins -= 1
            assert above.pins >= 0, "unpinned more often than pinned"
            if above.pins:
                return
            self.evictable[above.tier] += above.num_blocks
            self._offer(above)
            above = cast("Node | None", above.parent)

    # ------------------------------------------------------------ eviction

    def oldest(self, tier: Tier, num_blocks: int) -> Node | None:
        """The unpinned leaf of a tier that goes first, cut to its last `num_blocks`. None: there is none.

        The caller drops it or moves it, at once.
        """
        heap = self._heaps[tier]
        while heap:
            rank, _, node = heappop(heap)
            if not node.alive or node.tier is not tier or not self._is_leaf(node):
                continue
            if self._rank(node) != rank:
                self._offer(node)
                continue
            if node.num_blocks > num_blocks:
                self._cut(node, node.start + (node.num_blocks - num_blocks) * self.size)
            return node
        return None

    def drop(self, node: Node) -> list[Gone]:
        """Forget a leaf of its tier, and what hangs below it in DRAM."""
        gone: list[Gone] = []
        below: list[Node] = [node]
        for step in below:
            below.extend(cast("list[Node]", list(step.children.values())))
        for step in reversed(below):
            assert not step.pins and step.tier is not None, "pinned blocks are dropped"
            end = step.start + step.num_blocks * self.size
            gone.append(Gone(step.tier, step.run.content(end), step.start, end))
            self.cached[step.tier] -= step.num_blocks
            self.evictable[step.tier] -= step.num_blocks
            parent, step.alive = step.up(), False
            del parent.children[step.key]
            parent.num_hbm -= step.tier is not Tier.DRAM
            step.hand_up()
        self._offer(node.up())
        return gone

    def move(self, node: Node, tier: Tier | None) -> None:
        """A node is in another tier from now on (None: on its way)."""
        before, node.tier = node.tier, tier
        parent = node.up()
        parent.num_hbm += (tier is not Tier.DRAM) - (before is not Tier.DRAM)
        node.hand_up()
        self.cached[before] -= node.num_blocks
        self.cached[tier] += node.num_blocks
        if not node.pins:
            self.evictable[before] -= node.num_blocks
            self.evictable[tier] += node.num_blocks
        self._offer(node)
        self._offer(parent)

    def span(self, lease: Lease, start: int) -> list[Node]:
        """Nodes of a lease's path from token `start` on, cut there."""
        top = held_node(lease)
        nodes = [node for node in self._path(top, self._root) if node.start + node.num_blocks * self.size > start]
        if nodes and nodes[0].start < start:
            self._cut(nodes[0], start)
        return nodes

    def tail(self, content: Content) -> Node | None:
        """The deepest unpinned node of a content's path that nothing else hangs on; None if there is none."""
        limit = length(content) - length(content) % self.size
        node, matched = self._walk(self._root, normalise(content), 0, limit)
        if node.parent is None or node.children or node.pins or matched == node.start:
            return None
        return node

    def expired(self, tier: Tier, older_than: int) -> Node | None:
        """The oldest leaf of a tier, if its last release came before `older_than`."""
        if not self._by_time:  # no heap is in the order of time: look at them all
            return next((node for node in self.nodes()
                         if node.tier is tier and node.tick < older_than and self._is_leaf(node)), None)  # fmt: skip
        node = self.oldest(tier, 1 << 40)
        if node is not None and node.tick >= older_than:
            self._offer(node)
            return None
        return node

    # ------------------------------------------------------------ nodes

    def _walk(self, node: Node, content: Content, done: int, limit: int) -> tuple[Node, int]:
        found, matched = radix.walk(node, content, done, limit, self.size)
        return cast(Node, found), matched

    @staticmethod
    def _path(node: Node, above: Node) -> list[Node]:
        """Nodes from below `above` down to `node`."""
        path: list[Node] = []
        while node is not above:
            path.append(node)
            node = node.up()
        return path[::-1]

    def _is_leaf(self, node: Node) -> bool:
        if node.pins or node.parent is None:
            return False
        return not node.num_hbm if node.tier is Tier.HBM else not node.children

    def _offer(self, node: Node) -> None:
        if node.tier is not None and self._is_leaf(node):
            self._pushes += 1
            heappush(self._heaps[node.tier], (self._rank(node), self._pushes, node))

    def _cut(self, node: Node, tokens: int) -> Node:
        """As `radix.cut`: the new upper half ends at `tokens`, `node` keeps its end."""
        num_upper = (tokens - node.start) // self.size
        if num_upper == node.num_blocks:
            return node
        parent, run, at = node.up(), node.run, tokens - node.start
        assert 0 < num_upper < node.num_blocks, "an edge is cut at an inner block border"
        upper = Node(parent, node.key, Run(run.prefix, run.start, slice(run.pieces, 0, at)), num_upper, node.tier)
        upper.pins = 1 if node.pins else 0
        upper.used, upper.tick = node.used, node.tick
        upper.born, upper.releases = node.born, node.releases
        upper.num_hbm = int(node.tier is not Tier.DRAM)
        parent.children[node.key] = upper
        node.run = Run(upper.run, tokens, slice(run.pieces, at, length(run.pieces)))
        node.key = slice(node.run.pieces, 0, self.size)
        node.parent, node.start = upper, tokens
        node.num_blocks -= num_upper
        upper.children[node.key] = node
        return upper

    def _branch(self, node: Node, pieces: Content, tier: Tier) -> Node:
        num = length(pieces) // self.size
        key = slice(pieces, 0, self.size)
        assert key not in node.children, "a block would be stored twice"
        start = node.start + node.num_blocks * self.size
        child = Node(node, key, Run(node.run, start, pieces), num, tier)
        node.children[key] = child
        child.born = self._uses
        node.num_hbm += 1
        self.cached[tier] += num
        self.evictable[tier] += num
        return child

    # ------------------------------------------------------------ law

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        return (cast(Node, node) for node in radix.nodes(self._root) if node is not self._root)

    def check(self) -> None:
        """Assert every invariant. Costs O(tree): for tests."""
        cached: dict[Tier | None, int] = {Tier.HBM: 0, Tier.DRAM: 0, None: 0}
        evictable = dict(cached)
        leases = self._root.pins - sum(1 for child in self._root.children.values() if child.pins)
        for node in self.nodes():
            radix.check_edge(node, self.size)
            kids = cast("list[Node]", list(node.children.values()))
            pinned = sum(1 for kid in kids if kid.pins)
            leases += node.pins - pinned
            assert node.pins >= pinned and node.num_hbm == sum(1 for kid in kids if kid.tier is not Tier.DRAM)
            assert node.tier is not Tier.DRAM or not node.num_hbm, "HBM below DRAM"
            cached[node.tier] += node.num_blocks
            evictable[node.tier] += 0 if node.pins else node.num_blocks
        assert (cached, evictable) == (self.cached, self.evictable), "counts are off"
        assert leases == self.num_leases, f"{leases} leases in the tree, {self.num_leases} live"
