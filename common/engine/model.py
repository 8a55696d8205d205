"""The decoder's arithmetic. It owns no parameters and no KV: weights are views of slabs, attention is the caller's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.engine.head import Head
from common.engine.layout import LayerWeights
from common.engine.products import Products
from common.engine.rope import RopeTable, Rotation, rotate
from common.engine.scratch import Scratch
from common.engine.spec import DecoderSpec, check_device

# q_THD, k_TGD, v_TGD -> o_THD. Writes K and V where they belong and attends. Its inputs may be strided views (the last
# dimension is always contiguous) and live until the layer ends.
_MLP_ROWS = 512  # rows of the MLP at once on a CPU: what they need in between stays in cache
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]  # a rank's part of a sum [T, hidden] -> the sum over all ranks


class Decoder:
    """One dense decoder on one device, or (with `reduce`) one rank of it. All calls are pure but for `layer` and `mlp`,
    which update `x` in place.

    A rank has its own heads and its own part of the MLP's width. What it adds to the hidden states is a part of a sum,
    so the residual is added after the reduction: once, not by each rank."""

    def __init__(self, spec: DecoderSpec, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = dtype or spec.dtype
        self.reduce: Reduce | None = None
        check_device(self.device, self.dtype)
        self.rope = RopeTable(spec, self.device, self.dtype)
        self._scratch = Scratch(self.device, self.dtype)
        self.products = Products(self._scratch, self.device, self.dtype)
        self._eps = torch.tensor(spec.rms_eps, dtype=torch.float32, device=self.device)

    def embed(self, ids_T: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] of token ids [T], in a new tensor; `table` is [vocab, hidden]."""
        return table.index_select(0, ids_T)

    def rotation(self, positions_T: torch.Tensor) -> Rotation:
        """What every layer of one iteration needs to know of its tokens' positions."""
        return self.rope.at(positions_T)

    def layer(
        self, weights: LayerWeights, x: torch.Tensor, rotation: Rotation, attend: Attend,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """One decoder layer over `x` [T, hidden], in place; returns `x`. With `rows` (the last layer: those that are
        sampled), what follows attention is computed for them alone, and they are returned in a new tensor."""
        if self.reduce is not None:
            part = self.attention_part(weights, x, rotation, attend, rows)
            x = x if rows is None else x.index_select(0, rows)
            x.add_(self.reduce(part))
            return x.add_(self.reduce(self.mlp_part(weights, x)))
        o = self._attended(weights, x, rotation, attend, rows)
        x = x if rows is None else x.index_select(0, rows)
        self.products.add(x, o, weights.o)
        return self.mlp(weights, x)

    def attention_part(
        self, weights: LayerWeights, x: torch.Tensor, rotation: Rotation, attend: Attend,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What the heads of these weights add to `x` (to its `rows`), in a new tensor [T, hidden]."""
        return torch.mm(self._attended(weights, x, rotation, attend, rows), weights.o)

    def _attended(
        self, weights: LayerWeights, x: torch.Tensor, rotation: Rotation, attend: Attend, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """[T, heads * size], of `rows` alone if these are given."""
        q, k, v = self.project(weights, x, rotation)
        o = attend(q, k, v).reshape(x.shape[0], -1)
        return o if rows is None else o.index_select(0, rows)

    def project(
        self, weights: LayerWeights, x: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [T, H, D], keys and values [T, G, D] of a layer's input, valid until the next call."""
        spec, tokens = self.spec, x.shape[0]
        hidden = self.norm(x, weights.input_norm)
        qkv = self.products.times(hidden, weights.qkv, "qkv", weights.qkv_bias)
        heads = qkv.view(tokens, -1, spec.head_dim)
        kv_start, v_start = spec.num_heads, spec.num_heads + spec.num_kv_heads
        if weights.q_norm is not None and weights.k_norm is not None:
            q = rotate(self.norm(heads[:, :kv_start], weights.q_norm), rotation)
            k = rotate(self.norm(heads[:, kv_start:v_start], weights.k_norm), rotation)
            return q, k, heads[:, v_start:]
        qk = rotate(heads[:, :v_start], rotation, self._scratch.room("qk", tokens, v_start, spec.head_dim))
        return qk[:, :kv_start], qk[:, kv_start:], heads[:, v_start:]

    def mlp(self, weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        """Adds the gated MLP of `x` [T, hidden] to it, in place."""
        for rows in self._few(x):
            self.products.add(rows, self._gated(weights, rows), weights.down)
        return x

    def mlp_part(self, weights: LayerWeights, x: torch.Tensor) -> torch.Tensor:
        """What this part of the MLP's width adds to `x` [T, hidden], in a new tensor."""
        out = torch.empty_like(x)
        for rows, part in zip(self._few(x), self._few(out)):
            torch.mm(self._gated(weights, rows), weights.down, out=part)
        return out

    def _few(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As many rows at once as are good for the cache."""
        return torch.split(x, _MLP_ROWS) if self.device.type == "cpu" else (x,)

    def _gated(self, weights: LayerWeights, rows: torch.Tensor) -> torch.Tensor:
        """[n, intermediate], valid until the next call."""
        inner = self.spec.intermediate_size
        gate_up = self.products.times(self.norm(rows, weights.post_norm), weights.gate_up, "gate_up")
        active = torch.ops.aten.silu.out(gate_up[:, :inner], out=self._scratch.room("active", len(rows), inner))
        return active.mul_(gate_up[:, inner:])  # type: ignore[no-any-return]

    def logits(self, x_rows: torch.Tensor, norm: torch.Tensor, head: Head) -> torch.Tensor:
        """Logits [n, vocab] of the hidden states [n, hidden] of those tokens that need them."""
        return head(self.norm(x_rows, norm))

    def likeliest(
        self, x_rows: torch.Tensor, norm: torch.Tensor, head: Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same logits, and the most likely token of each row, int64 [n]."""
        return head.likeliest(self.norm(x_rows, norm))

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension, in a new tensor; the mean square is fp32."""
        if x.is_cuda:
            return F.rms_norm(x, weight.shape, weight, self.spec.rms_eps)
        full = x.float()
        length = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        out: torch.Tensor = (full * inverse).to(x.dtype)
        return out.mul_(weight)
