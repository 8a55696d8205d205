"""What the agents say to each other. The names of v2's three calls are the paper's: heartbeat, move_kvcache,
try_move_kvcache. Sequence numbers, leases, needs and offers are ours.
"""

from __future__ import annotations

from typing import NamedTuple

from common.log import register

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
    debts: tuple[tuple[int, int], ...] = ()  # v1: (debtor, blocks lent to it) that changed; 0: none any more
    host: tuple[int, int] = (0, 0)  # v1: CPU rBlocks, and free ones
    host_debts: tuple[tuple[int, int], ...] = ()  # v1: as `debts`, of CPU rBlocks: all there are


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
    refused: tuple[int, ...] = ()  # v1: candidates that said no since the last need: the ledger was wrong about them


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


class Return(NamedTuple):
    """Debtor -> creditor: of this reservation only so many blocks are still in use. (A renewal repeats it.)"""

    try_id: int
    num_blocks: int


class Renew(NamedTuple):
    """Debtor -> creditor: all that it has or has asked for there, as (reservation, blocks). What is older and not named
    lapses."""

    debtor: int
    sequence: int
    named: tuple[tuple[int, int], ...]


class Renewed(NamedTuple):
    """Creditor -> debtor: the leases run anew since the renewal with this number was sent."""

    creditor: int
    sequence: int


class Freeze(NamedTuple):
    """gManager -> rManager (v1, DGFM): start no loans and no moves; what could you call home from that creditor?"""

    repair: int
    creditor: int


class Frozen(NamedTuple):
    """rManager -> gManager: blocks that it could call home (0: it takes no part), and its free ones."""

    repair: int
    instance: int
    num_blocks: int
    free: int


class Recall(NamedTuple):
    """gManager -> rManager: call so many blocks home from that creditor. `turn` numbers the orders of a repair."""

    repair: int
    turn: int
    creditor: int
    num_blocks: int


class Recalled(NamedTuple):
    """rManager -> gManager: so many came home and were given back."""

    repair: int
    turn: int
    instance: int
    num_blocks: int


class Unfreeze(NamedTuple):
    """gManager -> rManager: the repair is over."""

    repair: int


Message = (
    Heartbeat | Resync | MoveKvcache | Need | Offer | Settled | TryMoveKvcache | Answer | Release | Return | Renew
    | Renewed | Freeze | Frozen | Recall | Recalled | Unfreeze
)  # fmt: skip


def manager_name(instance: int) -> str:
    """The agent of an instance."""
    return f"rm{instance}"


GMANAGER = "gm"
GMANAGER_INSTANCE = -1  # to whom an rManager speaks when it speaks to the gManager


register(PlacementEntry, Load, Heartbeat, Resync, MoveKvcache, Need, Offer, Settled, TryMoveKvcache, Answer, Release,
         Return, Renew, Renewed, Freeze, Frozen, Recall, Recalled, Unfreeze)  # fmt: skip
