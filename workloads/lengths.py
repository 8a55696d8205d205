"""Prompt and output lengths: distributions with stated means, and presets with their origin.

Lognormals are given by their mean *after* clipping and either the median or the coefficient of variation of the
unclipped law; the location is solved for, so that `mean` is what the workload really has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import ConfigError
from workloads.types import Floats, Ints

Rng = np.random.Generator


@dataclass(frozen=True)
class LogNormal:
    mu: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: Rng, num: int) -> Ints:
        return to_tokens(rng.lognormal(self.mu, self.sigma, num), self.low, self.high)


def to_tokens(values: Floats, low: int, high: int) -> Ints:
    return np.clip(np.rint(values), low, high).astype(np.int64)


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def clipped_mean(mu: float, sigma: float, low: float, high: float) -> float:
    """E[min(max(X, low), high)] for X lognormal(mu, sigma)."""
    a, b = (math.log(low) - mu) / sigma, (math.log(high) - mu) / sigma
    inner = math.exp(mu + sigma * sigma / 2) * (_phi(b - sigma) - _phi(a - sigma))
    return low * _phi(a) + inner + high * (1.0 - _phi(b))


def lognormal(
    mean: float, *, p50: float | None = None, cv: float | None = None, low: int = 1, high: int = 1 << 24
) -> LogNormal:
    """Solve for the lognormal whose clipped mean is `mean`, by bisection (a fixed number of halvings)."""
    if not low < mean < high:
        raise ConfigError(f"lengths: mean {mean:g} must lie between min {low} and max {high}")
    if cv is not None:
        sigma = math.sqrt(math.log1p(cv * cv))
        return LogNormal(_bisect(lambda m: clipped_mean(m, sigma, low, high), mean, -5.0, 25.0), sigma, low, high)
    if p50 is None or not low <= p50 <= mean:
        raise ConfigError(f"lengths: p50 {p50} must lie between min {low} and the mean {mean:g}; or give cv")
    mu = math.log(p50)
    sigma = _bisect(lambda s: clipped_mean(mu, s, low, high), mean, 1e-6, 6.0)
    return LogNormal(mu, sigma, low, high)


def _bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Fixed:
    tokens: int

    def draw(self, rng: Rng, num: int) -> Ints:
        return np.full(num, self.tokens, np.int64)


@dataclass(frozen=True)
class Uniform:
    """Uniform over [low, high], or over its logarithm."""

    low: int
    high: int
    log: bool = False

    def draw(self, rng: Rng, num: int) -> Ints:
        unit = rng.random(num)
        if not self.log:
            return self.low + np.floor(unit * (self.high - self.low + 1)).astype(np.int64)
        return to_tokens(self.low * (self.high / self.low) ** unit, self.low, self.high)


@dataclass(frozen=True)
class Zipf:
    """P(length = k) ∝ k^-alpha on [low, high], by the inverse of its distribution function."""

    alpha: float
    low: int
    high: int

    def draw(self, rng: Rng, num: int) -> Ints:
        weights = np.arange(self.low, self.high + 1, dtype=np.float64) ** -self.alpha
        cdf = np.cumsum(weights)
        index: Ints = np.searchsorted(cdf, rng.random(num) * cdf[-1], side="right").astype(np.int64)
        return self.low + index


@dataclass(frozen=True)
class Mixture:
    """`long` with probability `fraction`, else `short`."""

    short: Length
    long: Length
    fraction: float

    def draw(self, rng: Rng, num: int) -> Ints:
        choose, long, short = rng.spawn(3)  # so that more draws extend fewer
        is_long = choose.random(num) < self.fraction
        return np.where(is_long, self.long.draw(long, num), self.short.draw(short, num))


Length = LogNormal | Fixed | Uniform | Zipf | Mixture


@dataclass(frozen=True)
class Pair:
    prompt: Length
    output: Length
    origin: str


def _presets() -> dict[str, Pair]:
    def fit(mean: float, high: int, *, cv: float | None = None, p50: float | None = None) -> LogNormal:
        return lognormal(mean, cv=cv, p50=p50, high=high)

    ours = "the spread is ours"
    return {
        "burstgpt": Pair(
            fit(642, 16384, cv=1.1), fit(262, 4096, cv=1.0), f"BurstGPT means 642/262 (KunServe §5); {ours}"
        ),
        "sharegpt": Pair(
            fit(1660, 4096, cv=1.0), fit(373, 4096, cv=0.8), f"ShareGPT means 1660/373, max 4K (KunServe §5); {ours}"
        ),
        "longbench": Pair(
            fit(5900, 16384, cv=0.8), fit(499, 4096, cv=0.5), f"LongBench means 5.9K/499, max 16K (KunServe §5); {ours}"
        ),
        "azure_conv": Pair(
            fit(1154.7, 14050, p50=1020), fit(211.1, 1000, p50=129), "lognormal fit to Azure 2023 conv (CC-BY-4.0)"
        ),
        "azure_code": Pair(
            fit(2047.8, 7437, p50=1469), fit(27.9, 1899, p50=13), "lognormal fit to Azure 2023 code (CC-BY-4.0)"
        ),
        "mooncake": Pair(
            fit(12035, 126195, p50=6909),
            fit(342.6, 2000, cv=0.73),
            "lognormal fit to Mooncake conversation (Apache-2.0)",
        ),
        "arxiv": Pair(
            fit(2588, 4054, cv=0.45), fit(291.4, 4056, p50=167), "lognormal fit to arXiv summarisation (Vidur, MIT)"
        ),
        "memserve_sharegpt": Pair(
            fit(775, 2277, p50=628), fit(322, 976, p50=294), "MemServe Fig. 7 ShareGPT mean/p50, clipped at p99"
        ),
        "loogle": Pair(fit(1798, 2742, cv=0.2), fit(24, 74, p50=21), "MemServe Fig. 7 LooGLE mean/p50, clipped at p99"),
        "react": Pair(
            fit(2224, 2861, cv=0.1), fit(164, 453, p50=129), "MemServe Fig. 7 ReAct mean/p50, clipped at p99"
        ),
    }


PRESETS = ("burstgpt", "sharegpt", "longbench", "azure_conv", "azure_code", "mooncake", "arxiv",
           "memserve_sharegpt", "loogle", "react")  # fmt: skip


def resolve(spec: object, prompt_tokens: int, output_tokens: int) -> Pair:
    """The pair of laws that a config's `lengths` names (`trace:PATH` is drawn in `generators`)."""
    if spec == "fixed":
        return Pair(Fixed(prompt_tokens), Fixed(output_tokens), f"fixed {prompt_tokens}/{output_tokens} tokens")
    if isinstance(spec, Mapping):
        if sorted(spec) != ["output", "prompt"]:
            raise ConfigError(f"workload.lengths has keys {sorted(spec)}; it needs exactly prompt and output")
        parts = {key: _parse(f"workload.lengths.{key}", spec[key]) for key in ("prompt", "output")}
        return Pair(parts["prompt"], parts["output"], "lengths from config")
    if isinstance(spec, str) and spec in PRESETS:
        return _presets()[spec]
    known = ", ".join(("fixed", *PRESETS))
    raise ConfigError(f"workload.lengths={spec!r} is unknown; choose {known}, trace:PATH, or a mapping")


