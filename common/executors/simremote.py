"""Attention over KV that lives elsewhere: what an iteration costs when queries travel (DESIGN: creditors).

Per layer a debtor pays max(local partial, round trip + bytes / bandwidth + wait + remote partial) + merge; with
`ClusterModel.overlap=False` local and remote add up (creditors still work side by side). All requests of a layer go in
one message per creditor, which also carries new KV to be appended there. KV in host memory (home's or a creditor's)
crosses that instance's PCIe for every layer before it is attended to. Creditors are slowed by the share of time that
their remote work takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from common.executors.cluster import ClusterModel, StageCost
from common.executors.simlane import SimLane
from common.types import Layers, Tier

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor

Chunks = Sequence[tuple[int, int]]  # (tokens, tokens computed before)
Place = tuple[int, Tier]


class Share:
    """What one creditor does for one layer in one iteration."""

    __slots__ = ("appended", "chunk_ns", "queries", "read", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = 0  # decodes with KV here
        self.tokens = 0  # their KV here
        self.queries = 0  # query tokens shipped, decodes and chunks
        self.appended = 0  # tokens whose new KV is stored here
        self.chunk_ns = 0  # attention of chunks over the KV here
        self.read = 0  # tokens whose KV is read here, once each


def _bands(lane: SimLane, layers: Layers) -> list[Layers]:
    """A stage's layers, cut where any placement in the lane cuts them."""
    borders = {border for placement in lane.spread.values() for span in placement for border in span.layers}
    inside = sorted({border for border in borders if layers[0] < border < layers[1]})
    return list(pairwise([layers[0], *inside, layers[1]]))


def _away(lane: SimLane, index: int, layer: int, request_id: int, start: int, end: int) -> dict[Place, int]:
    """Tokens of [start, end) of a request that are not in a stage's own HBM for a layer, by instance and tier."""
    home = lane.stages[index].instance
    found: dict[Place, int] = {}
    for span in lane.spread.get(request_id, ()):
        at_home = span.instance == home and span.tier is Tier.HBM
        if at_home or not span.layers[0] <= layer < span.layers[1]:
            continue
        low, high = max(start, span.token_start), end if span.token_end is None else min(end, span.token_end)
        if high > low:
            place = span.instance, span.tier
            found[place] = found.get(place, 0) + high - low
    return found


def _writer(lane: SimLane, index: int, layer: int, request_id: int, position: int) -> Place | None:
    """Where a new token's KV goes, if not to the stage's own HBM. The newest spans are looked at first."""
    home = lane.stages[index].instance
    for span in reversed(lane.spread[request_id]):
        if span.token_start <= position and span.layers[0] <= layer < span.layers[1]:
            if span.token_end is not None and span.token_end <= position:
                continue
            at_home = span.instance == home and span.tier is Tier.HBM
            return None if at_home else (span.instance, span.tier)
    return None


def _attended_ns(cost: StageCost, chunk: int, context: int, layers: int) -> int:
    """One layer's attention of a chunk over earlier tokens."""
    over, alone = cost.iteration_ns([(chunk, context)], 0, 0, 0), cost.iteration_ns([(chunk, 0)], 0, 0, 0)
    return max(0, over - alone) // layers


def _shares(
    lane: SimLane, index: int, layer: int, chunks: Chunks, num: int
) -> tuple[dict[Place, Share], int, list[int]]:
    """Work of each creditor for a layer, decode tokens that are elsewhere in all, and of each chunk's context."""
    cost, (low, high) = lane.costs[index], lane.stages[index].layers
    work: dict[Place, Share] = {}
    remote = 0
    for request_id in lane.spread if num else ():
        member = lane.members.get(request_id)
        if member is None:
            continue
        position = member.offset + lane.iteration  # of the token being written, which is attended to as well
        for place, tokens in _away(lane, index, layer, request_id, 0, position + 1).items():
            share = work.get(place)
            if share is None:
                share = work[place] = Share()
            share.read += tokens
            share.requests += 1
            share.queries += 1
            share.tokens += tokens
            remote += tokens
        written = _writer(lane, index, layer, request_id, position)
        if written is not None:
            work[written].appended += 1
    away_of_chunks: list[int] = []
    for (chunk, computed), target in zip(chunks, lane.targets):
        request_id = target.entry.request_id
        before = _away(lane, index, layer, request_id, 0, computed)
        new = _away(lane, index, layer, request_id, computed, computed + chunk)
        away_of_chunks.append(sum(before.values()))
        for place in {**before, **new}:
            share = work.setdefault(place, Share())
            share.queries += chunk
            share.appended += new.get(place, 0)
            share.read += before.get(place, 0)
            share.chunk_ns += _attended_ns(cost, chunk, before.get(place, 0), high - low)
    return work, remote, away_of_chunks


