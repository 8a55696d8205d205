"""The protocols of a debtor as one literal table, and what is remembered of a loan and of a move."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from common.errors import ContractError
from common.sched.lane import Seq
from systems.infinite_llm.messages import MoveKvcache
from systems.infinite_llm.rblock import Piece


class State(Enum):
    """Of a loan (the first three), of a move, and (the last three) of a recall."""

    NEED = "told the gManager"
    TRY = "asked the creditors"
    QUEUED = "granted; waits at the head of the home's queue"
    RESERVE = "asked the creditor"
    COPY = "data under way"
    SWITCH = "waits for a boundary"
    WAIT = "recalls: waits for a boundary with room"


# An event that is not here is illegal in that state. None: the loan or move is over.
STEPS: dict[tuple[State, str], State | None] = {
    (State.NEED, "offer"): State.TRY,
    (State.TRY, "granted"): State.QUEUED,
    (State.TRY, "refused"): State.NEED,
    (State.TRY, "given up"): State.NEED,
    (State.QUEUED, "given up"): State.NEED,
    (State.QUEUED, "admitted"): None,
    (State.RESERVE, "granted"): State.COPY,
    (State.RESERVE, "refused"): None,
    (State.RESERVE, "given up"): None,
    (State.COPY, "arrived"): State.SWITCH,
    (State.COPY, "failed"): None,
    (State.SWITCH, "switched"): None,
    (State.WAIT, "room"): State.COPY,
    (State.WAIT, "over"): None,
}


def step(state: State, event: str) -> State | None:
    """The next state; an illegal event raises."""
    if (state, event) not in STEPS:
        raise ContractError(f"{event!r} while {state.value!r}")
    return STEPS[state, event]


@dataclass(slots=True)
class Loan:
    """A request without a home until others lend."""

    seq: Seq
    since_ns: int
    patience_ns: int
    state: State | None = State.NEED
    asks: dict[int, Piece] = field(default_factory=dict)  # by reservation, in the order of the request's tokens
    missing: dict[int, None] = field(default_factory=dict)  # not answered yet
    candidates: list[tuple[int, int]] = field(default_factory=list)  # (creditor, blocks) not asked yet
    refused: dict[int, None] = field(default_factory=dict)  # creditors, since the gManager was told last
    asked_ns: int = 0

    def granted(self) -> int:
        """Blocks that creditors have set aside for it."""
        return sum(piece.num_blocks for try_id, piece in self.asks.items() if try_id not in self.missing)


@dataclass(slots=True)
class Move:
    """Blocks of a decoding request on their way to a creditor."""

    order: MoveKvcache
    piece: Piece
    since_ns: int
    command_id: int = -1
    tokens: tuple[int, int] = (0, 0)
    state: State | None = State.RESERVE
