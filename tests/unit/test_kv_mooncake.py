"""The Mooncake conversation trace through the index: the hit ratio that is known, whatever the block size."""

import json
import os
from pathlib import Path

import pytest

from common.kv.content import length
from common.kv.index import PrefixIndex

DATA = os.environ.get("KVPLANE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
TRACE = Path(DATA) / "traces" / "mooncake" / "conversation_trace.jsonl"


@pytest.fixture(scope="module")
def prompts():
    if not TRACE.is_file():
        pytest.skip(f"no {TRACE}: set KVPLANE_DATA")
    rows = [json.loads(line) for line in TRACE.read_text().splitlines()]
    return [tuple((f"mooncake:{name}", 0, 512) for name in row["hash_ids"]) for row in rows]


def replay(prompts, block_size, capacity=None):
    """(blocks hit, blocks asked, index) of prompts served one after another, with an LRU cache of `capacity`."""
    index = PrefixIndex(block_size)
    hit = asked = 0
    for content in prompts:
        total = length(content)
        lease = index.acquire(content, index.match(content, total))
        num_new = (total - lease.tokens) // block_size
        hit += lease.tokens // block_size
        asked += total // block_size
        if capacity is not None and index.cached_blocks + num_new > capacity:
            index.evict(min(index.cached_blocks + num_new - capacity, index.evictable_blocks))
        assert index.extend(lease, content, total) == num_new
        index.release(lease)
    index.check()
    return hit, asked, index


@pytest.mark.parametrize("block_size", [512, 16])
def test_an_infinite_cache_hits_366_of_1000_blocks(prompts, block_size):
    """As measured for this trace independently (specs/memserve.md section 3), at 512 tokens and at 16."""
    hit, asked, index = replay(prompts, block_size)
    assert (hit, asked) == (105710 * 512 // block_size, 288500 * 512 // block_size)
    assert index.cached_blocks == asked - hit == index.evictable_blocks


def test_a_small_cache_agrees_with_plain_lru_over_blocks(prompts):
    """A cache of 5,000 blocks of 512: the same hits as a dict of hash chains, evicted tail first."""
    some = prompts[:4000]
    hit, _, _ = replay(some, 512, capacity=5000)
    cached, expected = {}, 0  # block name: None, least recently released first
    for content in some:
        names = [source for source, _, _ in content]
        num_hit = next((n for n, name in enumerate(names) if name not in cached), len(names))
        expected += num_hit
        for name in names[:num_hit]:
            del cached[name]
        while cached and len(cached) + len(names) > 5000:
            del cached[next(iter(cached))]
        cached |= dict.fromkeys(reversed(names))
    assert hit == expected > 0
