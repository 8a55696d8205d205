"""What the policy process tells workers. All of it has one global order; each worker sees its part, in that order.

A transfer is told to both of its ends under one sequence number. Sends never block and receives wait for nothing later
in that order, so workers cannot deadlock. Arrays are numpy's; ranks are those of torch.distributed (0: the policy).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.engine.sampler import SamplingParams
from common.engine.spec import DecoderSpec
from common.engine.work import Batch, PlacePlan
from common.types import InstanceInfo, Layers, Tier

Cells = NDArray[np.int64]
Table = NDArray[np.int32]  # [layers, blocks]
Bands = tuple[tuple[Layers, tuple[PlacePlan, ...]], ...]


class Terms(NamedTuple):
    """The first word to a worker that has come in. `beat_s`: from heartbeat to heartbeat; `piece_bytes`: of a copy;
    `teams`: workers of each instance."""

    backend: str
    start_s: float
    transfer_s: float
    beat_s: float
    piece_bytes: int
    teams: tuple[tuple[int, ...], ...] = ()


class Setup(NamedTuple):
    """What kind of instance to be, or which rank of one; an instance that there was is forgotten. `info`: with the
    bytes of a rank; `spec`: whole. `weights`: a folder; None: random by `seed`. `teams`: workers by instance."""

    info: InstanceInfo
    spec: DecoderSpec
    block_size: int
    device: str
    attention: str | None
    sampling: SamplingParams
    poison: bool
    weights: str | None
    seed: int
    teams: tuple[tuple[int, ...], ...]


class Start(NamedTuple):
    """Parameters, and an empty KV range."""


class Stop(NamedTuple):
    """Give both back."""


class Exit(NamedTuple):
    """End the process."""


class Poison(NamedTuple):
    """Nobody may read these cells before they are written."""

    tier: Tier
    cells: Cells


class DropPages(NamedTuple):
    """As `InstanceBytes.drop_pages`. Answered."""

    layers: Layers


class Widen(NamedTuple):
    """As `InstanceBytes.widen`."""

    num_cells: int


class Compact(NamedTuple):
    """As `InstanceBytes.compact`."""

    num_cells: int
    moves: list[tuple[int, int, int]]
    free: Cells


class MoveCells(NamedTuple):
    """As `InstanceBytes.move_cells`."""

    source: Tier
    cells: Cells
    goal: Tier
    others: Cells


class PutBlocks(NamedTuple):
    """As `put_blocks`, from tier to tier of one instance."""

    source: Tier
    src_cells: Table
    goal: Tier
    dst_cells: Table
    tokens: tuple[int, int]
    first_block: int


class SendCells(NamedTuple):
    """These tokens of cells, no others, to peers: (peer, KV heads [low, high) of those here)."""

    to: tuple[tuple[int, int, int], ...]
    tier: Tier
    cells: Table
    tokens: tuple[int, int]
    first_block: int


class TakeCells(NamedTuple):
    """The other end: what came from (peer, number of KV heads), side by side the heads that are held here, is put where
    `tokens` says. Answered: which peer was lost on the way, or None."""

    sources: tuple[tuple[int, int], ...]
    tier: Tier
    cells: Table
    tokens: tuple[int, int]
    first_block: int


class SendLayers(NamedTuple):
    """Slabs to a peer."""

    to: int
    layers: tuple[int, ...]


class Load(NamedTuple):
    """Layers come back from a peer, or from the parameter source (also if the peer is gone). Answered:
    remaps, and which peer was lost."""

    layers: tuple[int, ...]
    source: int | None


class SendHidden(NamedTuple):
    """The hidden states that a lane's stage here left, to these ranks of the next one."""

    lane: int
    to: tuple[int, ...]


class RunStage(NamedTuple):
    """A stage of an iteration. `source`: who sends the hidden states (None: the first stage, or they are here).
    Answered: tokens sampled (by an instance's first rank), as (request, id), and which peers were lost on the way (then
    none of it is valid)."""

    lane: int
    batch: Batch
    ids: list[int]
    layers: Layers
    bands: Bands
    source: int | None


class Continue(NamedTuple):
    """A lane's decode iteration after the one before it here: each request one token further on, from the token just
    sampled, in the blocks that it has. Answered as `RunStage`."""

    lane: int


class Recall(NamedTuple):
    """The `Continue` of this number need not be run any more; its answer is not waited for."""

    number: int


class Attend(NamedTuple):
    """A creditor's part of a stage at `home`: layer by layer q, k, v come and (o, lse) go back."""

    home: int
    num_tokens: int
    bands: Bands


class Forget(NamedTuple):
    """The hidden states that a lane left here go nowhere."""

    lane: int


class Settle(NamedTuple):
    """Somebody was lost: go on when all attention for others that was asked for before has ended."""


class CancelTake(NamedTuple):
    """What the `TakeCells` or `Load` of this number brings is not to be put anywhere from now on."""

    number: int


class Beat(NamedTuple):
    """From a worker, unasked: it lives. Since the `Setup` of this number: bytes sent by kind, received by (kind,
    source); stages run, the seconds of its CPU since the first of them (orders, copies and all), and those of the clock
    that they took."""

    setup: int
    sent: dict[str, int]
    received: dict[tuple[str, int], int]
    stages: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0


class Answer(NamedTuple):
    """From a worker. `error`: one line; it ends the run. `contract`: it is a ContractError."""

    sequence: int
    value: Any
    error: str | None = None
    contract: bool = False
    beat: Beat | None = None  # at that time: so what is acknowledged has been counted
