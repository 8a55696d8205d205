"""Both indices cost O(length), counted in lines of code executed and not in time: twice the prompt, at most twice
the lines and a bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest

from common.kv.hash_index import HashIndex
from common.kv.index import PrefixIndex
from systems.memserve.tree import PoolTree


def lines(work: Callable[[], object]) -> int:
    """Lines of Python that it executes."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event == "line"
        return seen

    before = sys.gettrace()
    sys.settrace(seen)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("piece", [16, 512])
@pytest.mark.parametrize("kind", [HashIndex, PrefixIndex, PoolTree])
def test_insert_and_match_are_linear(kind, piece):
    counts = []
    for tokens in (32768, 65536):
        content = tuple((f"h{place}", 0, piece) for place in range(tokens // piece))
        made = kind(16)
        lease = made.acquire((), 0)
        insert = made.insert if kind is PoolTree else made.extend
        counts.append((lines(partial(insert, lease, content, tokens)), lines(partial(made.match, content, tokens))))
        assert made.match(content, tokens) == (tokens if kind is not PoolTree else (tokens, tokens))
    for small, large in zip(*counts):
        assert large <= 2.2 * small + 10
