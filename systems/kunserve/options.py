"""What can be switched, with the paper's or the released code's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import ConfigError
from systems.kunserve.monitor import Thresholds

CHOICES = {
    "mode": ("pipeline", "remote_attention"),
    "exchange": ("coordinated", "uncoordinated", "recompute"),
    "lookahead": ("on", "literal", "token_count"),
    "restore": ("on", "off"),
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
        """From conf/system/kunserve.yaml; switches are checked here, in one line."""
        values = {key: _switch(value) for key, value in given.items()}
        for key, choices in CHOICES.items():
            value = values.get(key, choices[0])
            if value not in choices:
                raise ConfigError(f"system.{key}={value} is unknown; choose one of: {', '.join(choices)}")
        ms = 1_000_000
        low = Thresholds()
        limits = Thresholds(
            poll_ns=int(values.get("poll_ms", low.poll_ns / ms) * ms),
            usage=float(values.get("overload_usage", low.usage)),
            restore_usage=float(values.get("restore_usage", low.restore_usage)),
            overload_polls=int(values.get("overload_polls", low.overload_polls)),
            calm_polls=int(values.get("calm_polls", low.calm_polls)),
            min_pipeline_ns=int(values.get("min_pipeline_ms", low.min_pipeline_ns / ms) * ms),
            min_serving_ns=int(values.get("min_serving_ms", low.min_serving_ns / ms) * ms),
        )
        if limits.poll_ns <= 0:
            raise ConfigError(f"system.poll_ms={values['poll_ms']}: give a period above 0 ms")
        piece = values.get("piece_mb")
        return Options(
            mode=values.get("mode", "pipeline"),
            exchange=values.get("exchange", "coordinated"),
            lookahead=values.get("lookahead", "on"),
            restore=values.get("restore", "on"),
            limits=limits,
            min_tokens=_positive("min_tokens", values.get("min_tokens", 256)),
            exchange_batch=int(values.get("exchange_batch", 8)),
            piece_bytes=None if piece is None else int(piece * 1e6),
            max_group=values.get("max_group"),
        )


def _switch(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _positive(key: str, value: Any) -> int:
    """A whole number above 0."""
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"system.{key}={value}: give a whole number of tokens above 0")
    return value
