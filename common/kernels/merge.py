"""Merging partial attention: softmax over the union of disjoint key sets from (o, lse) of each set.

With weights w_i = exp(lse_i - max lse), o = sum w_i o_i / sum w_i and lse = max + log(sum w_i): exact however far
the parts lie apart. A part with lse = -inf (no key seen) weighs nothing, and its o is not looked at. Natural log
throughout. The order of merging changes results by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.errors import ContractError
from common.kernels.plan import lse_dtype

NEG_INF = float("-inf")
Partial = tuple[torch.Tensor, torch.Tensor]
"""o [N, H, D] and lse [N, H] of one set of keys."""


def merge_into(
    o_THD: torch.Tensor, lse_TH: torch.Tensor, index_N: torch.Tensor, o_NHD: torch.Tensor, lse_NH: torch.Tensor
) -> None:
    """Merge N partial results into the running ones of their tokens, in place.

    `index_N` (integer) names the token of each result; a token may occur several times or not at all (then it does
    not change, not even by a rounding). Running results start as o = 0, lse = -inf. Types may differ: sums are
    taken in fp32, in fp64 if the running ones are fp64.
    """
    _check(o_THD, lse_TH)
    _check(o_NHD, lse_NH)
    if index_N.numel() == 0:
        return
    index_N = index_N.long()
    if o_THD.device.type == "cpu" and int(torch.bincount(index_N).max()) == 1:
        _merge_distinct(o_THD, lse_TH, index_N, o_NHD, lse_NH)
    else:
        _merge_any(o_THD, lse_TH, index_N, o_NHD, lse_NH)


def _merge_distinct(
    o_THD: torch.Tensor, lse_TH: torch.Tensor, index_N: torch.Tensor, o_NHD: torch.Tensor, lse_NH: torch.Tensor
) -> None:
    """Each token at most once. Touches N tokens only."""
    wide = torch.promote_types(lse_dtype(o_THD.dtype), lse_TH.dtype)
    old = o_THD.index_select(0, index_N).to(wide), lse_TH.index_select(0, index_N).to(wide)
    o_mixed, lse_mixed = merge_two(old, (o_NHD.to(wide), lse_NH.to(wide)))
    o_THD.index_copy_(0, index_N, o_mixed.to(o_THD.dtype))
    lse_TH.index_copy_(0, index_N, lse_mixed.to(lse_TH.dtype))


def _merge_any(
    o_THD: torch.Tensor, lse_TH: torch.Tensor, index_N: torch.Tensor, o_NHD: torch.Tensor, lse_NH: torch.Tensor
) -> None:
    """Tokens may repeat, and nobody has to look (no wait for the device). Touches all T tokens."""
    wide = torch.promote_types(lse_dtype(o_THD.dtype), lse_TH.dtype)
    old_TH, new_NH = lse_TH.to(wide), lse_NH.to(wide)
    top_TH = old_TH.clone().scatter_reduce_(0, index_N[:, None].expand_as(new_NH), new_NH, "amax")
    base_TH = _finite(top_TH)
    new_w_NH = torch.exp(new_NH - base_TH.index_select(0, index_N))
    old_w_TH = torch.exp(old_TH - base_TH)
    total_TH = old_w_TH.index_add(0, index_N, new_w_NH)
    sum_THD = _weighted(o_THD.to(wide), old_w_TH).index_add_(0, index_N, _weighted(o_NHD.to(wide), new_w_NH))
    o_THD.copy_(sum_THD / _nonzero(total_TH)[..., None])
    lse_TH.copy_(base_TH + torch.log(total_TH))


def merge(partials: Sequence[Partial]) -> Partial:
    """(o_NHD, lse_NH) of the union from the partial results of the same N queries; types as in the first part.

    Raises ContractError without any part.
    """
    if not partials:
        raise ContractError("nothing to merge")
    for o_NHD, lse_NH in partials:
        _check(o_NHD, lse_NH)
    o_NHD, lse_NH = partials[0]
    wide = lse_dtype(o_NHD.dtype)
    total = o_NHD.to(wide).masked_fill((lse_NH == NEG_INF)[..., None], 0.0), lse_NH.to(wide)
    for o_part, lse_part in partials[1:]:
        total = merge_two(total, (o_part.to(wide), lse_part.to(wide)))
    return total[0].to(o_NHD.dtype), total[1].to(lse_NH.dtype)


def merge_two(old: Partial, new: Partial) -> Partial:
    """Two parts of one type; their weights are a sigmoid of the difference. `old` is 0 where its lse is -inf."""
    w_NH = torch.sigmoid(new[1] - old[1]).masked_fill_(new[1] == NEG_INF, 0.0)[..., None]
    return torch.where(w_NH == 0, old[0], torch.lerp(old[0], new[0], w_NH)), torch.logaddexp(old[1], new[1])


def _finite(top: torch.Tensor) -> torch.Tensor:
    """The maximum to subtract: 0 where nothing was seen, as -inf - -inf is no number."""
    return top.masked_fill(top == NEG_INF, 0.0)


def _nonzero(total: torch.Tensor) -> torch.Tensor:
    return total.masked_fill(total == 0, 1.0)


def _weighted(o: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """o times w, and 0 where w is 0, whatever o holds there."""
    return (o * w[..., None]).masked_fill_((w == 0)[..., None], 0.0)


def _check(o: torch.Tensor, lse: torch.Tensor) -> None:
    if o.ndim != 3 or lse.shape != o.shape[:2]:
        raise ContractError(f"o {tuple(o.shape)} and lse {tuple(lse.shape)} do not belong together")
