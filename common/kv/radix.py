"""The radix tree of named tokens below the prefix index: runs, nodes, walks and splits. No policy in here.

An edge is a *run* of content, a whole number of blocks long. Children are keyed by the content of their first
block: siblings may share tokens, never a block. A walk costs O(pieces), however many blocks they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from common.kv.content import concat, length, locate, normalise, slice, take
from common.types import Content


class Run:
    """An immutable stretch of a path: pieces from token `start` on, behind `prefix`. Outlives its node."""

    __slots__ = ("pieces", "prefix", "start")

    def __init__(self, prefix: Run | None, start: int, pieces: Content) -> None:
        self.prefix = prefix
        self.start = start
        self.pieces = pieces

    def content(self, end: int) -> Content:
        """The whole path from token 0 to token `end`, which lies in this run."""
        parts: list[Content] = []
        run: Run | None = self
        while run is not None and run.start < end:
            parts.append(slice(run.pieces, 0, end - run.start))
            end = run.start
            run = run.prefix
        assert end == 0, f"the path begins at token {end}"
        return concat(*reversed(parts))


class Evicted(NamedTuple):
    """Blocks [start_block, end_block) of a path, gone. Counts are free; content is built when asked for."""

    run: Run
    start_block: int
    end_block: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        return self.end_block - self.start_block

    def content(self) -> Content:
        """The content of the path from its first token to the end of these blocks."""
        return self.run.content(self.end_block * self.block_size)


class Node:
    """An edge with what hangs below it. Only a leaf's run may outreach its blocks (its tail was evicted).

    `pins`: leases that end here, plus children that are pinned. `used`, `tick`: see `common.kv.index`.
    """

    __slots__ = ("children", "key", "num_blocks", "parent", "pins", "queued", "run", "start", "tick", "used")

    def __init__(self, parent: Node | None, key: Content, run: Run, num_blocks: int) -> None:
        self.parent = parent
        self.key = key
        self.run = run
        self.start = run.start  # tokens before this edge
        self.num_blocks = num_blocks
        self.children: dict[Content, Node] = {}
        self.pins = 0
        self.used = 0
        self.tick = 0
        self.queued = False


def root() -> Node:
    """An empty tree."""
    return Node(None, (), Run(None, 0, ()), 0)


def walk(node: Node, content: Content, done: int, limit: int, size: int) -> tuple[Node, int]:
    """From `node`, whose path is the first `done` tokens of normal `content`, down to token `limit`.

    Returns the deepest node touched and the tokens matched; they may end inside its edge, at a block's border.
    """
    if done >= limit:
        return node, done
    index, offset = locate(content, done)
    while True:
        source, start, num = content[index]
        if num - offset >= size:
            child = node.children.get(((source, start + offset, size),))
        else:
            child = node.children.get(take(content, index, offset, size))
        if child is None:
            return node, done
        node = child
        run = node.run.pieces
        full = min(node.num_blocks * size, limit - done)
        matched = agree(run, content, index, offset)
        if matched < full:
            return node, done + matched - matched % size
        done += full
        if done == limit or not node.children:
            return node, done
        last = len(run) - 1  # a node with children is not trimmed: its run ends where its blocks do
        offset = run[last][2] if last else offset + run[0][2]
        index += last
        if offset >= content[index][2]:
            index, offset = index + 1, 0


def agree(run: Content, content: Content, index: int, offset: int) -> int:
    """Tokens that `run` shares with `content` from `offset` in piece `index` on; both are in normal form."""
    agreed = 0
    for source, start, num in run:
        if index >= len(content):
            return agreed
        name, begin, count = content[index]
        if source != name or start != begin + offset:
            return agreed
        count -= offset
        if num != count:  # in normal form the longer piece goes on as the shorter one's successor cannot
            return agreed + (num if num < count else count)
        agreed += num
        index += 1
        offset = 0
    return agreed


def cut(node: Node, tokens: int, size: int) -> Node:
    """The node whose path is exactly `tokens` long: the edge of `node` is split if they end inside it.

    The new node is the *upper* half, so whoever refers to `node` still refers to the end of the edge. Its last
    use is at least the lower half's, which hands it up when it goes.
    """
    num_upper = (tokens - node.start) // size
    if num_upper == node.num_blocks:
        return node
    parent = node.parent
    assert parent is not None and 0 < num_upper < node.num_blocks, "an edge is cut at an inner block border"
    run, at = node.run, tokens - node.start
    upper = Node(parent, node.key, Run(run.prefix, run.start, slice(run.pieces, 0, at)), num_upper)
    upper.pins = 1 if node.pins else 0
    parent.children[node.key] = upper
    node.run = Run(upper.run, tokens, slice(run.pieces, at, length(run.pieces)))
    node.key = slice(node.run.pieces, 0, size)
    node.parent = upper
    node.start = tokens
    node.num_blocks -= num_upper
    upper.children[node.key] = node
    return upper


def grow(node: Node, pieces: Content, num_new: int, size: int) -> None:
    """Lengthen the edge of a leaf in place."""
    assert node.parent is not None and not node.children, "only a leaf grows in place"
    kept = slice(node.run.pieces, 0, node.num_blocks * size)
    node.run = Run(node.run.prefix, node.start, concat(kept, pieces))
    node.num_blocks += num_new


def branch(node: Node, pieces: Content, num_blocks: int, size: int) -> Node:
    """Hang a new edge below `node`, whose own run is first made to end where its blocks end."""
    if not node.children and node.parent is not None:
        node.run = Run(node.run.prefix, node.start, slice(node.run.pieces, 0, node.num_blocks * size))
    key = slice(pieces, 0, size)
    assert key not in node.children, "a block would be stored twice"
    child = Node(node, key, Run(node.run, node.start + node.num_blocks * size, pieces), num_blocks)
    node.children[key] = child
    return child


def nodes(top: Node) -> Iterator[Node]:
    """Every node, parents before children."""
    todo = [top]
    while todo:
        node = todo.pop()
        todo.extend(node.children.values())
        yield node


def check_edge(node: Node, size: int) -> None:
    """Assert that an edge fits its parent, its key and its run."""
    pieces, parent = node.run.pieces, node.parent
    assert node.num_blocks > 0 and pieces == normalise(pieces), "an edge is empty or not in normal form"
    surplus = length(pieces) - node.num_blocks * size
    assert surplus == 0 or (surplus > 0 and not node.children), "an inner edge's run and blocks differ"
    assert node.key == slice(pieces, 0, size), "an edge's key is not its first block"
    assert parent is not None and parent.children[node.key] is node, "an edge hangs elsewhere"
    assert node.start == node.run.start == parent.start + parent.num_blocks * size, "an edge starts elsewhere"
