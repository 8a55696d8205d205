"""Attention over KV that lives elsewhere: what an iteration costs when queries travel (DESIGN: creditors).

Per layer a debtor pays max(local partial, round trip + bytes / bandwidth + wait + remote partial) + merge. All requests
of a layer go in one message per creditor. Creditors are slowed by the share of time that their remote work takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.executors.memory import overlap
from common.executors.simlane import SimLane

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor


class Share:
    """What one creditor does for one stage in one iteration."""

    __slots__ = ("chunk_ns", "queries", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = 0  # decodes
        self.tokens = 0  # their KV here
        self.queries = 0  # query tokens shipped, decodes and chunks
        self.chunk_ns = 0  # all layers


def _away(executor: SimExecutor, lane: SimLane, index: int, request_id: int, stored: int) -> dict[int, int]:
    """Tokens of a spread request that each other instance holds for a stage, by instance."""
    stage = lane.stages[index]
    found: dict[int, int] = {}
    for span in lane.spread[request_id]:
        if span.instance == stage.instance or not overlap(span.layers, stage.layers):
            continue
        end = stored if span.token_end is None else min(span.token_end, stored)
        if end > span.token_start:
            found[span.instance] = found.get(span.instance, 0) + end - span.token_start
    return found


def shares(
    executor: SimExecutor, lane: SimLane, index: int, chunks: Sequence[tuple[int, int]], num: int
) -> tuple[dict[int, Share], list[tuple[int, int]], int]:
    """Work of each creditor, chunks with their local context only, and remote decode tokens in all."""
    cost = lane.costs[index]
    work: dict[int, Share] = {}
    remote = 0
    if num:
        for request_id in lane.spread:
            member = lane.members.get(request_id)
            if member is None:
                continue
            for instance, tokens in _away(executor, lane, index, request_id, member.offset + lane.iteration).items():
                share = work.setdefault(instance, Share())
                share.requests += 1
                share.tokens += tokens
                share.queries += 1
                remote += tokens
    local: list[tuple[int, int]] = []
    for (chunk, computed), target in zip(chunks, lane.targets):
        request_id = target.entry.request_id
        away = _away(executor, lane, index, request_id, computed) if request_id in lane.spread else {}
        local.append((chunk, computed - sum(away.values())))
        for instance, tokens in away.items():
            share = work.setdefault(instance, Share())
            share.queries += chunk
            attended = cost.iteration_ns([(chunk, tokens)], 0, 0, 0) - cost.iteration_ns([(chunk, 0)], 0, 0, 0)
            share.chunk_ns += max(0, attended)
    return work, local, remote


def remote_extra_ns(
    executor: SimExecutor, lane: SimLane, index: int, chunks: Sequence[tuple[int, int]], num: int, logits: int
) -> int:
    """Duration of one iteration at a stage of a lane with spread requests."""
    cluster = executor.cluster
    cost, stage = lane.costs[index], lane.stages[index]
    layers = stage.layers[1] - stage.layers[0]
    work, local, remote = shares(executor, lane, index, chunks, num)
    context = max(1, lane.effective_context(cost.skew_alpha) - remote // num) if num else 0
    base = cost.iteration_ns(local, num, context, logits)
    if not work:
        return base
    local_ns = cost.partial_attention_ns(num, context) if num else 0
    slowest = 0
    for instance, share in work.items():
        link = cluster.link(stage.instance, instance)
        wire = 2 * link.latency_ns + int(
            share.queries * (cluster.query_bytes + cluster.partial_bytes) * 1e9 / link.bandwidth
        )
        slowest = max(slowest, wire + _wait_ns(executor, instance) + _partial_ns(lane, index, share, layers))
    merge = cost.merge_ns(max(num, 1), len(work) + 1)
    return base + layers * (max(0, slowest - local_ns) + merge)


def _partial_ns(lane: SimLane, index: int, share: Share, layers: int) -> int:
    """One layer's remote partial attention."""
    total = share.chunk_ns // layers
    if share.requests:
        total += lane.costs[index].partial_attention_ns(share.requests, share.tokens // share.requests)
    return total


def _wait_ns(executor: SimExecutor, instance: int) -> int:
    """Served between the creditor's layers it waits half a layer; on a side stream it does not wait."""
    serving = executor.instances[instance].serving
    if executor.cluster.remote_service != "between_layers" or serving is None:
        return 0
    stage = serving.stages[serving.stage]
    per_item = serving.durations[serving.stage] // serving.item_iterations
    return per_item // (stage.layers[1] - stage.layers[0]) // 2


def creditor_load(executor: SimExecutor, lane: SimLane) -> dict[int, float]:
    """Share of each creditor's time that this lane's remote attention takes, from its batch as it stands."""
    load: dict[int, float] = {}
    num = lane.phase.num
    chunks = [(target.target - target.computed, target.computed) for target in lane.targets]
    for index, stage in enumerate(lane.stages):
        work, _, _ = shares(executor, lane, index, chunks, num)
        layers = stage.layers[1] - stage.layers[0]
        total = remote_extra_ns(executor, lane, index, chunks, num, num)
        for instance, share in work.items():
            busy = layers * _partial_ns(lane, index, share, layers) / max(total, 1)
            load[instance] = load.get(instance, 0.0) + busy
    return load
