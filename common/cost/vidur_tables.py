"""`VidurTables`: Vidur's own per-layer prediction tables behind the methods of `InstanceCost`.

Fed with these, a correct scheduler must land on Vidur's published results: a check of our event logic that does not
depend on our cost model. Vidur counts no LM head, sampler or host time, rounds tokens up to 8 and contexts to 64, and
sees several prompts of one batch as one of the root of their squared lengths.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import ConfigError

TOKEN_STEP = 8
KV_STEP = 64
BATCHING_OVERHEAD = 0.1  # of attention, as soon as a batch holds more than one of a kind
LAUNCH_MS = 0.02  # host time of one NCCL call
PER_TOKEN = (
    "attn_pre_proj",
    "attn_post_proj",
    "attn_rope",
    "attn_kv_cache_save",
    "input_layernorm",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_down_proj",
    "mlp_act",
    "add",
)


class VidurTables:
    """Iteration times of one replica. `context` of decodes is the plain mean, rounded down (no `skew_alphas`)."""

    skew_alphas: tuple[float, ...] = ()

    def __init__(self, folder: str | Path, num_layers: int = 80) -> None:
        self.folder = Path(folder)
        self.num_layers = num_layers
        per_token = {name: self._single(name) for name in PER_TOKEN}
        self._reduce = reduce = self._single("all_reduce")
        self._dense = {
            tokens: sum(table[tokens] for table in per_token.values()) + 2 * (ms + LAUNCH_MS)
            for tokens, ms in reduce.items()
            if all(tokens in table for table in per_token.values())
        }
        self._decode = self._double("attn_decode")
        self._prefill = self._double("attn_prefill")
        self._rows: dict[int, list[int]] = {}

    def _rows_of(self, name: str) -> list[list[float]]:
        for suffix in (".csv", ".csv.gz"):
            path = self.folder / f"{name}{suffix}"
            if path.is_file():
                with gzip.open(path, "rt") if suffix == ".csv.gz" else open(path) as file:
                    rows: list[list[float]] = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2).tolist()
                    return rows
        raise ConfigError(f"{self.folder / name}.csv: Vidur's prediction table is missing")

    def _single(self, name: str) -> dict[int, float]:
        return {int(key): ms for key, ms in self._rows_of(name)}

    def _double(self, name: str) -> dict[tuple[int, int], float]:
        return {(int(a), int(b)): ms for a, b, ms in self._rows_of(name)}

    def _ms(self, table: dict[tuple[int, int], float], key: tuple[int, int], what: str) -> float:
        try:
            return table[key]
        except KeyError:
            raise ConfigError(f"{self.folder}: no {what} prediction for {key}") from None

    def _decode_ms(self, batch: int, context: int, overhead: float) -> float:
        if not batch:
            return 0.0
        kv = KV_STEP * math.ceil(context / KV_STEP)
        return self._ms(self._decode, (batch, kv), "decode attention") * (1 + overhead * (batch > 1))

    def _prefill_ms(self, chunks: Sequence[tuple[int, int]], overhead: float) -> float:
        if not chunks:
            return 0.0
        kv = sum(KV_STEP * math.ceil(cached / KV_STEP) for _, cached in chunks)
        length = round(math.sqrt(sum(new * new for new, _ in chunks)))
        known = self._ms(self._prefill, (kv, length * length), "prefill attention")
        return known * (1 + overhead * (len(chunks) > 1))

    def attention_ms(
        self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int, overhead: float = BATCHING_OVERHEAD
    ) -> float:
        """Attention of one layer."""
        return self._prefill_ms(chunks, overhead) + self._decode_ms(num_decodes, context, overhead)

    def all_reduce_ms(self, tokens: int) -> float:
        """One all-reduce, without its launch."""
        return self._reduce[TOKEN_STEP * math.ceil(tokens / TOKEN_STEP)]

    def iteration_ns(self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int, num_logits: int) -> int:
        """One mixed forward pass; `num_logits` costs nothing here."""
        tokens = num_decodes + sum(new for new, _ in chunks)
        if not tokens:
            return 0
        rounded = TOKEN_STEP * math.ceil(tokens / TOKEN_STEP)
        if rounded not in self._dense:
            raise ConfigError(f"{self.folder}: no prediction for a batch of {rounded} tokens")
        attention = self.attention_ms(chunks, num_decodes, context)
        return round(1e6 * self.num_layers * (self._dense[rounded] + attention))

    def decode_ns(self, batch: int, context: int) -> int:
        """A pure decode iteration."""
        return self.iteration_ns((), batch, context, batch)

    def decode_prefix(self, batch: int, upto: int) -> list[int]:
        """P[i] = sum of decode_ns(batch, c) for c < i, len(P) > upto; beyond the tables the last value holds."""
        row = self._rows.setdefault(batch, [0])
        if len(row) <= upto:
            last = max(kv for n, kv in self._decode if n == batch) if batch else 0
            for context in range(len(row) - 1, max(upto, 2 * len(row), 512)):
                row.append(row[-1] + self.decode_ns(batch, min(context, last)))
        return row

    def min_iteration_ns(
        self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int, num_logits: int
    ) -> int:
        """These tables know no hardware: no bound."""
        return 0
