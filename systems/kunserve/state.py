"""The life of a group, as a table: every arrow is an event, and what is not in the table raises and changes nothing."""

from __future__ import annotations

from enum import StrEnum

from common.errors import ContractError


class State(StrEnum):
    """Where a group stands."""

    SERVING = "serving"  # one instance with every layer, on its own
    PARKING = "parking"  # lanes run to their boundary and hand over what they hold
    DROPPING = "dropping"  # parameters are being unmapped
    EXCHANGING = "exchanging"  # the pipeline serves queued requests; old ones' KV is on its way
    PIPELINE = "pipeline"  # everything runs in the pipeline
    SHRINKING = "shrinking"  # extension cells are given up
    LOADING = "loading"  # parameters are on their way back, the pipeline serves (survivors of a loss do not yet)
    DRAINING = "draining"  # whole again: new requests run locally, old ones finish in the pipeline
    CLEARING = "clearing"  # a member died: what was under way is awaited
    MERGED = "merged"  # became part of a larger group
    GONE = "gone"  # dissolved: its members, if any are left, are groups of their own


class Happening(StrEnum):
    """What moves a group."""

    MERGE = "merge"  # chosen by the planner: its members join a new group
    OVERLOAD = "overload"  # overloaded again before the old pipeline has drained
    PARKED = "parked"
    DROPPED = "dropped"
    EXCHANGED = "exchanged"
    CALM = "calm"
    SHRUNK = "shrunk"
    LOADED = "loaded"
    RESUMED = "resumed"  # a pipeline goes on as one: survivors have their slices again, or loads were given up
    DRAINED = "drained"
    LOST = "lost"  # a member died
    CLEARED = "cleared"


S, H = State, Happening
TABLE: dict[tuple[State, Happening], State] = {
    (S.SERVING, H.MERGE): S.MERGED,
    (S.PIPELINE, H.MERGE): S.MERGED,
    (S.PARKING, H.PARKED): S.DROPPING,
    (S.DROPPING, H.DROPPED): S.EXCHANGING,
    (S.EXCHANGING, H.EXCHANGED): S.PIPELINE,
    (S.PIPELINE, H.CALM): S.SHRINKING,
    (S.SHRINKING, H.SHRUNK): S.LOADING,
    (S.LOADING, H.LOADED): S.DRAINING,
    (S.LOADING, H.RESUMED): S.PIPELINE,
    (S.DRAINING, H.OVERLOAD): S.PARKING,
    (S.DRAINING, H.DRAINED): S.GONE,
    **{(state, H.LOST): S.CLEARING for state in S if state not in (S.CLEARING, S.MERGED, S.GONE)},
    (S.CLEARING, H.LOST): S.CLEARING,
    (S.CLEARING, H.CLEARED): S.GONE,
}


def advance(state: State, happening: Happening) -> State:
    """The next state; ContractError where the table has no arrow."""
    after = TABLE.get((state, happening))
    if after is None:
        raise ContractError(f"kunserve: a group that is {state.value} cannot be {happening.value}")
    return after