def remote_extra_ns(executor: SimExecutor, lane: SimLane, index: int, chunks: Chunks, num: int, logits: int) -> int:
    """Duration of one iteration at a stage of a lane with spread requests."""
    cost, stage = lane.costs[index], lane.stages[index]
    layers = stage.layers[1] - stage.layers[0]
    context = lane.effective_context(cost.skew_alphas) if num else 0
    extra = remote_sum = 0
    away_sum = [0] * len(chunks)
    for low, high in _bands(lane, stage.layers):
        work, remote, away = _shares(lane, index, low, chunks, num)
        remote_sum += remote * (high - low)
        away_sum = [total + tokens * (high - low) for total, tokens in zip(away_sum, away)]
        lane.shares.append((index, high - low, work))
        if work:
            local_ns = cost.partial_attention_ns(num, max(1, context - remote // num)) if num else 0
            for (chunk, computed), tokens in zip(chunks, away):
                local_ns += _attended_ns(cost, chunk, computed - tokens, layers)
            slowest = max(_remote_ns(executor, lane, index, place, share) for place, share in work.items())
            own = work.get((stage.instance, Tier.DRAM))  # its GPU attends to what came over PCIe after its own part
            extra += (high - low) * _partial_ns(cost, own) if own is not None else 0
            merge = sum(cost.merge_ns(share.queries) for share in work.values())
            hidden = local_ns if executor.cluster.overlap else 0
            extra += (high - low) * (max(0, slowest - hidden) + merge)
    local = [(chunk, computed - tokens // layers) for (chunk, computed), tokens in zip(chunks, away_sum)]
    if num:
        context = max(1, context - remote_sum // layers // num)
    return cost.iteration_ns(local, num, context, logits) + extra


def _remote_ns(executor: SimExecutor, lane: SimLane, index: int, place: Place, share: Share) -> int:
    """One layer's queries to a creditor (with new KV to append), its partial attention, and the results back. KV in
    host memory comes over PCIe first; at home that is all (its GPU's part is added by the caller)."""
    cluster, links = executor.cluster, executor.moves.links
    home = lane.stages[index].instance
    instance, tier = place
    if tier is Tier.DRAM:
        tokens = share.read + share.appended
        fetch = fetch_ns(cluster, tokens * cluster.instances[instance].cell_bytes // cluster.block_size)
        if instance == home:
            return fetch
    else:
        fetch = 0
    kv_bytes = share.appended * cluster.instances[instance].cell_bytes // cluster.block_size
    out = links.message_ns(home, instance, share.queries * cluster.query_bytes + kv_bytes)
    back = links.message_ns(instance, home, share.queries * cluster.partial_bytes)
    return out + fetch + _wait_ns(executor, instance) + _partial_ns(lane.costs[index], share) + back


def fetch_ns(cluster: ClusterModel, num_bytes: int) -> int:
    """KV between an instance's host memory and its GPU, for one layer."""
    return cluster.pcie.latency_ns + int(num_bytes * 1e9 / cluster.pcie.bandwidth) if num_bytes else 0


def _partial_ns(cost: StageCost, share: Share) -> int:
    """One layer's remote partial attention."""
    if not share.requests:
        return share.chunk_ns
    return share.chunk_ns + cost.partial_attention_ns(share.requests, share.tokens // share.requests)


def _wait_ns(executor: SimExecutor, instance: int) -> int:
    """Served between the creditor's layers it waits half a layer; on a side stream it does not wait."""
    serving = executor.instances[instance].serving
    if executor.cluster.remote_service != "between_layers" or serving is None:
        return 0
    stage = serving.stages[serving.stage]
    per_item = serving.durations[serving.stage] // serving.item_iterations
    return per_item // (stage.layers[1] - stage.layers[0]) // 2


def creditor_load(lane: SimLane) -> dict[int, float]:
    """Share of each creditor's time that this lane's remote attention takes while its priced iteration lasts."""
    load: dict[int, float] = {}
    total = max(1, sum(lane.durations))
    for index, layers, work in lane.shares:
        home = lane.stages[index].instance
        for (instance, _), share in work.items():
            if instance == home:
                continue  # its own GPU over its own host memory: within the iteration
            busy = layers * _partial_ns(lane.costs[index], share) / total
            load[instance] = load.get(instance, 0.0) + busy
    return load
