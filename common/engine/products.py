"""Products of hidden states and weights: by oneDNN where it is faster than what torch.mm calls (MKL), else by torch.mm.

oneDNN reads a layer's weights where they lie, and gives a row the same bits however many others there are. It compiles
a kernel for each number of rows, for good (about half a millisecond and half a megabyte each), so rows are rounded up
to a grid of few numbers, and torch.mm has the products in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from common.engine.layout import ALIGN
from common.engine.scratch import Scratch

_GRID = ((128, 4), (256, 16), (512, 64))  # (up to so many rows, multiples of); beyond, multiples of the last:
_BEYOND = 256
_PADDING = 16  # one row in so many may be of padding; up to 128 rows torch.mm is no faster than with three rows more
_FEW = 4  # rows; fewer are left to torch.mm
_LARGE = 1 << 18  # elements of a weight that gains; smaller ones are left to torch.mm
_HEAD_HINT = 64  # rows that a packed table is laid out for; all numbers gain from it
_HEAD_ROWS = 512  # more are not padded

Op = Callable[..., torch.Tensor]


@cache
def onednn() -> Op | None:
    """x [m, in], weight [out, in] -> x @ weight.T by oneDNN, which is private to torch: None where there is none.

    Only with AVX-512, where it was measured (AMD)."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    x, table = torch.ones(4, 16), torch.ones(32, 16)
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default

        def op(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear(x, weight, None, "none", [], "")  # type: ignore[no-any-return]

        packed = torch.ops.mkldnn._reorder_linear_weight(table, _HEAD_HINT)
        works = all(bool((op(x, weight) == 16).all()) for weight in (table, table.t().contiguous().t(), packed))
    except (AttributeError, RuntimeError, TypeError):  # another torch
        return None
    return op if works else None


def on_grid(rows: int) -> int:
    """The least number of the grid that holds these rows."""
    step = next((step for most, step in _GRID if rows <= most), _BEYOND)
    return -(-rows // step) * step


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


class Products:
    """A decoder's products with the weights of its layers, in fp32 on a CPU by oneDNN where that gains."""

    def __init__(self, scratch: Scratch, device: torch.device, dtype: torch.dtype) -> None:
        self._scratch = scratch
        self._op = onednn() if device.type == "cpu" and dtype == torch.float32 else None

    @property
    def name(self) -> str:
        """What was chosen, once."""
        return "torch.mm" if self._op is None else "oneDNN, torch.mm"

    def times(
        self, x: torch.Tensor, weight: torch.Tensor, room: str, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [m, in] @ weight [in, out] (+ bias [out]), in the scratch's `room` or a new tensor; rows may lie apart."""
        product = self._by_onednn(x, weight)
        if product is not None:
            return product if bias is None else product.add_(bias)
        out = self._scratch.room(room, x.shape[0], weight.shape[1])
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)

    def add(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """total [m, out] += x [m, in] @ weight [in, out]."""
        product = self._by_onednn(x, weight)
        return total.addmm_(x, weight) if product is None else total.add_(product)

    def _by_onednn(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        if self._op is None:
            return None
        num = x.shape[0]
        if num < _FEW or weight.numel() < _LARGE:
            return None
        rows, whole = on_grid(num), _whole(weight)
        if whole is None or (num > _GRID[0][0] and (rows - num) * _PADDING > num):
            return None
        return self._op(_padded(x, rows), whole.t())[:num, : weight.shape[1]]


def _whole(weight: torch.Tensor) -> torch.Tensor | None:
    """A layer's weight with what lies between its rows (`LayerLayout` sets some apart by a line): oneDNN's fast kernels
    want rows without gaps, and a few columns more cost less than rows that alias. None of any other view."""
    (rows, columns), (pitch, step) = weight.shape, weight.stride()
    gap = pitch - columns
    if step != 1 or not 0 <= gap <= ALIGN // weight.itemsize:
        return None
    if gap == 0:
        return weight
    held = weight.untyped_storage().nbytes() // weight.itemsize - weight.storage_offset()
    return weight.as_strided((rows, pitch), (pitch, 1)) if held >= rows * pitch else None


class Packed:
    """A [vocab, hidden] table in an order of oneDNN's own: a copy, for one that is only ever multiplied."""

    def __init__(self, op: Op, table: torch.Tensor) -> None:
        self._op = op
        self._table = torch.ops.mkldnn._reorder_linear_weight(table.contiguous(), _HEAD_HINT)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, hidden] @ table.T, in a new tensor."""
        num = x.shape[0]
        return self._op(_padded(x, on_grid(num) if _FEW <= num <= _HEAD_ROWS else num), self._table)[:num]


def packed(table: torch.Tensor) -> Packed | None:
    """The table, packed; None where that gains nothing."""
    op = onednn()
    fits = table.device.type == "cpu" and table.dtype == torch.float32 and table.numel() >= _LARGE
    return Packed(op, table) if fits and op is not None else None
