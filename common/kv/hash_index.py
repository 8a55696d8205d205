"""The prefix index by chained block hashes (vLLM's way), with the interface of `common.kv.index.PrefixIndex`.

Each block has an entry of its own, named by a digest of its content and of the block before it, so instances
agree on names without talking. Costs O(blocks): here for comparison, and to check the radix tree against.
Free blocks queue in the order in which their last lease let go, tails first; eviction takes from the front.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b

from common.errors import ContractError
from common.kv.content import length, normalise, take
from common.kv.radix import Evicted, Run
from common.types import Content

DIGEST_BYTES = 16


def block_hashes(content: Content, block_size: int) -> Iterator[tuple[bytes, Content]]:
    """(chained digest, content) of each full block: equal digests mean equal prefixes, on any machine."""
    content = normalise(content)
    digest = b""
    index = offset = 0
    for _ in range(length(content) // block_size):
        while offset >= content[index][2]:
            offset -= content[index][2]
            index += 1
        block = take(content, index, offset, block_size)
        offset += block_size
        digest = blake2b(digest + repr(block).encode(), digest_size=DIGEST_BYTES).digest()
        yield digest, block


class _Block:
    __slots__ = ("pins", "run", "tick")

    def __init__(self, run: Run) -> None:
        self.run = run
        self.pins = 0
        self.tick = 0


class HashLease:
    """A holder's pin on the first `tokens` tokens of its content: the digests of those blocks, in order."""

    __slots__ = ("digests", "live", "tokens")

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.tokens = 0
        self.live = True


class HashIndex:
    """Cached blocks of one instance and tier, one dict entry per block."""

    def __init__(self, block_size: int) -> None:
        assert block_size > 0, f"block_size {block_size}"
        self.block_size = block_size
        self.num_leases = 0
        self.tick = 0
        self._blocks: dict[bytes, _Block] = {}
        self._free: OrderedDict[bytes, None] = OrderedDict()

    @property
    def cached_blocks(self) -> int:
        """Blocks stored, pinned or not."""
        return len(self._blocks)

    @property
    def evictable_blocks(self) -> int:
        """Blocks that no lease holds."""
        return len(self._free)

    @property
    def pinned_blocks(self) -> int:
        """Blocks that some lease holds."""
        return len(self._blocks) - len(self._free)

    def match(self, content: Content, max_tokens: int) -> int:
        """Leading tokens that are cached: whole blocks, at most `max_tokens`."""
        matched = 0
        for digest, _ in block_hashes(content, self.block_size):
            if digest not in self._blocks or matched + self.block_size > max_tokens:
                break
            matched += self.block_size
        return matched

    def would_pin(self, content: Content, tokens: int) -> int:
        """Evictable blocks that `acquire` of the same would pin."""
        if self.match(content, tokens) < tokens:
            raise ContractError(f"would_pin {tokens} tokens: not all cached")
        digests = [digest for digest, _ in block_hashes(content, self.block_size)]
        return sum(not self._blocks[digest].pins for digest in digests[: tokens // self.block_size])

    def acquire(self, content: Content, tokens: int) -> HashLease:
        """Pin the first `tokens` tokens: whole blocks, as `match` found them."""
        if tokens < 0 or tokens % self.block_size or self.match(content, tokens) < tokens:
            raise ContractError(f"acquire {tokens} tokens: not whole blocks, or not cached")
        lease = HashLease()
        self.num_leases += 1
        self._advance(lease, content, tokens)
        return lease

    def extend(self, lease: HashLease, content: Content, tokens: int) -> int:
        """Store the full blocks of the first `tokens` tokens, pin them, return how many are new."""
        if not lease.live:
            raise ContractError("the lease was released before")
        if tokens > length(content):
            raise ContractError(f"extend to {tokens} tokens of a content of {length(content)}")
        before = len(self._blocks)
        self._advance(lease, content, tokens)
        return len(self._blocks) - before

    def _advance(self, lease: HashLease, content: Content, tokens: int) -> None:
        run: Run | None = None
        for index, (digest, pieces) in enumerate(block_hashes(content, self.block_size)):
            start = index * self.block_size
            if start + self.block_size > tokens:
                break
            block = self._blocks.get(digest)
            if block is None:
                block = self._blocks[digest] = _Block(Run(run, start, pieces))
            elif start >= lease.tokens and not block.pins:
                del self._free[digest]
            run = block.run
            if start >= lease.tokens:
                block.pins += 1
                lease.digests.append(digest)
        lease.tokens = len(lease.digests) * self.block_size

    def release(self, lease: HashLease) -> None:
        """Unpin; what nobody else holds joins the queue of free blocks, tail first."""
        if not lease.live:
            raise ContractError("the lease was released before")
        for digest in reversed(lease.digests):
            block = self._blocks[digest]
            assert block.pins > 0, "unpinned more often than pinned"
            block.pins -= 1
            block.tick = self.tick
            if not block.pins:
                self._free[digest] = None
        lease.live = False
        self.num_leases -= 1

    def evict(self, num_blocks: int) -> list[Evicted]:
        """Drop exactly `num_blocks` unpinned blocks, least recently released first; one `Evicted` each."""
        if not 0 <= num_blocks <= len(self._free):
            raise ContractError(f"evict {num_blocks} blocks, but {len(self._free)} are evictable")
        return [self._drop() for _ in range(num_blocks)]

    def _drop(self) -> Evicted:
        digest, _ = self._free.popitem(last=False)
        run = self._blocks.pop(digest).run
        start = run.start // self.block_size
        return Evicted(run, start, start + 1, self.block_size)

    def expire(self, older_than: int) -> int:
        """Drop unpinned blocks whose last release has a tick before `older_than`: how many."""
        before = len(self._free)
        while self._free and self._blocks[next(iter(self._free))].tick < older_than:
            self._drop()
        return before - len(self._free)

    def clear(self) -> None:
        """Forget everything. Nobody may hold a lease."""
        if self.num_leases:
            raise ContractError(f"clear while {self.num_leases} leases live")
        self._blocks.clear()
        self._free.clear()

    def check(self) -> None:
        """Assert that exactly the unpinned blocks are queued."""
        assert all((not block.pins) == (digest in self._free) for digest, block in self._blocks.items())
        assert all(digest in self._blocks for digest in self._free), "a free block is not stored"
