"""The books of an arena: which layers are resident, how long the KV range is, and what both take in pages."""

from __future__ import annotations

from typing import NamedTuple

from common.errors import ContractError
from common.types import Layers


class ArenaShape(NamedTuple):
    """What an arena starts with: every layer resident and `kv_bytes` (whole cells) of KV."""

    num_layers: int
    layer_bytes: int
    kv_bytes: int
    cell_bytes: int

    def check(self) -> None:
        """ContractError unless all are positive and the KV range is whole cells."""
        if min(self) <= 0 or self.kv_bytes % self.cell_bytes:
            raise ContractError(f"an arena cannot be made of {self}: positive sizes and whole cells of KV, please")


def round_up(num_bytes: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-num_bytes // unit) * unit


class PageBook:
    """Bytes of slabs and KV over one budget. Each change is checked first; one that is refused leaves no trace.

    A slab takes `slab_bytes`: its layer, rounded up to pages. The KV range takes `kv_pages_bytes`: at least
    `kv_base`, and beyond that whole multiples of `kv_unit`. The budget is what both take when all layers are resident.
    """

    def __init__(self, shape: ArenaShape, page_bytes: int, whole_slabs: bool) -> None:
        """`whole_slabs`: the KV tail comes and goes in units of a slab, not of a page (and never below the start)."""
        shape.check()
        self.shape = shape
        self.page_bytes = page_bytes
        self.slab_bytes = round_up(shape.layer_bytes, page_bytes)
        start = round_up(shape.kv_bytes, page_bytes)
        self.kv_base = start if whole_slabs else 0
        self.kv_unit = self.slab_bytes if whole_slabs else page_bytes
        self.slabs_bytes = shape.num_layers * self.slab_bytes  # all of them
        self.max_kv_bytes = start + self.slabs_bytes  # of addresses: no KV range is longer
        self.budget_bytes = self.slabs_bytes + start
        self.resident = [True] * shape.num_layers
        self.kv_bytes = shape.kv_bytes

    # ------------------------------------------------------------ queries

    @property
    def kv_pages_bytes(self) -> int:
        """Bytes of pages under the KV range."""
        return self.kv_base + round_up(max(0, self.kv_bytes - self.kv_base), self.kv_unit)

    @property
    def used_bytes(self) -> int:
        """Bytes of pages under resident slabs and KV."""
        return self.resident.count(True) * self.slab_bytes + self.kv_pages_bytes

    @property
    def overhead_bytes(self) -> int:
        """Part of `used_bytes` that is neither parameters nor KV: rounding to pages."""
        return self.used_bytes - self.resident.count(True) * self.shape.layer_bytes - self.kv_bytes

    @property
    def full_kv_bytes(self) -> int:
        """KV bytes when every dropped layer's bytes are KV: the formula that policies rely on."""
        return self.shape.kv_bytes + self.resident.count(False) * self.shape.layer_bytes

    def check(self) -> None:
        """Assert that the budget holds and that KV is no more than its pages and its formula allow."""
        assert self.used_bytes <= self.budget_bytes, f"{self.used_bytes} bytes of pages over {self.budget_bytes}"
        assert 0 <= self.kv_bytes <= self.full_kv_bytes, f"{self.kv_bytes} bytes of KV over {self.full_kv_bytes}"
        assert self.kv_bytes <= self.kv_pages_bytes <= self.max_kv_bytes, "KV and its pages disagree"

    # ------------------------------------------------------------ changes

    def drop(self, layers: Layers) -> None:
        """These layers leave, and KV is as long as the formula allows. ContractError: one of them is not resident."""
        self._require(layers, True, "drop")
        self.resident[layers[0] : layers[1]] = [False] * (layers[1] - layers[0])
        self.kv_bytes = self.full_kv_bytes
        self.check()

    def shrink(self, num_bytes: int) -> None:
        """The KV range becomes `num_bytes` long. ContractError: it is shorter already, or `num_bytes` negative."""
        if not 0 <= num_bytes <= self.kv_bytes:
            raise ContractError(f"shrink KV to {num_bytes} bytes, but it has {self.kv_bytes}")
        self.kv_bytes = num_bytes
        self.check()

    def widen(self, num_bytes: int) -> None:
        """The KV range becomes `num_bytes` long. ContractError: it is longer already, or that is over the formula."""
        if not self.kv_bytes <= num_bytes <= self.full_kv_bytes:
            raise ContractError(f"widen KV to {num_bytes} bytes, but it has {self.kv_bytes} of {self.full_kv_bytes}")
        self.kv_bytes = num_bytes
        self.check()

    def restore(self, layers: Layers) -> None:
        """These layers take pages again. ContractError: one is resident, or KV still has the pages."""
        self._require(layers, False, "restore")
        count = layers[1] - layers[0]
        over = self.kv_bytes - (self.full_kv_bytes - count * self.shape.layer_bytes)
        if over > 0:
            raise ContractError(f"restore layers {layers}, but KV has {over} bytes of theirs: shrink it first")
        self.resident[layers[0] : layers[1]] = [True] * count
        self.check()

    def _require(self, layers: Layers, resident: bool, verb: str) -> None:
        low, high = layers
        if not 0 <= low < high <= self.shape.num_layers:
            raise ContractError(f"{verb} layers {layers} of an arena of {self.shape.num_layers}")
        wrong = [layer for layer in range(low, high) if self.resident[layer] is not resident]
        if wrong:
            state = "not resident" if resident else "resident already"
            raise ContractError(f"{verb} layers {layers}, but {wrong} are {state}")
