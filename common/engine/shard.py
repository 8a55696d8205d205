"""Tensor parallelism inside an instance: what each of its `tp` ranks holds.

A rank has a contiguous share of the query heads, the KV heads that these read (fewer KV heads than ranks: each is held
by tp / heads of them) and a share of the MLP's width. qkv, gate and up are cut by columns, o and down by rows, so a
layer needs two reductions. Norms, the embedding and the LM head are whole in each rank: all ranks have the whole hidden
states anyway, the first one's logits are then those of an uncut model, and nothing but the two reductions is ever
sent. It costs vocabulary x hidden bytes a rank, and the head is not sped up (the cost model's is cut by vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from common.engine.layout import LayerLayout, LayerWeights
from common.engine.spec import DecoderSpec
from common.engine.weights import ParameterSource, Staging
from common.errors import ConfigError
from common.types import InstanceInfo


def rank_spec(spec: DecoderSpec, tp: int) -> DecoderSpec:
    """The decoder that one of `tp` ranks runs, all of them alike. ConfigError where heads or MLP do not divide."""
    heads, kv_heads, inner = spec.num_heads, spec.num_kv_heads, spec.intermediate_size
    if tp < 1 or heads % tp or inner % tp or (kv_heads % tp and tp % kv_heads):
        raise ConfigError(f"model {spec.name}: {heads} heads, {kv_heads} KV heads and an MLP of {inner} do not divide "
                          f"over tp={tp}")  # fmt: skip
    return replace(spec, num_heads=heads // tp, num_kv_heads=max(1, kv_heads // tp), intermediate_size=inner // tp)


def kv_heads_of(num_kv_heads: int, tp: int, rank: int) -> tuple[int, int]:
    """KV heads [low, high) of the whole model that a rank holds."""
    num = max(1, num_kv_heads // tp)
    low = rank * num_kv_heads // tp
    return low, low + num


def rank_info(info: InstanceInfo, tp: int) -> InstanceInfo:
    """An instance as one of its ranks sees it: as many cells and layers, a share of the bytes of each."""
    assert info.cell_bytes % tp == info.layer_param_bytes % tp == 0, "bytes of an instance that are no sum of ranks'"
    return info._replace(cell_bytes=info.cell_bytes // tp, layer_param_bytes=info.layer_param_bytes // tp)


def ordered_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of all ranks' parts, always in the order of ranks: the same bits wherever it is computed."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


class ShardedSource:
    """One rank's parameters out of a whole model's source. A layer is read whole and cut."""

    def __init__(self, source: ParameterSource, tp: int, rank: int) -> None:
        assert 0 <= rank < tp
        self.whole, self.tp, self.rank = source, tp, rank
        self.spec = rank_spec(source.spec, tp)
        self.layout = LayerLayout(self.spec, source.layout.dtype)
        self._staging = Staging(self.layout)

    def layer_into(self, index: int, slab: torch.Tensor) -> None:
        """Fill `slab` with this rank's part of layer `index`."""
        full = torch.empty(self.whole.layout.num_bytes, dtype=torch.uint8)
        self.whole.layer_into(index, full)
        self._cut(self.whole.layout.views(full), self.layout.views(self._staging.host_slab(slab)))
        self._staging.finish(slab)

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]: whole."""
        return self.whole.embedding()

    def head(self) -> torch.Tensor:
        """[vocab, hidden]: whole."""
        return self.whole.head()

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return self.whole.final_norm()

    def _cut(self, full: LayerWeights, own: LayerWeights) -> None:
        inner, rank = self.spec.intermediate_size, self.rank
        columns = self._qkv_columns()
        own.qkv.copy_(full.qkv[:, columns])
        if own.qkv_bias is not None and full.qkv_bias is not None:
            own.qkv_bias.copy_(full.qkv_bias[columns])
        own.o.copy_(full.o[rank * self.spec.q_size : (rank + 1) * self.spec.q_size])
        width = slice(rank * inner, (rank + 1) * inner)
        for part, whole in zip(own.gate_up.chunk(2, dim=1), full.gate_up.chunk(2, dim=1)):
            part.copy_(whole[:, width])
        own.down.copy_(full.down[width])
        for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
            tensor = getattr(own, name)
            if tensor is not None:
                tensor.copy_(getattr(full, name))

    def _qkv_columns(self) -> torch.Tensor:
        """Columns of the fused projection: this rank's queries, then its keys, then its values."""
        whole, size = self.whole.spec, self.spec.head_dim
        low, high = kv_heads_of(whole.num_kv_heads, self.tp, self.rank)
        queries = torch.arange(self.rank * self.spec.q_size, (self.rank + 1) * self.spec.q_size)
        keys = torch.arange(whole.q_size + low * size, whole.q_size + high * size)
        return torch.cat([queries, keys, keys + whole.kv_size])