_KEYS = {
    "fixed": ("tokens",),
    "uniform": ("min", "max"),
    "loguniform": ("min", "max"),
    "zipf": ("alpha", "min", "max"),
    "lognormal": ("mean", "p50", "cv", "min", "max"),
}


def _parse(key: str, spec: object) -> Length:
    if not isinstance(spec, Mapping) or spec.get("kind") not in _KEYS:
        raise ConfigError(f"{key} needs kind: {' | '.join(_KEYS)}")
    kind = str(spec["kind"])
    values: dict[str, float] = {}
    for name, value in spec.items():
        if name == "kind":
            continue
        if name not in _KEYS[kind]:
            raise ConfigError(f"{key}.{name} is not a key of {kind}; known: {', '.join(_KEYS[kind])}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{key}.{name}={value!r} is not a number greater than 0")
        values[name] = float(value)
    low, high = int(values.get("min", 1)), int(values.get("max", 1 << 20))
    if not low <= high:
        raise ConfigError(f"{key}: min {low} is over max {high}")
    return _make(key, kind, values, low, high)


def _make(key: str, kind: str, values: Mapping[str, float], low: int, high: int) -> Length:
    try:
        if kind == "fixed":
            return Fixed(int(values["tokens"]))
        if kind == "zipf":
            return Zipf(values["alpha"], low, high)
        if kind == "lognormal":
            return lognormal(values["mean"], p50=values.get("p50"), cv=values.get("cv"), low=low, high=high)
    except KeyError as missing:
        raise ConfigError(f"{key}: {kind} needs {missing.args[0]}") from None
    return Uniform(low, high, log=kind == "loguniform")
