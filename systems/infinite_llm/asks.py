"""What every borrowing act shares: numbered reservations, their first word to a creditor, and giving back."""

from __future__ import annotations

from collections.abc import Sequence

from common.types import Command
from systems.infinite_llm.creditor import Tell
from systems.infinite_llm.leases import Leases
from systems.infinite_llm.messages import Release, TryMoveKvcache
from systems.infinite_llm.rblock import Piece

COPY_IDS = 1 << 60  # beyond every lane's command ids


class Asker:
    """The debtor's voice: reservation and copy numbers are unique within the cluster."""

    def __init__(self, instance: int, leases: Leases, tell: Tell) -> None:
        self.instance = instance
        self.leases = leases
        self.tell = tell
        self._next_id = 0

    def piece(self, creditor: int, blocks: int) -> Piece:
        """A reservation to ask for."""
        self._next_id += 1
        return Piece((self.instance << 32) + self._next_id, creditor, blocks)

    def copy_id(self) -> int:
        """A command id that leads back to this instance."""
        self._next_id += 1
        return COPY_IDS + (self.instance << 32) + self._next_id

    def ask(self, request_id: int, piece: Piece, wait: bool, out: list[Command]) -> None:
        """try_move_kvcache."""
        number = self.leases.number(piece.creditor)
        message = TryMoveKvcache(piece.try_id, number, self.instance, request_id, piece.num_blocks, wait)
        self.tell(piece.creditor, message, out)

    def release(self, pieces: Sequence[Piece], out: list[Command]) -> None:
        """Tell their creditors that these reservations are over."""
        by_creditor: dict[int, list[int]] = {}
        for piece in pieces:
            by_creditor.setdefault(piece.creditor, []).append(piece.try_id)
        for creditor, try_ids in by_creditor.items():
            self.tell(creditor, Release(tuple(try_ids)), out)
