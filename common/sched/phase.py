"""How many KV blocks a set of decoding requests will need, without touching them one by one.

Every decoding request of a lane grows by one token an iteration, so its stored tokens are `offset + iteration` for a
fixed offset. It needs a new block in the iteration that finds its stored tokens a multiple of the block size. A
histogram of offsets modulo the block size therefore says, for any number of iterations ahead, how many blocks go.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate


class PhaseCounter:
    """Offsets of decoding requests, counted by block phase."""

    __slots__ = ("bins", "block_size", "num")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.bins = [0] * block_size
        self.num = 0

    def add(self, offset: int) -> None:
        """A request whose stored tokens are `offset + iteration` (offset may be negative)."""
        self.bins[offset % self.block_size] += 1
        self.num += 1

    def remove(self, offset: int) -> None:
        """Forget one request added with this offset."""
        phase = offset % self.block_size
        left = self.bins[phase] = self.bins[phase] - 1
        self.num -= 1
        assert left >= 0, "phase removed twice"

    def next_growth(self, iteration: int) -> int:
        """`growth(iteration, 1)`."""
        return self.bins[-iteration % self.block_size]

    def growth(self, iteration: int, count: int) -> int:
        """Blocks newly needed by iterations `iteration` .. `iteration + count - 1`."""
        size = self.block_size
        if count == 1:
            return self.bins[-iteration % size]
        rest = count % size
        total = count // size * self.num
        if rest:
            first = -iteration % size
            bins = self.bins
            if rest <= first + 1:
                total += sum(bins[first - rest + 1 : first + 1])
            else:
                total += self.num - sum(bins[first + 1 : first + 1 + size - rest])  # all but those in between
        return total

    def iterations_within(self, iteration: int, free: int) -> int:
        """The largest count with `growth(iteration, count) <= free`; a huge number when nothing decodes."""
        if not self.num:
            return 1 << 40
        full, left = divmod(free, self.num)
        size, bins = self.block_size, self.bins
        first = -iteration % size
        needs = bins[first::-1] + bins[:first:-1]  # by the iterations from here on: phases go down, and around
        return full * size + bisect_right(list(accumulate(needs)), left)
