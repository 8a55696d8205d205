"""What can be switched, with the paper's or the released code's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.options import Choice, Kind, Number, Whole, checked, period_ms, share, time_ms
from systems.kunserve.monitor import Thresholds

OPTIONS: dict[str, Kind] = {
    "mode": Choice(("pipeline", "remote_attention")),
    "exchange": Choice(("coordinated", "uncoordinated", "recompute")),
    "lookahead": Choice(("on", "literal", "token_count")),
    "restore": Choice(("on", "off")),
    "poll_ms": period_ms(),
    "overload_usage": share(),
    "overload_polls": Whole(1),
    "restore_usage": share(),
    "calm_polls": Whole(1),
    "min_pipeline_ms": time_ms(),
    "min_serving_ms": time_ms(),
    "min_tokens": Whole(1),
    "exchange_batch": Whole(1),
    "piece_mb": Number(0.001, 1e6, null=True),
    "max_group": Whole(1, null=True),
}


@dataclass(frozen=True, slots=True)
class Options:
    """`piece_bytes`: None takes about one stage's time on the link where the cluster tells its costs."""

    mode: str = "pipeline"
    exchange: str = "coordinated"
    lookahead: str = "on"
    restore: str = "on"
    limits: Thresholds = field(default_factory=Thresholds)
    min_tokens: int = 256
    exchange_batch: int = 8
    piece_bytes: int | None = None
    max_group: int | None = None

    @staticmethod
    def of(given: Mapping[str, Any]) -> Options:
        """From conf/system/kunserve.yaml, checked."""
        values = checked(given, OPTIONS)
        ms = 1_000_000
        low = Thresholds()
        limits = Thresholds(
            poll_ns=int(values.get("poll_ms", low.poll_ns / ms) * ms),
            usage=float(values.get("overload_usage", low.usage)),
            restore_usage=float(values.get("restore_usage", low.restore_usage)),
            overload_polls=values.get("overload_polls", low.overload_polls),
            calm_polls=values.get("calm_polls", low.calm_polls),
            min_pipeline_ns=int(values.get("min_pipeline_ms", low.min_pipeline_ns / ms) * ms),
            min_serving_ns=int(values.get("min_serving_ms", low.min_serving_ns / ms) * ms),
        )
        piece = values.get("piece_mb")
        return Options(
            mode=values.get("mode", "pipeline"),
            exchange=values.get("exchange", "coordinated"),
            lookahead=values.get("lookahead", "on"),
            restore=values.get("restore", "on"),
            limits=limits,
            min_tokens=values.get("min_tokens", 256),
            exchange_batch=values.get("exchange_batch", 8),
            piece_bytes=None if piece is None else int(piece * 1e6),
            max_group=values.get("max_group"),
        )
