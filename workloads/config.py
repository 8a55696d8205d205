"""One frozen dataclass per workload kind, and the only way to make one from a mapping (conf/workload/*.yaml).

The defaults here equal those files; a test holds them together.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar

from common.errors import ConfigError

Policy = typing.Literal["error", "reject", "clip"]
LengthSpec = str | Mapping[str, object]  # a preset, `trace:PATH`, or {prompt: {...}, output: {...}}


@dataclass(frozen=True, kw_only=True)
class Common:
    """Keys of every kind. Transformations apply in the order of docs/workloads.md."""

    kind: ClassVar[str] = ""
    description: str = ""  # one line, for --help
    num_requests: int | None = None
    duration_s: float | None = None
    max_output_tokens: int = 4096
    max_prompt_tokens: int | None = None
    overlong: Policy = "reject"
    zero_tokens: Policy = "reject"
    window_s: tuple[float, float] | None = None
    rate_scale: float = 1.0
    speed: float = 1.0
    length_scale: float = 1.0
    mix: Mapping[str, object] | None = None
    per_model: Mapping[str, object] | None = None


@dataclass(frozen=True, kw_only=True)
class Lengthy(Common):
    """Kinds whose lengths are drawn from `lengths`; `fixed` reads the two numbers below it."""

    lengths: LengthSpec = "burstgpt"
    prompt_tokens: int = 1024
    output_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Poisson(Lengthy):
    kind: ClassVar[str] = "poisson"
    num_requests: int | None = 1000
    rate: float = 4.0
    cv: float = 1.0  # of the gaps: 1 is Poisson, anything else a Gamma renewal process of the same rate


@dataclass(frozen=True, kw_only=True)
class ClosedLoop(Lengthy):
    kind: ClassVar[str] = "closed_loop"
    num_requests: int | None = 256
    lengths: LengthSpec = "fixed"
    concurrency: int = 32


@dataclass(frozen=True, kw_only=True)
class Burst(Lengthy):
    """KunServe's evaluation: the rate doubles at 45 s; dwell times as BurstGPT's (mean 11 s, up to 150 s)."""

    kind: ClassVar[str] = "burst"
    duration_s: float | None = 150.0
    rate: float = 44.0  # outside bursts; tuned so that the default cluster is overloaded in the first burst
    cv: float = 1.0
    burst_multiplier: float = 2.0
    first_burst_s: float = 45.0
    first_dwell_s: float | None = 30.0  # null: drawn as the others
    dwell_mean_s: float = 11.0
    dwell_std_s: float = 14.9
    dwell_max_s: float = 150.0
    quiet_mean_s: float = 45.0


@dataclass(frozen=True, kw_only=True)
class LongContext(Common):
    """Infinite-LLM's nine mixes; only the ranges are the paper's, the distributions are ours."""

    kind: ClassVar[str] = "long_context"
    num_requests: int | None = 500
    rate: float = 1.0
    cv: float = 1.0
    trace: int = 0  # 0-2: 1-60K tokens with rising spread; 3-8: up to 200K … 2000K
    long_fraction: float | None = None  # null: the mix's own
    max_context: int | None = None  # null: the mix's own


@dataclass(frozen=True, kw_only=True)
class SharedPrefix(Common):
    """Documents × questions (LooGLE): prompts of one document share it as their prefix."""

    kind: ClassVar[str] = "shared_prefix"
    num_requests: int | None = 500
    rate: float = 2.0
    cv: float = 1.0
    num_documents: int = 100
    zipf_alpha: float | None = None  # null: every document equally often, shuffled
    system_tokens: int = 0  # in front of every prompt
    document_mean: float = 1757.0
    document_p50: float = 1716.0
    document_max: int = 32768
    question_mean: float = 41.0
    question_p50: float = 35.0
    output_mean: float = 24.0
    output_p50: float = 21.0


@dataclass(frozen=True, kw_only=True)
class Sessions(Common):
    """Multi-turn closed loop; the defaults are fitted to MemServe Fig. 7 for ShareGPT."""

    kind: ClassVar[str] = "sessions"
    num_requests: int | None = 600
    rate: float = 1.0  # sessions per second
    cv: float = 1.0
    turns_mean: float = 4.2  # of the geometric law, before the cap
    turns_max: int = 5
    think_mean_s: float = 5.0
    think_cv: float = 1.0
    system_prompts: int = 1  # the sessions share this many distinct system prompts
    system_tokens: int = 0
    first_mean: float = 170.0
    first_p50: float = 120.0
    user_mean: float = 80.0
    user_p50: float = 60.0
    output_mean: float = 322.0
    output_p50: float = 294.0


@dataclass(frozen=True, kw_only=True)
class Diurnal(Lengthy):
    """Slow swings of load, with troughs long enough to consolidate in."""

    kind: ClassVar[str] = "diurnal"
    duration_s: float | None = 1800.0
    lengths: LengthSpec = "sharegpt"
    rate: float = 3.0  # mean
    cv: float = 1.0
    shape: typing.Literal["sine", "steps"] = "sine"
    period_s: float = 600.0
    peak_to_trough: float = 4.0
    levels: tuple[float, ...] = (1.0, 1.6, 0.4, 1.0)  # steps: multiples of `rate`, equal shares of a period


@dataclass(frozen=True, kw_only=True)
class File(Common):
    kind: ClassVar[str] = "file"
    path: str = ""
    max_output_tokens: int = 16384
    format: str = "auto"
    unordered: typing.Literal["error", "sort"] = "error"
    time_unit: typing.Literal["auto", "s", "ms", "us", "ns"] = "auto"
    jitter_s: float = 0.0  # spreads quantised timestamps (Mooncake: 3)
    block_size: int | None = None  # tokens per hash id; null: found from the lengths
    causal: bool = False  # Bailian: the next turn waits for its parent's reply instead of its timestamp
    think_mean_s: float = 5.0  # multi-turn files
    tokens_per_word: float = 1.3333  # conversations that give text without token counts
    rate: float = 1.0  # only for files without timestamps: Poisson


@dataclass(frozen=True, kw_only=True)
class ServeGen(Lengthy):
    """Clients of a production service, each with its own measured rate and burstiness per ten minutes."""

    kind: ClassVar[str] = "servegen"
    path: str = "servegen"
    pool: str = "m-large"
    start_s: float = 50400.0
    duration_s: float | None = 600.0
    rate: float | None = 10.0  # of all clients together, mean over the duration; null: as measured
    max_clients: int | None = None  # the busiest ones; null: all


WorkloadConfig = Poisson | ClosedLoop | Burst | LongContext | SharedPrefix | Sessions | Diurnal | File | ServeGen
KINDS: dict[str, type[Common]] = {
    cls.kind: cls for cls in (Poisson, ClosedLoop, Burst, LongContext, SharedPrefix, Sessions, Diurnal, File, ServeGen)
}


def from_mapping(mapping: Mapping[str, object]) -> WorkloadConfig:
    """A checked config. Unknown keys, wrong types and impossible values are `ConfigError`s naming the key."""
    kind = mapping.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"workload.kind={kind!r} is unknown; choose one of: {', '.join(KINDS)}")
    cls = KINDS[kind]
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key == "kind":
            continue
        if key not in hints:
            close = get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"workload.{key} is not a key of {kind!r}; {hint}known: {', '.join(hints)}")
        values[key] = _convert(f"workload.{key}", value, hints[key])
    config = cls(**values)
    _check(config)
    return typing.cast(WorkloadConfig, config)


def defaults(kind: str) -> dict[str, object]:
    """The defaults of a kind as a plain mapping, as in its yaml file."""
    cls = KINDS[kind]
    assert all(field.default is not MISSING for field in fields(cls))
    plain = {field.name: field.default for field in fields(cls)}
    return {"kind": kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _hints(cls: type[Common]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _convert(key: str, value: object, hint: Any) -> object:
    """`value` as `hint` says, or a ConfigError. Integers may stand for floats, whole floats for integers."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ConfigError(f"{key}={value!r}: choose one of: {', '.join(choices)}")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(key, value, typing.get_args(hint))
    if origin is tuple and isinstance(value, list | tuple):
        args = typing.get_args(hint)
        if args[-1] is Ellipsis or len(args) == len(value):
            return tuple(_convert(key, item, args[0]) for item in value)
        raise ConfigError(f"{key}={list(value)!r} needs {len(args)} numbers")
    if isinstance(value, Mapping) and origin is not None and issubclass(origin, Mapping):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(typing.cast(float, value))
    if hint is int and is_number and float(typing.cast(float, value)).is_integer():
        return int(typing.cast(float, value))
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise ConfigError(f"{key}={value!r} is not {_NAMES.get(hint, 'a list of numbers')}")


