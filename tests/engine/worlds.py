"""Tiny worlds for `runtime=local`, and the judge of its tokens: a dense decoder that knows no paging."""

from __future__ import annotations

from dataclasses import replace

import torch

from common.engine.head import Head
from common.engine.instance import cell_bytes
from common.engine.layout import LayerLayout
from common.engine.model import Decoder
from common.engine.shard import rank_spec
from common.engine.spec import DecoderSpec
from common.engine.weights import MemorySource, RandomSource
from common.engine.world import EngineWorld
from common.executors.cluster import ClusterModel
from common.executors.local import LocalExecutor
from common.types import InstanceInfo, RequestStatus
from tests.fakes import cluster

torch.set_num_threads(1)
_SOURCES: dict[tuple[object, ...], MemorySource] = {}


def tiny_spec(num_layers: int = 4, num_heads: int = 2, num_kv_heads: int = 2, head_dim: int = 16) -> DecoderSpec:
    """Cells of 4,096 bytes at 16 tokens a block, as `tests.fakes.cluster` counts them; fp32."""
    return DecoderSpec(
        name="tiny", family="llama", num_layers=num_layers, hidden_size=32, intermediate_size=32, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, vocab_size=512, tied=True, max_position=1 << 12,
    )  # fmt: skip


def source_of(spec: DecoderSpec, seed: int = 0) -> MemorySource:
    """Random weights, made once per process."""
    key = (spec, seed)
    if key not in _SOURCES:
        _SOURCES[key] = MemorySource(RandomSource(spec, seed))
    return _SOURCES[key]


def tiny_world(model: ClusterModel, spec: DecoderSpec | None = None, poison: bool = True, **options) -> EngineWorld:
    """A world for a cluster of `tests.fakes`, or of any spec whose cells have that size. As on a GPU, iterations are
    prepared before their turn."""
    spec = spec or tiny_spec(model.num_layers)
    world = EngineWorld(model.instances, spec, source_of(spec), model.block_size, poison=poison, **options)
    world.runner.overlaps = True
    return world


def fitting_cluster(spec: DecoderSpec, instances: int, cells: int, block_size: int, host_cells: int = 0, tp: int = 1,
                    **changes: object) -> ClusterModel:  # fmt: skip
    """A cluster of `tests.fakes` whose cells and layers have the sizes that they have in a spec, on `tp` ranks each."""
    rank = rank_spec(spec, tp)
    cell, layer = tp * cell_bytes(rank, block_size, spec.dtype), tp * LayerLayout(rank).num_bytes
    infos = tuple(InstanceInfo(index, spec.num_layers, cells, cell, layer, index // 2, True, host_cells, tp=tp)
                  for index in range(instances))  # fmt: skip
    return replace(cluster(instances, 1, spec.num_layers, block_size, **changes), instances=infos)


def dense_logits(spec: DecoderSpec, source: MemorySource, ids: list[int]) -> torch.Tensor:
    """Logits of every position of a text, in one pass of dense attention."""
    decoder = Decoder(spec, "cpu", spec.dtype)
    past: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * spec.num_layers
    with torch.inference_mode():
        x = decoder.embed(torch.tensor(ids), source.embedding())
        rotation = decoder.rotation(torch.arange(len(ids)))
        for index in range(spec.num_layers):
            x = decoder.layer(source.layout.views(source.slab(index)), x, rotation, _dense(spec, past, index))
        return decoder.logits(x, source.final_norm(), Head(source.head()))


TIE = 1e-5  # of the largest logit: as far as two orders of the same fp32 sums may lie apart


def off_the_likeliest(spec: DecoderSpec, source: MemorySource, ids: list[int], length: int) -> float:
    """By how much of the largest logit a reply's worst token falls short of the likeliest, given all before it."""
    logits = dense_logits(spec, source, ids[:-1])[length - 1 :]
    said = logits.gather(1, torch.tensor(ids[length:])[:, None])
    return float(((logits.max(dim=1, keepdim=True).values - said) / logits.abs().max()).max())


def check_reply(spec: DecoderSpec, source: MemorySource, ids: list[int], length: int, request_id: int) -> None:
    """A reply is the undisturbed one exactly if each token is what those before it call for. Two tokens whose logits
    are equal but for rounding (which pairs are, depends on the machine) are both right."""
    off = off_the_likeliest(spec, source, ids, length)
    assert off <= TIE, f"request {request_id} says something else than an undisturbed run: {off:.1e} off"


def check_replies(executor: LocalExecutor) -> int:
    """As `check_tokens`, quicker: one dense pass over each whole text."""
    spec, compared = executor.world.spec, 0
    status = executor.record.requests.status
    for request_id, ids in executor.tokens.items():
        if status[request_id] != RequestStatus.FINISHED:
            continue
        length, output = executor.members.prompt[request_id], executor.members.output[request_id]
        assert len(ids) == length + output, f"request {request_id} has {len(ids) - length} tokens, not {output}"
        check_reply(spec, executor.world.source, ids, length, request_id)
        compared += output
    return compared


def undisturbed(spec: DecoderSpec, source: MemorySource, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of one request alone, dense attention over its whole past, one token at a time."""
    decoder = Decoder(spec, "cpu", spec.dtype)
    weights = [source.layout.views(source.slab(index)) for index in range(spec.num_layers)]
    past: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * spec.num_layers
    ids, out = torch.tensor(prompt), []
    position, head = 0, Head(source.head())
    with torch.inference_mode():
        while len(out) < num_tokens:
            x = decoder.embed(ids, source.embedding())
            rotation = decoder.rotation(torch.arange(position, position + len(ids)))
            for index in range(spec.num_layers):
                x = decoder.layer(weights[index], x, rotation, _dense(spec, past, index))
            token = int(decoder.logits(x[-1:], source.final_norm(), head).argmax())
            position += len(ids)
            out.append(token)
            ids = torch.tensor([token])
    return out


def _dense(spec, past, index):
    def attend(q, k, v):
        if past[index] is not None:
            k, v = torch.cat([past[index][0], k]), torch.cat([past[index][1], v])
        past[index] = (k.clone(), v.clone())
        group = spec.num_heads // spec.num_kv_heads
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, keys) * spec.scale
        first = len(k) - len(q)
        mask = torch.arange(len(k))[None] > torch.arange(len(q))[:, None] + first
        scores = scores.masked_fill(mask, float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)

    return attend


_REPLIES: dict[tuple[object, ...], list[int]] = {}


def _reply(spec: DecoderSpec, source: MemorySource, prompt: list[int], num_tokens: int) -> list[int]:
    """`undisturbed`, computed once per prompt: a shorter greedy reply is the beginning of a longer one."""
    key = (spec, id(source), *prompt)
    if len(_REPLIES.get(key, ())) < num_tokens:
        _REPLIES[key] = undisturbed(spec, source, prompt, num_tokens)
    return _REPLIES[key][:num_tokens]


def check_tokens(executor: LocalExecutor) -> int:
    """Every finished request has the reply of an undisturbed run; returns how many tokens were compared."""
    spec, compared = executor.world.spec, 0
    status = executor.record.requests.status
    for request_id, ids in executor.tokens.items():
        if status[request_id] != RequestStatus.FINISHED:
            continue
        length = executor.members.prompt[request_id]
        want = _reply(spec, executor.world.source, ids[:length], executor.members.output[request_id])
        if ids[length:] != want:
            assert len(ids) == length + len(want), f"request {request_id} has {len(ids) - length} tokens"
            check_reply(spec, executor.world.source, ids, length, request_id)
        compared += len(want)
    assert compared, "no request finished"
    return compared
