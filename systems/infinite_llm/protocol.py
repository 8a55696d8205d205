"""The two protocols of a debtor as literal tables, and what is remembered of a loan and of a move."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from common.errors import ContractError
from common.sched.lane import Seq
from systems.infinite_llm.messages import MoveKvcache
from systems.infinite_llm.rblock import Piece


class State(Enum):
    """Of a loan (the first three) and of a move."""

    NEED = "told the gManager"
    TRY = "asked the creditors"
    QUEUED = "granted; waits at the head of the home's queue"
    RESERVE = "asked the creditor"
    COPY = "data under way"
    SWITCH = "waits for a boundary"


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


@dataclass(slots=True)
class Move:
    """Blocks of a decoding request on their way to a creditor."""

    order: MoveKvcache
    piece: Piece
    since_ns: int
    command_id: int = -1
    tokens: tuple[int, int] = (0, 0)
    state: State | None = State.RESERVE
