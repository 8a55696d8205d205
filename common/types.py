"""The vocabulary: what policies and executors say to each other. Integer nanoseconds, tokens, blocks and bytes.

An executor answers every command that takes time by exactly one event with a `Status`. Instantaneous commands
(`Interrupt`, `FreeSpan`, `Send`, `Watch`, `Abort`) are not answered. Command ids are unique within a policy.

A request's KV is a plane, layers x tokens. A `Span` is a rectangle of it on one instance and tier; a `Placement`
tiles the plane. `token_end is None` marks the open span; new KV goes to the span that its position falls in.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

Piece = tuple[str, int, int]  # (source, start, length): tokens start .. start+length of a named source
Content = tuple[Piece, ...]  # the reply of request r is the source f"gen:{r}"
Layers = tuple[int, int]  # half-open range of decoder layers


class Status(IntEnum):
    """How a command ended."""

    OK = 0
    CANCELLED = 1
    FAILED = 2


class Tier(StrEnum):
    """Where the bytes of a span live."""

    HBM = "hbm"
    DRAM = "dram"


class Rule(StrEnum):
    """How an iteration of a lane is composed (see `common.sched.compose`)."""

    CHUNKED = "chunked"  # decodes first, prefill chunks fill the token budget (vLLM V1)
    PREFILL_FIRST = "prefill_first"  # whole prompts alone while any wait (vLLM 0.4-0.6)
    PREFILL_FIRST_LEGACY = "prefill_first_legacy"  # as above, with the padded budget of vLLM 0.2
    SARATHI = "sarathi"  # chunked, prompts and decodes share the budget in batch order (Sarathi-Serve)


class Span(NamedTuple):
    """A rectangle of one request's KV plane that lives on one instance."""

    instance: int
    layers: Layers
    token_start: int
    token_end: int | None
    tier: Tier = Tier.HBM


Placement = tuple[Span, ...]


class Stage(NamedTuple):
    """One hop of a lane's route: these layers run on this instance."""

    instance: int
    layers: Layers


class Entry(NamedTuple):
    """A request joining a lane: tokens `computed` .. `target` are still to be computed, in this order of joining.

    `decode`: only the last known token is left to compute, and the request goes on decoding at once (not reported as
    prefilled). `shared` leading tokens are read from content-named cached
    blocks and charged to nobody. `sample`: at `target` a token is sampled. `leave`: the request then leaves the
    lane, its KV parked, and the step ends (prefill-decode hand-over). `keep`: at its finish the KV stays parked
    under the request's name until a `FreeSpan`; otherwise the executor frees it. `placement` None means one open
    span per stage on that stage's instance; one that is given tiles the tokens from `shared` on, cut at block borders.
    `cache`: its full blocks are named by content when its target is reached, and again at its end (`retain`), so that
    others may share them while it still runs.
    `behind`: another lane of the same route whose iteration in flight computes the tokens up to `computed` (an entry
    with `sample=False`): stages serve in order of arrival, so this lane follows it without waiting for its answer.
    """

    request_id: int
    computed: int
    target: int
    shared: int = 0
    sample: bool = True
    leave: bool = False
    keep: bool = False
    decode: bool = False
    placement: Placement | None = None
    behind: int | None = None
    cache: bool = False


# ---------------------------------------------------------------- commands


class RunStep(NamedTuple):
    """Change a lane's persistent batch, then run iterations until one of its requests finishes or is flagged.

    `remove` frees the KV of those requests (a preemption), except that `retain` blocks of each (in the same order; ()
    means none) stay as cached blocks named by content; `park` leaves it held under the request's name. `place`
    replaces placements of requests in the lane at this boundary: what the stages' instances hold and no longer own is
    freed, elsewhere it stays held. `stages` is needed once, and again to change the route. `reclaim`: cached blocks
    that the joins and the growth of this step may take over where nothing is free, least recently released first.
    """

    command_id: int
    lane: int
    add: tuple[Entry, ...] = ()
    remove: tuple[int, ...] = ()
    retain: tuple[int, ...] = ()
    park: tuple[int, ...] = ()
    place: tuple[tuple[int, Placement], ...] = ()
    stages: tuple[Stage, ...] | None = None
    token_budget: int | None = None
    rule: Rule | None = None
    max_iterations: int | None = None
    reclaim: int = 0


class Interrupt(NamedTuple):
    """End the lane's running step at its next iteration boundary; a no-op when the lane is idle."""

    lane: int


