"""Laws of the prefix indexes: random lives of many holders against a brute-force model; radix against hash."""

import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ContractError
from common.kv.content import length, slice
from common.kv.hash_index import HashIndex
from common.kv.index import PrefixIndex

BLOCK = 4
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = 1000 if os.environ.get("KVPLANE_NIGHTLY") else 300


def expand(content):
    """The tokens themselves: what the index never does."""
    return tuple((source, start + i) for source, start, num in content for i in range(num))


def recut(content, seed):
    """The same tokens, cut into other pieces (and some empty ones)."""
    pieces = []
    for k, (source, start, num) in enumerate(content):
        at = (seed * 7 + k * 3) % (num + 1)
        pieces += [(source, start, at), (source, start + at, num - at)]
    return tuple(pieces)


class Model:
    """Blocks by their whole prefix, refcounts, and a queue of free blocks in the order of release, tail first."""

    def __init__(self):
        self.pins = {}
        self.free = []
        self.tick = {}

    def match(self, content, max_tokens):
        tokens = expand(content)[:max_tokens]
        num = 0
        while num + BLOCK <= len(tokens) and tokens[: num + BLOCK] in self.pins:
            num += BLOCK
        return num

    def pin(self, content, start, end):
        tokens, new = expand(content), 0
        for at in range(start + BLOCK, end + 1, BLOCK):
            prefix = tokens[:at]
            new += prefix not in self.pins
            self.pins[prefix] = self.pins.get(prefix, 0) + 1
            if prefix in self.free:
                self.free.remove(prefix)
        return new

    def would_pin(self, content, tokens):
        text = expand(content)
        return sum(not self.pins[text[:at]] for at in range(BLOCK, tokens + 1, BLOCK))

    def release(self, content, tokens, tick):
        for at in range(tokens, 0, -BLOCK):
            prefix = expand(content)[:at]
            self.pins[prefix] -= 1
            self.tick[prefix] = tick
            if not self.pins[prefix]:
                self.free.append(prefix)

    def evict(self, num):
        gone, self.free = self.free[:num], self.free[num:]
        for prefix in gone:
            assert self.pins.pop(prefix) == 0
        return gone

    def expire(self, older_than):
        num = 0
        while num < len(self.free) and self.tick[self.free[num]] < older_than:
            num += 1
        return len(self.evict(num))


def blocks_of(evicted):
    """The evicted blocks in the order in which they went, each as the tokens of its whole prefix."""
    gone = []
    for run in evicted:
        tokens = expand(run.content())
        gone += [tokens[: at * BLOCK] for at in range(run.end_block, run.start_block, -1)]
    return gone


SOURCES = ("sys", "doc", "gen:1", "gen:2")
PIECE = st.tuples(st.sampled_from(SOURCES), st.sampled_from((0, 0, 0, 2, 4, 8)), st.integers(0, 14))
CONTENT = st.lists(PIECE, max_size=5).map(tuple)
POOL = st.lists(CONTENT, min_size=2, max_size=6)
ACTIONS = ("acquire", "acquire", "extend", "extend", "extend", "release", "release", "evict", "expire")
STEP = st.tuples(st.sampled_from(ACTIONS), st.integers(0, 1 << 16), st.integers(0, 90))


