"""Names of tokens: a content is a tuple of pieces (source, start, length), and never the tokens themselves.

Two contents name the same tokens exactly when their normal forms are equal. In the normal form no piece
is empty and none continues the one before it. All functions cost O(pieces), however many tokens there are.
"""

from __future__ import annotations

from common.types import Content, Piece


def length(content: Content) -> int:
    """Number of tokens."""
    total = 0
    for _, _, num in content:
        total += num
    return total


def normalise(content: Content) -> Content:
    """The normal form; the very same object when `content` already is in it."""
    source, end = "", -1
    for name, start, num in content:
        if num <= 0 or (start == end and name == source):
            return _merge(content)
        source, end = name, start + num
    return content


def _merge(content: Content) -> Content:
    merged: list[Piece] = []
    source, end = "", -1
    for piece in content:
        name, start, num = piece
        if num <= 0:
            assert num == 0, f"piece {piece} has a negative length"
            continue
        if start == end and name == source:
            _, first, before = merged[-1]
            merged[-1] = (name, first, before + num)
        else:
            merged.append(piece)
        source, end = name, start + num
    return tuple(merged)


def concat(*contents: Content) -> Content:
    """The contents one after another, in normal form."""
    joined: list[Piece] = []
    for content in contents:
        joined.extend(content)
    return normalise(tuple(joined))


def locate(content: Content, position: int) -> tuple[int, int]:
    """(piece, offset in it) of token `position`; (number of pieces, 0) for the end. Skips empty pieces."""
    index = 0
    for _, _, num in content:
        if position < num:
            return index, position
        position -= num
        index += 1
    assert position == 0, f"position lies {position} tokens behind the end"
    return index, 0


def take(content: Content, index: int, offset: int, num_tokens: int) -> Content:
    """`num_tokens` tokens from `offset` in piece `index` on: in normal form when `content` is."""
    source, start, num = content[index]
    left = num - offset
    if num_tokens <= left:
        return ((source, start + offset, num_tokens),) if num_tokens else ()
    last, wanted = index + 1, num_tokens - left
    while wanted > content[last][2]:
        wanted -= content[last][2]
        last += 1
    head = content[index] if not offset else (source, start + offset, left)
    name, begin, whole = content[last]
    tail = content[last] if wanted == whole else (name, begin, wanted)
    return (head, *content[index + 1 : last], tail)


def slice(content: Content, start: int, end: int) -> Content:
    """Tokens [start, end)."""
    assert 0 <= start <= end, f"slice [{start}, {end})"
    if start == end:
        return ()
    index, offset = locate(content, start)
    return take(content, index, offset, end - start)


def common_prefix(left: Content, right: Content) -> int:
    """Number of leading tokens that both name, however each is cut into pieces."""
    shared = i = j = at_left = at_right = 0
    while i < len(left) and j < len(right):
        name, start, num = left[i]
        other, begin, count = right[j]
        if num > at_left and count > at_right:
            if name != other or start + at_left != begin + at_right:
                return shared
            step = min(num - at_left, count - at_right)
            shared += step
            at_left += step
            at_right += step
        if at_left >= num:
            i, at_left = i + 1, 0
        if at_right >= count:
            j, at_right = j + 1, 0
    return shared