class CopySpan(NamedTuple):
    """Copy tokens [start, end) x layers of a request's KV from one instance to another.

    The source is a lane, parked KV, or cached blocks that the request's content names; it stays readable, and the
    policy frees it after the answer. The destination reserves at submission and holds the KV under the request's name,
    unreadable until the answer. `after` is a RunStep submitted before: the copy starts when that step is done, or with
    `by_layer` follows the request's prefill in that step's lane, layer by layer, until its target is reached. `pace`:
    at most that many tokens per iteration of the source's lane. `piece_bytes`: after each piece the link looks whether
    activations or queries wait. Answer: `CopyDone`. FAILED, without a trace: no room, an instance is down or died, or
    the KV awaited from `after` was not made. CANCELLED: the request ended, or source or destination was freed.
    """

    command_id: int
    request_id: int
    src: int
    dst: int
    layers: Layers
    tokens: tuple[int, int]
    after: int | None = None
    by_layer: bool = False
    pace: int | None = None
    piece_bytes: int | None = None
    priority: int = 0
    num_calls: int = 1
    dst_tier: Tier = Tier.HBM
    src_tier: Tier = Tier.HBM


class SwapSpan(NamedTuple):
    """Move a parked span between HBM and host DRAM of one instance (out: HBM to DRAM). Answer: `SwapDone`.

    With `content` it moves the cached blocks that hold these tokens of it (`request_id` then is only for the record).
    Both tiers are booked until the answer; nothing joins with a span on its way. FAILED: no room at the goal.
    """

    command_id: int
    request_id: int
    instance: int
    layers: Layers
    tokens: tuple[int, int]
    out: bool
    content: Content | None = None


class FreeSpan(NamedTuple):
    """Free KV of a request held outside lanes on an instance, except that `retain` blocks of it become cached blocks
    named by the request's content. `cached_blocks` (a count) of the content cache are evicted instead when
    `request_id` is None: the next ones in the order of eviction, or, with `content`, exactly the blocks that hold
    `tokens` of it. A copy or swap whose source or destination it touches is cancelled. What a lane's placement
    names cannot be freed: switch with `RunStep.place` first. Nothing on a dead instance is left to free."""

    instance: int
    request_id: int | None
    layers: Layers | None = None
    tokens: tuple[int, int] | None = None
    retain: int = 0
    cached_blocks: int = 0
    tier: Tier = Tier.HBM
    content: Content | None = None


class ShrinkKV(NamedTuple):
    """Compact the tail of the KV range until it holds at most `num_cells`; a larger number gives back pages that an
    earlier one freed and no load has taken. Answer: `ShrinkDone` (FAILED: too full)."""

    command_id: int
    instance: int
    num_cells: int


class DropLayers(NamedTuple):
    """Give the pages of these layers' parameters to the KV range, in place. No lane with a stage on them may hold
    requests, and such lanes need a new route after. Answer: `LayersDropped`."""

    command_id: int
    instance: int
    layers: Layers


class LoadLayers(NamedTuple):
    """Bring parameters back, from a peer instance (`source`) or, with None, from host memory. The pages must be free:
    `ShrinkKV` first. Answer: `LayersLoaded` (FAILED: pages in use, or an instance is down, died or lacks them)."""

    command_id: int
    instance: int
    layers: Layers
    source: int | None
    priority: int = 0
    piece_bytes: int | None = None


class StartInstance(NamedTuple):
    """Start an instance (weights load from host or disk first). Answer: `InstanceUp`."""

    command_id: int
    instance: int


class StopInstance(NamedTuple):
    """Stop an instance that holds no KV but cached blocks, or one that is starting (whose start is then answered
    CANCELLED). Answer: `InstanceDown`."""

    command_id: int
    instance: int


class SetTimer(NamedTuple):
    """Ask for `TimerFired` at `at_ns` (not before now), delivered to agent `to`."""

    command_id: int
    at_ns: int
    to: str = ""


class Watch(NamedTuple):
    """Ask for `Progress` of an instance every `period_ns`; 0 ends it. One watch per instance and agent."""

    instance: int
    period_ns: int
    to: str = ""


class Send(NamedTuple):
    """A message between agents; the fault plan may delay, lose or double it. Arrives as `MessageArrived`."""

    sender: str
    to: str
    payload: Any
    num_bytes: int = 0


class Abort(NamedTuple):
    """End a request without an answer (refused or given up); its KV everywhere is freed."""

    request_id: int
    reason: str


class Mark(NamedTuple):
    """Something worth seeing in the timeline (a drop, a restore, a plan). Changes nothing."""

    instance: int
    kind: str
    text: str = ""


Command = (
    RunStep | Interrupt | CopySpan | SwapSpan | FreeSpan | ShrinkKV | DropLayers | LoadLayers
    | StartInstance | StopInstance | SetTimer | Watch | Send | Abort | Mark
)  # fmt: skip


# ---------------------------------------------------------------- events