class Life:
    """One sequence of actions, applied to the radix index, the hash index and the model alike."""

    def __init__(self, pool):
        # every second content goes on where another one ended, as turns of a conversation do
        self.pool = [*pool, *(left + right for left, right in pairwise(pool))]
        self.radix, self.hash, self.model = PrefixIndex(BLOCK), HashIndex(BLOCK), Model()
        self.holders = []  # [content, radix lease, hash lease]

    def acquire(self, pick, size):
        content = self.pool[pick % len(self.pool)]
        found = self.radix.match(recut(content, pick), size)
        assert found == self.hash.match(content, size) == self.model.match(content, size)
        found -= BLOCK * (found > 0 and size % 5 == 0)  # now and then less than there is
        pinned = self.model.would_pin(content, found)
        assert pinned == self.radix.would_pin(recut(content, pick), found) == self.hash.would_pin(content, found)
        self.holders.append(
            [content, self.radix.acquire(recut(content, size), found), self.hash.acquire(content, found)]
        )
        self.model.pin(content, 0, found)

    def extend(self, pick, size):
        if not self.holders:
            return
        holder = self.holders[pick % len(self.holders)]
        content, lease, other = holder
        if pick % 3 == 0:  # the reply goes on
            content = holder[0] = (*content, (f"gen:{pick % 5}", 0, 5))
        tokens = min(size, length(content))  # often all of it
        held = lease.tokens
        new = self.radix.extend(lease, recut(content, pick), tokens)
        assert new == self.hash.extend(other, content, tokens)
        assert new == self.model.pin(content, held, max(held, tokens - tokens % BLOCK))
        assert lease.tokens == other.tokens == max(held, tokens - tokens % BLOCK)

    def release(self, pick, size):
        if self.holders:
            content, lease, other = self.holders.pop(pick % len(self.holders))
            self.radix.tick = self.hash.tick = self.radix.tick + size % 3
            self.model.release(content, lease.tokens, self.radix.tick)
            self.radix.release(lease)
            self.hash.release(other)

    def evict(self, pick, size):
        num = min(size % 7 if pick % 8 else size, self.radix.evictable_blocks)
        expected = self.model.evict(num)
        runs = self.radix.evict(num)
        assert sum(run.num_blocks for run in runs) == num
        assert blocks_of(runs) == blocks_of(self.hash.evict(num)) == expected

    def expire(self, pick, size):
        older_than = self.radix.tick - pick % 3
        gone = self.radix.expire(older_than)
        assert gone == self.hash.expire(older_than) == self.model.expire(older_than)

    def check(self):
        self.radix.check()
        self.hash.check()
        free = len(self.model.free)
        assert self.radix.cached_blocks == self.hash.cached_blocks == len(self.model.pins)
        assert self.radix.evictable_blocks == self.hash.evictable_blocks == free
        assert self.radix.pinned_blocks == self.hash.pinned_blocks == len(self.model.pins) - free
        assert self.radix.num_leases == len(self.holders)


@settings(max_examples=EXAMPLES, deadline=None)
@given(POOL, st.lists(STEP, max_size=40))
def test_radix_and_hash_live_as_the_model_does(pool, steps):
    """Same hits, same counts, same blocks evicted in the same order; at the end everything is evictable."""
    life = Life(pool)
    for action, pick, size in steps:
        getattr(life, action)(pick, size)
        life.check()
    end(life)


def end(life):
    while life.holders:
        life.release(0, 1)
    life.check()
    assert life.radix.pinned_blocks == 0
    life.evict(8, life.radix.evictable_blocks)
    life.check()
    assert life.radix.cached_blocks == 0
    life.radix.clear()


def long_life(seed, num_steps):
    """A dense life that lists of small draws rarely reach: few contents that branch late, ragged and often reused."""
    rng = random.Random(seed)
    trunk = tuple((source, rng.choice((0, 3, 8)), rng.randint(1, 19)) for source in SOURCES[: rng.randint(1, 4)])
    pool = []
    for n in range(rng.randint(2, 7)):
        kept = slice(trunk, 0, rng.randint(0, length(trunk)))
        pool.append((*kept, (f"own:{n % 4}", rng.choice((0, 4)), rng.randint(0, 30))))
    life = Life(pool)
    for _ in range(num_steps):
        size = rng.choice((rng.randint(0, 90), 90, length(rng.choice(life.pool))))
        if life.holders and len(life.holders) > 6:
            life.release(rng.randrange(1 << 16), size)
        yield life, rng.choice(ACTIONS), rng.randrange(1 << 16), size


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 120))
def test_long_lives_agree_too(seed, num_steps):
    """As above, in deep trees with many splits, trims and regrowths."""
    for life, action, pick, size in long_life(seed, num_steps):
        if action == "extend" and size < length(life.pool[0]):
            size = 1 << 16
        getattr(life, action)(pick, size)
        life.check()
    end(life)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 80))
def test_eviction_spares_what_is_pinned_and_takes_tails_first(seed, num_steps):
    """Whatever is evicted, every lease still finds all of its tokens, and no stored block lost its prefix."""
    for life, action, pick, size in long_life(seed, num_steps):
        getattr(life, action)(pick, size)
        if action in ("evict", "expire"):
            for content, lease, _ in life.holders:
                assert life.radix.match(content, lease.tokens) == lease.tokens
            assert all(len(p) == BLOCK or p[:-BLOCK] in life.model.pins for p in life.model.pins)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 80))
