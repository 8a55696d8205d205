"""What the agents say to each other. The names of v2's three calls are the paper's: heartbeat, move_kvcache,
try_move_kvcache. Sequence numbers, leases, needs and offers are ours.
"""

from __future__ import annotations

from typing import NamedTuple

ENTRY_BYTES = 24  # of one placement entry on the wire
HEADER_BYTES = 64


class PlacementEntry(NamedTuple):
    """A request's blocks on one instance. `local`: this instance is its home. `num_blocks` 0: they are gone."""

    request_id: int
    instance: int
    num_blocks: int
    local: bool


class Load(NamedTuple):
    """An instance's counts: what the planner's model needs besides the placement map."""

    capacity: int  # blocks
    free: int
    decoding: int  # requests of its own batch
    waiting: int
    waiting_blocks: int  # of those, all together
    attended_tokens: int  # KV that its attention reads in an iteration, others' requests included


class Heartbeat(NamedTuple):
    """rManager -> gManager: entries that changed since the last one (`full`: all there are)."""

    instance: int
    sequence: int
    full: bool
    entries: tuple[PlacementEntry, ...]
    load: Load


class Resync(NamedTuple):
    """gManager -> rManager: send a full heartbeat (a delta was lost, or the gManager is new)."""


class MoveKvcache(NamedTuple):
    """gManager -> source: move so many blocks of a request there. `plan` numbers the plan that it belongs to."""

    request_id: int
    num_blocks: int
    dst: int
    plan: int


class Need(NamedTuple):
    """rManager -> gManager: where is room? `admission`: a request that no instance holds alone waits for at least
    `least` and at best `best` blocks elsewhere; `holding`: it was told already (a new gManager must know)."""

    request_id: int
    instance: int
    least: int
    best: int
    admission: bool
    holding: bool = False


class Offer(NamedTuple):
    """gManager -> rManager: creditors to ask, and for how many blocks; it only advises."""

    request_id: int
    admission: bool
    parts: tuple[tuple[int, int], ...]  # (instance, blocks)


class Settled(NamedTuple):
    """rManager -> gManager: the admission is over (admitted, or given up): the next one may be told."""

    request_id: int


class TryMoveKvcache(NamedTuple):
    """Debtor -> creditor: reserve blocks, before any data is sent. `wait`: set them aside as they come free."""

    try_id: int
    sequence: int
    debtor: int
    request_id: int
    num_blocks: int
    wait: bool


class Answer(NamedTuple):
    """Creditor -> debtor: granted or refused. What is refused leaves no trace."""

    try_id: int
    granted: bool


class Release(NamedTuple):
    """Debtor -> creditor: these reservations are given back."""

    try_ids: tuple[int, ...]


class Renew(NamedTuple):
    """Debtor -> creditor: all that it has or has asked for there. What is older and not named lapses."""

    debtor: int
    sequence: int
    try_ids: tuple[int, ...]


class Renewed(NamedTuple):
    """Creditor -> debtor: the leases run anew since the renewal with this number was sent."""

    creditor: int
    sequence: int


Message = (
    Heartbeat | Resync | MoveKvcache | Need | Offer | Settled | TryMoveKvcache | Answer | Release | Renew | Renewed
)  # fmt: skip


def manager_name(instance: int) -> str:
    """The agent of an instance."""
    return f"rm{instance}"


GMANAGER = "gm"