class RequestArrived(NamedTuple):
    """A request, without its true output length (`oracle_output_tokens` only for baselines labelled oracle). `model`:
    which of the cluster's models it asks for."""

    request_id: int
    prompt_tokens: int
    max_output_tokens: int
    content: Content | None = None
    session: int = -1
    oracle_output_tokens: int | None = None
    to: str = ""
    model: int = 0


class StepDone(NamedTuple):
    """A step ended after `iterations`. `lane_iterations` is the lane's clock: iterations in which its decodes
    advanced (all of them, but under the prefill-first rules). All of `finished` did so in the last iteration.
    `prefilled`: (request, lane clock when its target was reached). `partial`:
    (request, tokens computed) of targets begun but not reached."""

    command_id: int
    lane: int
    status: Status
    iterations: int
    lane_iterations: int
    finished: tuple[int, ...] = ()
    prefilled: tuple[tuple[int, int], ...] = ()
    partial: tuple[tuple[int, int], ...] = ()
    to: str = ""


class CopyDone(NamedTuple):
    """A copy ended; `num_bytes` crossed the wire. `lanes`: (lane, its iterations) on source and destination."""

    command_id: int
    status: Status
    num_bytes: int
    lanes: tuple[tuple[int, int], ...] = ()
    to: str = ""


class SwapDone(NamedTuple):
    """A swap ended."""

    command_id: int
    status: Status
    num_bytes: int
    lanes: tuple[tuple[int, int], ...] = ()
    to: str = ""


class ShrinkDone(NamedTuple):
    """The KV range was compacted (`moved_cells` changed their place), or was too full (FAILED, nothing changed)."""

    command_id: int
    status: Status
    moved_cells: int = 0
    lanes: tuple[tuple[int, int], ...] = ()
    to: str = ""


class LayersDropped(NamedTuple):
    """Parameters were dropped; the KV range now holds `kv_cells`."""

    command_id: int
    status: Status
    kv_cells: int
    lanes: tuple[tuple[int, int], ...] = ()
    to: str = ""


class LayersLoaded(NamedTuple):
    """Parameters are resident again; the KV range now holds `kv_cells`."""

    command_id: int
    status: Status
    kv_cells: int
    lanes: tuple[tuple[int, int], ...] = ()
    to: str = ""


class InstanceUp(NamedTuple):
    """An instance serves; its empty KV range holds `kv_cells`. `command_id` -1: it was there from the start."""

    command_id: int
    instance: int
    status: Status
    kv_cells: int
    to: str = ""


class InstanceDown(NamedTuple):
    """An instance was stopped by command."""

    command_id: int
    instance: int
    status: Status
    to: str = ""


class InstanceLost(NamedTuple):
    """An instance died with everything on it; commands that concerned it are answered FAILED after this."""

    instance: int
    to: str = ""


class TimerFired(NamedTuple):
    """A timer's time has come."""

    command_id: int
    to: str = ""


class MessageArrived(NamedTuple):
    """A message between agents."""

    sender: str
    to: str
    payload: Any


class AgentLost(NamedTuple):
    """An agent died and lost its state; `restarted` when it is back, empty."""

    agent: str
    restarted: bool
    to: str = ""


class Progress(NamedTuple):
    """What a watched instance has done: (lane, its iterations)."""

    instance: int
    lanes: tuple[tuple[int, int], ...] = ()
    to: str = ""


Event = (
    RequestArrived | StepDone | CopyDone | SwapDone | ShrinkDone | LayersDropped | LayersLoaded | InstanceUp
    | InstanceDown | InstanceLost | TimerFired | MessageArrived | AgentLost | Progress
)  # fmt: skip


class RequestStatus(IntEnum):
    """Where a request stands."""

    PENDING = 0  # not yet arrived (a later turn, or beyond the end of the run)
    LIVE = 1
    FINISHED = 2
    REJECTED = 3


class InstanceInfo(NamedTuple):
    """What a policy may know of an instance before it starts. With several models there is one instance for every GPU
    and model, and at most one of those of a GPU (`gpu`; -1: its own) is up or starting at a time."""

    instance: int
    num_layers: int
    kv_cells: int  # cells that the KV range holds with every layer resident
    cell_bytes: int  # K and V of one block of one layer
    layer_param_bytes: int
    node: int = 0
    running: bool = True
    host_cells: int = 0
    gpu: int = -1
    model: int = 0
    tp: int = 1  # GPUs of it; bytes are of all of them


class ClusterInfo(NamedTuple):
    """What a policy may know of the cluster: shapes and budgets, never the executor's cost object. `pools`: with
    several models, the part of each (instances keep their ids; profiles are the model's)."""

    instances: tuple[InstanceInfo, ...]
    block_size: int
    max_model_len: int
    extra: Mapping[str, float] = {}
    pools: tuple[ClusterInfo, ...] = ()
