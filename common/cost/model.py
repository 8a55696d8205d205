"""`InstanceCost`: the time of one iteration on one instance, from operator tables, as integer nanoseconds.

An iteration is: embedding, then per layer norms, projections, rotary, attention, MLP and (tp > 1) two all-reduces,
then the final norm, LM head and sampler. Everything but attention depends on token or row counts only and is a list
lookup; decode attention is piecewise linear in context with integer coefficients, so prefix sums are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.cost.attention import AttentionCost
from common.cost.curves import DecodeRow
from common.cost.engine import EngineTraits
from common.cost.memory import check_tp, shard_kv_heads
from common.cost.operators import Operators
from common.cost.shapes import element_widths, linear_shapes
from common.cost.specs import HardwareSpec, ModelSpec
from common.errors import ConfigError


class InstanceCost:
    """Times on `tp` GPUs that run `num_layers` of a model's layers (default all), as first and/or last stage."""

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareSpec,
        tp: int = 1,
        num_layers: int | None = None,
        first: bool = True,
        last: bool = True,
        engine: EngineTraits | None = None,
        operators: Operators | None = None,
    ) -> None:
        check_tp(model, tp)
        if model.dtype_bytes != hardware.dtype_bytes:
            raise ConfigError(
                f"model {model.name}: the operators of {hardware.name} are measured with elements of "
                f"{hardware.dtype_bytes} bytes, not {model.dtype_bytes}; use model.dtype_bytes={hardware.dtype_bytes}"
            )
        self.model, self.hardware, self.tp = model, hardware, tp
        self.num_layers = model.num_layers if num_layers is None else num_layers
        self.first, self.last = first, last
        self.engine = engine or EngineTraits()
        self.operators = ops = operators or Operators(hardware)
        self.skew_alphas: tuple[float, ...] = skew_alphas(ops, tp)
        self.heads, self.kv_heads = max(1, model.num_heads // tp), shard_kv_heads(model, tp)
        self._host_ns = self.engine.host_time_ns(0, tp)
        self._dense: list[int] = []
        self._head: list[int] = []
        self._rows: dict[int, DecodeRow] = {}
        self.attention = AttentionCost(ops, self.heads, self.kv_heads, model.head_dim, model.dtype_bytes)

    # -- whole iterations

    def iteration_ns(self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int, num_logits: int) -> int:
        """One forward pass: prefill `chunks` of (new tokens, cached context before them) beside `num_decodes`
        decodes of effective context `context` (mean + skew_alphas[n] * (max - mean), the new token included); LM head
        and sampler run for `num_logits` rows."""
        if not chunks:
            if num_logits == num_decodes:
                return self.decode_ns(num_decodes, context)
            tokens = num_decodes
        else:
            tokens = num_decodes + (chunks[0][0] if len(chunks) == 1 else sum([chunk[0] for chunk in chunks]))
        attention = self.attention_ns(chunks, num_decodes, context)
        device = self._dense_ns(tokens) + attention + self._head_ns(num_logits)
        engine = self.engine
        prompts = len(chunks)
        host = engine.host_per_seq_ns * (num_decodes + prompts) + engine.host_per_chunk_ns * prompts + self._host_ns
        if engine.async_scheduling:
            return device if device > host else host
        return device + host

    def decode_ns(self, batch: int, context: int) -> int:
        """A pure decode iteration: `iteration_ns((), batch, context, batch)`."""
        row = self._rows.get(batch) or self._row(batch)
        attention = row.attention_ns(context)
        return row.device_ns + attention if row.device_ns + attention > row.host_ns else row.host_ns

    def decode_prefix(self, batch: int, upto: int) -> list[int]:
        """P with len(P) > upto and P[i] = sum of decode_ns(batch, c) for c < i. Shared: do not modify."""
        row = self._rows.get(batch) or self._row(batch)
        if len(row.prefix) <= upto:
            row.grow(upto + 1)
        return row.prefix

    def min_iteration_ns(
        self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int, num_logits: int
    ) -> int:
        """The speed of light of the same iteration: each operator's bytes / bandwidth or FLOPs / peak, summed."""
        tokens = num_decodes + sum(chunk[0] for chunk in chunks)
        if tokens == 0:
            return 0
        shapes = linear_shapes(self.model, self.tp)
        roof = self.operators.roof
        head = shapes.pop("lm_head")
        layer = sum(float(roof.linear(tokens, n, k)) for n, k in shapes.values())
        pairs = sum(c * (p + (c + 1) / 2) for c, p in chunks) + num_decodes * context
        reads = num_decodes * context + (chunks[0][1] if len(chunks) == 1 else 0)
        layer += max(pairs * self.attention.pair_ns, reads * self.attention.read_ns)
        total = layer * self.num_layers
        if self.last and num_logits:
            total += float(roof.linear(num_logits, *head))
        return int(total)

    # -- remote attention (one layer)

    def partial_attention_ns(self, batch: int, context: int) -> int:
        """One layer's attention of `batch` queries over `context` tokens of KV each, held elsewhere."""
        if batch == 0 or context == 0:
            return 0
        return -(-self._row(batch).attention_ns(context) // max(1, self.num_layers))

    def merge_ns(self, tokens: int) -> int:
        """Merging one remote partial (output and log-sum-exp) into the local one, one layer."""
        return (
            int(
                self.operators.elementwise(
                    "layernorm", 2 * self.heads * self.model.head_dim, np.array([float(max(1, tokens))])
                )[0]
            )
            + 1
        )

    def attention_ns(self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int) -> int:
        """Attention of all layers of a batch, without everything around it."""
        row = self._rows.get(num_decodes) or self._row(num_decodes)
        decodes = row.attention_ns(context)
        if not chunks:
            return decodes
        layers = self.num_layers
        return int(self.attention.batch_ns(chunks, num_decodes, context, decodes / layers) * layers) + 1

    # -- parts

    def _dense_ns(self, tokens: int) -> int:
        if tokens >= len(self._dense):
            self._dense = self._dense_table(max(2048, 1 << tokens.bit_length()))
        return self._dense[tokens]

    def _head_ns(self, rows: int) -> int:
        if not self.last or rows == 0:
            return 0
        if rows >= len(self._head):
            self._head = self._head_table(max(256, 1 << rows.bit_length()))
        return self._head[rows]

    def _dense_table(self, upto: int) -> list[int]:
        """All but attention and head, by tokens of the batch (as a captured graph pads them)."""
        padded = np.array([self.engine.padded(t) for t in range(upto + 1)], dtype=np.float64)
        axis, inverse = np.unique(padded, return_inverse=True)
        ops, model = self.operators, self.model
        layer = np.zeros_like(axis)
        for name, (n, k) in linear_shapes(model, self.tp).items():
            if name != "lm_head":
                layer += ops.linear(n, k, axis)
        widths = element_widths(model, self.tp)
        for name, count in (
            ("layernorm", 2),
            ("rotary_emb", 1),
            ("act_fn", 1),
            ("qk_norm", int(model.qk_norm)),
        ):
            if count:
                layer += count * ops.elementwise(name, widths[name], axis)
        reduce = ops.all_reduce(self.tp, axis * model.hidden_size * model.dtype_bytes)
        total = self.num_layers * (layer + 2 * reduce)
        if self.first:
            total += ops.elementwise("embedding", model.hidden_size, axis) + reduce
        if self.last:
            total += ops.elementwise("final_layernorm", model.hidden_size, axis)
        table: list[int] = np.ceil(total).astype(np.int64)[inverse].tolist()
        table[0] = 0
        return table

    def _head_table(self, upto: int) -> list[int]:
        """LM head, gather of logits (half an all-reduce) and sampler, by rows."""
        rows = np.arange(upto + 1, dtype=np.float64)
        n, k = linear_shapes(self.model, self.tp)["lm_head"]
        vocab = self.model.vocab_size
        total = self.operators.linear(n, k, rows) + self.operators.sampler(vocab, rows)
        total += 0.5 * self.operators.all_reduce(self.tp, rows * vocab * self.model.dtype_bytes)
        table: list[int] = np.ceil(total).astype(np.int64).tolist()
        table[0] = 0
        return table

    def _row(self, batch: int) -> DecodeRow:
        row = self._rows.get(batch)
        if row is None:
            row = self._rows[batch] = self._make_row(batch)
        return row

    def _make_row(self, batch: int) -> DecodeRow:
        fixed = self._dense_ns(batch) + self._head_ns(batch)
        host = self.engine.iteration_ns(0, batch, self.tp) if batch else 0
        if not self.engine.async_scheduling:
            fixed, host = fixed + host, 0
        return self.attention.decode_row(batch, self.num_layers, fixed, host)


def skew_alphas(operators: Operators, tp: int) -> tuple[float, ...]:
    """Weight of the longest decode in the effective context, for every batch size: what the profile's own meta.yaml
    says for this tp (or its largest below), nothing where its skew fit is off or absent (docs/cost-model.md)."""
    known = {int(key): float(alpha) for key, alpha in (operators.grid.meta.get("skew") or {}).items()}
    below = [key for key in known if key <= tp] or list(known)[:1]
    return (known[max(below)],) if below else ()
