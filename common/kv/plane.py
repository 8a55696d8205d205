"""Placements over the plane layers x tokens of one request's KV: the geometry, and nothing of who or why.

A placement must tile the plane exactly once. Cutting never changes what lives where; `move` is the only function
that does. The open span (`token_end is None`) reaches to the plane's end and takes what is appended.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from common.errors import ContractError
from common.types import Layers, Placement, Span, Tier


class Rectangle(NamedTuple):
    """Layers x tokens; `token_end` None: to the end, what will be appended included."""

    layers: Layers
    token_start: int
    token_end: int | None


def _end(span: Span, num_tokens: int) -> int:
    return num_tokens if span.token_end is None else span.token_end


def first_flaw(placement: Placement, num_layers: int, num_tokens: int) -> str | None:
    """The first gap, overlap or misplaced span, by layer and then token; None when the plane is tiled exactly."""
    borders = {0: None, num_layers: None}
    for span in placement:
        low, high = span.layers
        if not 0 <= low < high <= num_layers:
            return f"span {span} has layers outside of [0, {num_layers})"
        if span.token_start < 0 or _end(span, num_tokens) > num_tokens or span.token_start > num_tokens:
            return f"span {span} has tokens outside of [0, {num_tokens})"
        if span.token_end is not None and span.token_end <= span.token_start:
            return f"span {span} is empty"
        borders[low] = borders[high] = None
    edges = sorted(borders)
    for low, high in pairwise(edges):
        flaw = _band_flaw(placement, low, high, num_tokens)
        if flaw is not None:
            return flaw
    return None


def _band_flaw(placement: Placement, low: int, high: int, num_tokens: int) -> str | None:
    """As `first_flaw`, within layers [low, high), which no span's border crosses."""
    band = [span for span in placement if span.layers[0] <= low and high <= span.layers[1]]
    band.sort(key=lambda span: (span.token_start, _end(span, num_tokens)))
    reached, last = 0, None
    for span in band:
        if span.token_start > reached:
            return f"gap: tokens [{reached}, {span.token_start}) of layers [{low}, {high}) are nowhere"
        if span.token_start < reached or (last is not None and last.token_end is None):
            return f"overlap: layers [{low}, {high}) from token {span.token_start} are in {last} and in {span}"
        reached, last = _end(span, num_tokens), span
    if reached < num_tokens:
        return f"gap: tokens [{reached}, {num_tokens}) of layers [{low}, {high}) are nowhere"
    return None


def tiles_exactly(placement: Placement, num_layers: int, num_tokens: int) -> bool:
    """Whether each cell of the plane lies in exactly one span (and each layer has at most one open span)."""
    return first_flaw(placement, num_layers, num_tokens) is None


def validate(placement: Placement, num_layers: int, num_tokens: int) -> None:
    """Raise a ContractError that names the first gap or overlap."""
    flaw = first_flaw(placement, num_layers, num_tokens)
    if flaw is not None:
        raise ContractError(flaw)


def cut_layers(placement: Placement, layer: int) -> Placement:
    """The same placement with no span across the border below `layer`."""
    spans: list[Span] = []
    for span in placement:
        low, high = span.layers
        if low < layer < high:
            spans.append(span._replace(layers=(low, layer)))
            spans.append(span._replace(layers=(layer, high)))
        else:
            spans.append(span)
    return tuple(spans)


def cut_tokens(placement: Placement, token: int) -> Placement:
    """The same placement with no span across the border before `token`, at most the plane's number of tokens."""
    spans: list[Span] = []
    for span in placement:
        if span.token_start < token and (span.token_end is None or token < span.token_end):
            spans.append(span._replace(token_end=token))
            spans.append(span._replace(token_start=token))
        else:
            spans.append(span)
    return tuple(spans)


def move(placement: Placement, rectangle: Rectangle, to_instance: int, tier: Tier = Tier.HBM) -> Placement:
    """The placement with this rectangle on `to_instance`. Only spans that the rectangle's border crosses are cut."""
    (low, high), start, end = rectangle
    assert low < high and (end is None or start < end), f"{rectangle} is empty"
    spans: list[Span] = []
    for span in placement:
        if not _meets(span, rectangle):
            spans.append(span)
            continue
        parts = cut_layers(cut_layers((span,), low), high)
        parts = cut_tokens(parts, start)
        if end is not None:
            parts = cut_tokens(parts, end)
        for part in parts:
            spans.append(part._replace(instance=to_instance, tier=tier) if _meets(part, rectangle) else part)
    return tuple(spans)


def _meets(span: Span, rectangle: Rectangle) -> bool:
    (low, high), start, end = rectangle
    if span.layers[0] >= high or low >= span.layers[1]:
        return False
    return (end is None or span.token_start < end) and (span.token_end is None or start < span.token_end)


def merge(placement: Placement) -> Placement:
    """Neighbouring spans of one instance and tier made one where they form a rectangle; sorted by layer, token."""
    spans = _merge_tokens(sorted(placement, key=lambda span: (span.layers, span.token_start)))
    spans.sort(key=lambda span: (span.token_start, span.layers))
    joined: list[Span] = []
    for span in spans:
        at = next((k for k, other in enumerate(joined) if _stacks(other, span)), None)
        if at is None:
            joined.append(span)
        else:
            joined[at] = joined[at]._replace(layers=(joined[at].layers[0], span.layers[1]))
    return tuple(sorted(joined, key=lambda span: (span.layers, span.token_start)))


def _merge_tokens(spans: list[Span]) -> list[Span]:
    """`spans` come sorted by layers, then tokens."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.instance, last.tier, last.layers) == (span.instance, span.tier, span.layers)
            and last.token_end == span.token_start
        ):
            joined[-1] = last._replace(token_end=span.token_end)
        else:
            joined.append(span)
    return joined


def _stacks(lower: Span, upper: Span) -> bool:
    same_tokens = (lower.token_start, lower.token_end) == (upper.token_start, upper.token_end)
    same_place = (lower.instance, lower.tier) == (upper.instance, upper.tier)
    return same_tokens and same_place and lower.layers[1] == upper.layers[0]


def open_spans(placement: Placement) -> tuple[Span, ...]:
    """The spans that take new KV."""
    return tuple(span for span in placement if span.token_end is None)


def tokens_at(placement: Placement, instance: int, layer: int) -> tuple[tuple[int, int | None], ...]:
    """Token ranges of `layer` on `instance`, ascending, neighbours joined; None ends the open one."""
    found: list[tuple[int, int | None]] = []
    spans = [span for span in placement if span.instance == instance and span.layers[0] <= layer < span.layers[1]]
    for span in sorted(spans, key=lambda span: span.token_start):
        if found and found[-1][1] == span.token_start:
            found[-1] = (found[-1][0], span.token_end)
        else:
            found.append((span.token_start, span.token_end))
    return tuple(found)


def cells_at(placement: Placement, instance: int, block_size: int, num_tokens: int, tier: Tier | None = None) -> int:
    """Cells that these spans need on `instance` (in `tier`, or in any). A span's blocks begin at its own first
    token and are its own, so its last block counts whole; spans cut at block borders waste nothing."""
    assert block_size > 0 and num_tokens >= 0, f"block_size {block_size}, num_tokens {num_tokens}"
    total = 0
    for span in placement:
        if span.instance == instance and (tier is None or span.tier is tier):
            tokens = _end(span, num_tokens) - span.token_start
            assert tokens >= 0, f"{span} begins behind token {num_tokens}"
            total += (span.layers[1] - span.layers[0]) * -(-tokens // block_size)
    return total