_NAMES: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Mapping[str, object]: "a mapping",
}


def _convert_union(key: str, value: object, args: tuple[Any, ...]) -> object:
    if value is None and type(None) in args:
        return None
    wanted = [arg for arg in args if arg is not type(None)]
    for arg in wanted[:-1]:
        if isinstance(value, arg):
            return value
    return _convert(key, value, wanted[-1])


# Every other number in a config must be greater than 0.
_MAY_BE_ZERO = (
    "jitter_s", "think_mean_s", "think_cv", "system_tokens", "first_burst_s", "first_dwell_s", "dwell_std_s",
    "start_s", "zipf_alpha", "long_fraction", "trace",
)  # fmt: skip
# Beyond these, arrays would outgrow memory or 64 bits before anything is replayed.
_MOST = {"speed": 1e6, "rate_scale": 1e6, "length_scale": 1e6, "turns_max": 100_000, "num_documents": 1_000_000}


def _check(config: Common) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        at_least_zero = field.name in _MAY_BE_ZERO
        if not (value >= 0 if at_least_zero else value > 0) or value == float("inf"):
            need = "must not be negative" if at_least_zero else "must be greater than 0"
            raise ConfigError(f"workload.{field.name}={value!r} {need}")
        if value > _MOST.get(field.name, value):
            raise ConfigError(f"workload.{field.name}={value!r} must be at most {_MOST[field.name]:,.0f}")
    if config.window_s is not None and not 0 <= config.window_s[0] < config.window_s[1]:
        raise ConfigError(f"workload.window_s={list(config.window_s)} needs 0 <= start < end")
    fraction = getattr(config, "long_fraction", None)
    if fraction is not None and fraction > 1:
        raise ConfigError(f"workload.long_fraction={fraction!r} must lie between 0 and 1")
    if isinstance(config, LongContext) and config.trace > 8:
        raise ConfigError(f"workload.trace={config.trace} is not one of the mixes 0 to 8")
    if isinstance(config, Diurnal) and (not config.levels or min(config.levels) < 0 or not any(config.levels)):
        raise ConfigError(f"workload.levels={list(config.levels)} needs numbers >= 0, not all zero")
    _check_extent(config)


def _check_extent(config: Common) -> None:
    needs_end = not isinstance(config, File)
    if needs_end and config.num_requests is None and config.duration_s is None:
        raise ConfigError("workload.num_requests and workload.duration_s are both null: set one of them")
    if isinstance(config, ServeGen) and config.duration_s is None:
        raise ConfigError("workload.duration_s=null: servegen needs a duration")
    if isinstance(config, ClosedLoop):
        if config.num_requests is None:
            raise ConfigError("workload.num_requests=null: a closed loop needs a number of requests")
        if config.window_s is not None or (config.rate_scale, config.speed) != (1.0, 1.0):
            raise ConfigError(
                "workload.window_s, rate_scale and speed mean nothing in a closed loop; set workload.concurrency"
            )
    if isinstance(config, File) and not config.path:
        raise ConfigError("workload.path is empty: give a trace file (docs/workloads.md lists them)")
    if isinstance(config, Sessions) and config.mix is not None:
        raise ConfigError("workload.mix does not apply to sessions")
