"""rBlock tables: what an instance has lent, and which pieces of its requests lie elsewhere. Counts only; executors own
ids. One rBlock is one KV block of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from common.errors import ContractError


@dataclass(slots=True)
class Grant:
    """Blocks lent under one reservation. `sequence`: of the debtor's message that asked."""

    debtor: int
    request_id: int
    num_blocks: int
    sequence: int
    expires_ns: int


class LentTable:
    """The creditor's side: reservations by id. It neither knows nor asks what the blocks hold."""

    def __init__(self) -> None:
        self.grants: dict[int, Grant] = {}
        self.total = 0
        self._renewed: dict[int, int] = {}  # debtor -> number of its last renewal

    def lend(self, try_id: int, grant: Grant) -> None:
        """Book a reservation."""
        if try_id in self.grants:
            raise ContractError(f"reservation {try_id} is lent already")
        self.grants[try_id] = grant
        self.total += grant.num_blocks

    def take_back(self, try_id: int) -> int:
        """End a reservation; returns its blocks (0: there is none, or no more)."""
        grant = self.grants.pop(try_id, None)
        if grant is None:
            return 0
        self.total -= grant.num_blocks
        return grant.num_blocks

    def renew(self, debtor: int, sequence: int, named: tuple[int, ...], expires_ns: int) -> int | None:
        """A debtor's renewal: named leases run on, others that it must have known of end. Blocks that came back;
        None: the message is older than the last one."""
        if sequence <= self._renewed.get(debtor, -1):
            return None
        self._renewed[debtor] = sequence
        keep = frozenset(named)
        ended = []
        for try_id, grant in self.grants.items():
            if grant.debtor != debtor:
                continue
            if try_id in keep:
                grant.expires_ns = expires_ns
            elif grant.sequence < sequence:
                ended.append(try_id)
        return sum(self.take_back(try_id) for try_id in ended)

    def expire(self, now_ns: int) -> int:
        """Leases that ended; returns the blocks that came back."""
        ended = [try_id for try_id, grant in self.grants.items() if grant.expires_ns <= now_ns]
        return sum(self.take_back(try_id) for try_id in ended)

    def by_request(self) -> dict[int, int]:
        """Request -> blocks of it here."""
        found: dict[int, int] = {}
        for grant in self.grants.values():
            found[grant.request_id] = found.get(grant.request_id, 0) + grant.num_blocks
        return found


class Piece(NamedTuple):
    """Leading blocks of a request that lie elsewhere, under one reservation."""

    try_id: int
    creditor: int
    num_blocks: int


class BorrowedTable:
    """The debtor's side: pieces of each request, from its token 0 on; what follows them is at home."""

    def __init__(self) -> None:
        self.pieces: dict[int, list[Piece]] = {}

    def blocks(self, request_id: int) -> int:
        """Blocks of a request elsewhere."""
        return sum(piece.num_blocks for piece in self.pieces.get(request_id, ()))

    def total(self) -> int:
        """All blocks borrowed."""
        return sum(piece.num_blocks for pieces in self.pieces.values() for piece in pieces)

    def add(self, request_id: int, piece: Piece) -> None:
        """The next blocks of a request are elsewhere from now on."""
        self.pieces.setdefault(request_id, []).append(piece)

    def drop(self, request_id: int) -> list[Piece]:
        """A request has nothing elsewhere any more; returns what it had."""
        return self.pieces.pop(request_id, [])

    def at(self, creditor: int) -> list[int]:
        """Requests with pieces on a creditor."""
        return [request_id for request_id, pieces in self.pieces.items()
                if any(piece.creditor == creditor for piece in pieces)]  # fmt: skip

    def try_ids(self, creditor: int) -> list[int]:
        """Reservations in use at a creditor."""
        return [piece.try_id for pieces in self.pieces.values() for piece in pieces if piece.creditor == creditor]

    def creditors(self) -> list[int]:
        """Who has lent, ascending."""
        return sorted({piece.creditor for pieces in self.pieces.values() for piece in pieces})
