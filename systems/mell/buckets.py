"""Ids under small integer keys, with the nearest key found by one bit operation: nothing here grows with GPUs."""

from __future__ import annotations

from collections.abc import Iterator


class Buckets:
    """Key -> ids in order of entry. Keys are block counts, so the bit mask of keys in use has capacity bits."""

    __slots__ = ("_ids", "_mask")

    def __init__(self) -> None:
        self._ids: dict[int, dict[int, None]] = {}
        self._mask = 0

    def __bool__(self) -> bool:
        return self._mask != 0

    def add(self, key: int, ident: int) -> None:
        """Enter an id."""
        self._ids.setdefault(key, {})[ident] = None
        self._mask |= 1 << key

    def remove(self, key: int, ident: int) -> None:
        """Take an id out."""
        ids = self._ids[key]
        del ids[ident]
        if not ids:
            del self._ids[key]
            self._mask &= ~(1 << key)

    def descending(self, high: int, low: int = 0) -> Iterator[int]:
        """Ids with keys from `high` down to `low`; take a few only."""
        mask = self._mask & ((2 << high) - 1) if high >= 0 else 0
        while mask:
            key = mask.bit_length() - 1
            if key < low:
                return
            yield from self._ids[key]
            mask &= ~(1 << key)

    def ascending(self, high: int) -> Iterator[int]:
        """Ids with keys from the smallest up to `high`; take a few only."""
        mask = self._mask & ((2 << high) - 1) if high >= 0 else 0
        while mask:
            low = mask & -mask
            yield from self._ids[low.bit_length() - 1]
            mask ^= low
