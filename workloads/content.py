"""Prompts as pieces of named sources: hash ids into pieces, cutting, scaling, and what a cache could reuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from workloads.types import Content, Ints, Piece

GENERATED = "gen:"


def unique(prompt: Ints) -> tuple[Content, ...]:
    """Prompts that share nothing."""
    return tuple(((f"u:{index}", 0, size),) for index, size in enumerate(prompt.tolist()))


def num_tokens(content: Content) -> int:
    return sum(piece[2] for piece in content)


def cut(content: Content, tokens: int) -> Content:
    """The first `tokens` tokens."""
    kept: list[Piece] = []
    for source, start, length in content:
        if tokens <= 0:
            break
        kept.append((source, start, min(length, tokens)))
        tokens -= length
    return tuple(kept)


def scale(content: Content, factor: float) -> Content:
    """Every boundary times `factor`: equal prefixes stay equal prefixes."""
    edges = [round(factor * edge) for edge in _edges(content)]
    scaled = [(piece[0], round(factor * piece[1]), edges[i + 1] - edges[i]) for i, piece in enumerate(content)]
    return tuple(piece for piece in scaled if piece[2] > 0)


def _edges(content: Content) -> list[int]:
    edges = [0]
    for piece in content:
        edges.append(edges[-1] + piece[2])
    return edges


def renumber_replies(content: Content, new_index: Ints) -> Content:
    """Follow a renumbering of requests in the sources `gen:r`."""
    return tuple(
        (f"{GENERATED}{new_index[int(source[len(GENERATED) :])]}", start, length)
        if source.startswith(GENERATED)
        else (source, start, length)
        for source, start, length in content
    )


def from_hashes(ids: Sequence[Sequence[int]], prompt: Ints, block_size: int) -> tuple[Content, ...]:
    """Pieces `h:<id>` of one block each; the last may be partial, tokens no id covers are unique to the request.

    Chained ids form a tree, so a run of blocks that only ever occur together is one piece, named by its first id.
    """
    counts = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter((block for row in ids for block in row), np.int64, int(counts.sum()))
    first = np.cumsum(counts) - counts
    starts_piece = _run_starts(flat, first[counts > 0])
    offset = np.arange(len(flat)) - np.repeat(first, counts)
    covered = np.minimum(counts * block_size, prompt)
    begin = np.flatnonzero(starts_piece & (offset * block_size < np.repeat(covered, counts)))
    request = np.repeat(np.arange(len(ids)), counts)[begin]
    begin_token = offset[begin] * block_size
    is_last = np.append(request[1:] != request[:-1], True) if len(begin) else np.empty(0, bool)
    end_token = np.where(is_last, covered[request], np.append(begin_token[1:], 0))
    names = [f"h:{block}" for block in flat[begin].tolist()]
    pieces = list(zip(names, [0] * len(names), (end_token - begin_token).tolist(), strict=True))
    bounds = np.searchsorted(request, np.arange(len(ids) + 1)).tolist()
    rest = (prompt - covered).tolist()
    return tuple(
        (*pieces[bounds[i] : bounds[i + 1]], (f"u:{i}", 0, rest[i]))
        if rest[i]
        else tuple(pieces[bounds[i] : bounds[i + 1]])
        for i in range(len(ids))
    )


def _run_starts(flat: Ints, first: Ints) -> NDArray[np.bool_]:
    """Where a piece must start: at a prompt's first block and wherever the tree of chained blocks branches."""
    starts = np.ones(len(flat), bool)
    if not len(flat):
        return starts
    names, dense = np.unique(flat, return_inverse=True)
    before = np.empty(len(flat), np.int64)
    before[1:] = dense[:-1]
    before[first] = -1
    parent = np.empty(len(names), np.int64)
    parent[dense] = before
    if np.any(parent[dense] != before):
        return starts  # not chained: an id says nothing about what preceded it
    occurs = np.bincount(dense)
    has_parent = before >= 0
    starts[has_parent] = occurs[before[has_parent]] != occurs[dense[has_parent]]
    return starts


def reusable(prompts: Iterable[Content], output: Ints, request: Ints) -> list[int]:
    """Tokens of each prompt that an infinite cache holds, were requests served one by one, replies included.

    Counted in tokens, not blocks: a short block shared by all (Mooncake's block 0) weighs what it holds.
    """
    children: dict[tuple[int, str, int], dict[int, int]] = {}
    num_nodes = 0
    found: list[int] = []
    for prompt, index, reply in zip(prompts, request.tolist(), output.tolist(), strict=True):
        node, hit, matching = 0, 0, True
        whole = (*prompt, (f"{GENERATED}{index}", 0, reply))
        for source, start, length in joined(whole):
            known = children.setdefault((node, source, start), {})
            if matching and known:
                hit += min(length, max(known))
            matching = matching and length in known
            if length not in known:
                num_nodes += 1
                known[length] = num_nodes
            node = known[length]
        found.append(min(hit, num_tokens(prompt)))
    return found


def joined(content: Content) -> list[Piece]:
    """Neighbouring pieces of one source become one."""
    out: list[Piece] = []
    for source, start, length in content:
        if out and out[-1][0] == source and out[-1][1] + out[-1][2] == start:
            out[-1] = (source, out[-1][1], out[-1][2] + length)
        else:
            out.append((source, start, length))
    return out