def test_evicted_content_is_true_for_ever(seed, num_steps):
    """What an `Evicted` names does not change when the tree is split, trimmed and grown afterwards."""
    seen = []
    for life, action, pick, size in long_life(seed, num_steps):
        if action != "evict":
            getattr(life, action)(pick, size)
            continue
        num = min(pick % 5, life.radix.evictable_blocks)
        for index in (life.radix, life.hash):
            seen += [(run, expand(run.content())) for run in index.evict(num)]
        life.model.evict(num)
    assert all(expand(run.content()) == tokens for run, tokens in seen)
    assert all(len(tokens) == run.end_block * BLOCK for run, tokens in seen)


def test_a_refused_call_leaves_no_trace():
    """Too many blocks, uncached tokens, a dead lease, another's content: ContractError, and nothing moved."""
    index = PrefixIndex(BLOCK)
    lease = index.acquire((), 0)
    assert index.extend(lease, (("a", 0, 18),), 18) == 4
    for call in (
        lambda: index.evict(1),
        lambda: index.acquire((("a", 0, 40),), 20),
        lambda: index.acquire((("a", 0, 18),), 6),
        lambda: index.would_pin((("a", 0, 40),), 20),
        lambda: index.extend(lease, (("b", 0, 40),), 40),
        lambda: index.extend(lease, (("a", 0, 18),), 24),
        lambda: index.clear(),
        lambda: setattr(index, "tick", -1),
    ):
        with pytest.raises(ContractError):
            call()
        index.check()
        assert (index.cached_blocks, index.pinned_blocks, index.num_leases) == (4, 4, 1)
    index.release(lease)
    for dead in (lambda: index.release(lease), lambda: index.extend(lease, (("a", 0, 18),), 18)):
        with pytest.raises(ContractError):
            dead()
    assert index.evictable_blocks == 4


EVICTIONS = """
from common.kv.index import PrefixIndex
index, state = PrefixIndex(4), 12345
for n in range(400):
    state = (state * 1103515245 + 12345) % 2**31
    content = (("sys", 0, state % 23), (f"doc:{state % 7}", 0, state % 61), (f"r:{state % 90}", 0, 30))
    total = sum(piece[2] for piece in content)
    lease = index.acquire(content, index.match(content, total))
    index.extend(lease, content, total)
    index.release(lease)
    if index.cached_blocks > 150:
        print([(e.content(), e.start_block, e.end_block) for e in index.evict(index.cached_blocks - 150)])
"""


def test_the_order_of_eviction_does_not_depend_on_hash_seeds():
    """Two processes with different PYTHONHASHSEED evict the same blocks in the same order."""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", EVICTIONS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "4242")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("\n") > 50


def test_leaves_queue_at_most_once_however_often_they_are_used():
    """A hot prefix that is never evicted must not make the heap grow."""
    index = PrefixIndex(BLOCK)
    content = (("sys", 0, 64),)
    index.release(_stored(index, content))
    for _ in range(1000):
        index.release(index.acquire(content, 64))
    assert len(index._leaves) == 1
    assert [run.num_blocks for run in index.evict(16)] == [16]


def _stored(index, content):
    lease = index.acquire(content, index.match(content, length(content)))
    index.extend(lease, content, length(content))
    return lease


def test_a_split_under_leases_keeps_them_valid():
    """Three holders of one edge; the split is made by the shortest; all end well."""
    index = PrefixIndex(BLOCK)
    long = (("sys", 0, 40), ("a", 0, 24))
    first = _stored(index, long)
    second = index.acquire(long, 64)
    short = index.acquire(slice(long, 0, 21), 20)
    third = _stored(index, (("sys", 0, 40), ("b", 0, 8)))
    index.check()
    assert (index.cached_blocks, index.pinned_blocks) == (18, 18)
    index.release(first)
    assert index.pinned_blocks == 18  # the second holder has the same path
    index.release(second)
    assert index.pinned_blocks == 12
    index.release(third)
    assert index.pinned_blocks == 5
    index.release(short)
    index.check()
    assert [(run.start_block, run.end_block) for run in index.evict(18)] == [
        (10, 16), (10, 12), (5, 10), (0, 5),
    ]  # fmt: skip
