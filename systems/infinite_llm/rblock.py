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

    def cut(self, try_id: int, num_blocks: int) -> int:
        """Of a reservation only so many blocks are in use; returns those that came back."""
        grant = self.grants.get(try_id)
        if grant is None or grant.num_blocks <= num_blocks:
            return 0
        if num_blocks <= 0:
            return self.take_back(try_id)
        back, grant.num_blocks = grant.num_blocks - num_blocks, num_blocks
        self.total -= back
        return back

    def renew(self, debtor: int, sequence: int, named: tuple[tuple[int, int], ...], expires_ns: int) -> int | None:
        """A debtor's renewal: named leases run on over the blocks named, others that it must have known of end.
        Blocks that came back; None: the message is older than the last one."""
        if sequence <= self._renewed.get(debtor, -1):
            return None
        self._renewed[debtor] = sequence
        keep = dict(named)
        ended, back = [], 0
        for try_id, grant in self.grants.items():
            if grant.debtor != debtor:
                continue
            if try_id in keep:
                grant.expires_ns = expires_ns
                back += self.cut(try_id, keep[try_id])
            elif grant.sequence < sequence:
                ended.append(try_id)
        return back + sum(self.take_back(try_id) for try_id in ended)

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

    def by_debtor(self) -> dict[int, int]:
        """Debtor -> blocks lent to it."""
        found: dict[int, int] = {}
        for grant in self.grants.values():
            found[grant.debtor] = found.get(grant.debtor, 0) + grant.num_blocks
        return found


AT_HOME = 0  # the reservation of a piece that was called home


class Piece(NamedTuple):
    """Leading blocks of a request that lie elsewhere, under one reservation; or, between two such, at home again."""

    try_id: int
    creditor: int
    num_blocks: int


class BorrowedTable:
    """The debtor's side: pieces of each request, from its token 0 on; what follows them is at home."""

    def __init__(self) -> None:
        self.pieces: dict[int, list[Piece]] = {}

    def blocks(self, request_id: int) -> int:
        """Blocks of a request elsewhere."""
        return sum(piece.num_blocks for piece in self.pieces.get(request_id, ()) if piece.try_id)

    def covered(self, request_id: int) -> int:
        """Blocks of a request up to the end of its last piece."""
        return sum(piece.num_blocks for piece in self.pieces.get(request_id, ()))

    def total(self) -> int:
        """All blocks borrowed."""
        return sum(piece.num_blocks for pieces in self.pieces.values() for piece in pieces if piece.try_id)

    def add(self, request_id: int, piece: Piece) -> None:
        """The next blocks of a request are elsewhere from now on."""
        self.pieces.setdefault(request_id, []).append(piece)

    def drop(self, request_id: int) -> list[Piece]:
        """A request has nothing elsewhere any more; returns what it had."""
        return [piece for piece in self.pieces.pop(request_id, []) if piece.try_id]

    def has(self, request_id: int, try_id: int) -> bool:
        """Is a piece of the request in use under this reservation?"""
        return any(piece.try_id == try_id for piece in self.pieces.get(request_id, ()))

    def start(self, request_id: int, try_id: int) -> int:
        """Blocks of the request before this piece."""
        before = 0
        for piece in self.pieces[request_id]:
            if piece.try_id == try_id:
                return before
            before += piece.num_blocks
        raise ContractError(f"request {request_id} has no piece under reservation {try_id}")

    def call_home(self, request_id: int, try_id: int, num_blocks: int, home: int) -> Piece:
        """The last blocks of a piece are at home from now on; returns what is left of it (perhaps no blocks)."""
        pieces, made = self.pieces[request_id], []
        left = Piece(try_id, home, 0)
        for piece in pieces:
            if piece.try_id != try_id:
                made.append(piece)
                continue
            if num_blocks > piece.num_blocks:
                raise ContractError(f"request {request_id}: {num_blocks} blocks called home of {piece.num_blocks}")
            left = piece._replace(num_blocks=piece.num_blocks - num_blocks)
            made += [left] if left.num_blocks else []
            made.append(Piece(AT_HOME, home, num_blocks))
        while made and made[-1].try_id == AT_HOME:
            made.pop()  # what follows the last piece is at home anyway
        if made:
            self.pieces[request_id] = made
        else:
            del self.pieces[request_id]
        return left

    def at(self, creditor: int) -> list[int]:
        """Requests with pieces on a creditor."""
        return [request_id for request_id, pieces in self.pieces.items()
                if any(piece.creditor == creditor and piece.try_id for piece in pieces)]  # fmt: skip

    def on(self, creditor: int) -> list[Piece]:
        """Pieces on a creditor."""
        return [piece for pieces in self.pieces.values() for piece in pieces
                if piece.creditor == creditor and piece.try_id]  # fmt: skip

    def try_ids(self, creditor: int) -> list[int]:
        """Reservations in use at a creditor."""
        return [piece.try_id for piece in self.on(creditor)]

    def creditors(self) -> list[int]:
        """Who has lent, ascending."""
        return sorted({piece.creditor for pieces in self.pieces.values() for piece in pieces if piece.try_id})
