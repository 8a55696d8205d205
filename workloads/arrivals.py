"""Arrival times in integer nanoseconds.

Every process is a unit-rate renewal process (Exponential or Gamma gaps) carried through the inverse of the integrated
rate, so a rate change moves arrivals without drawing others, and longer runs extend shorter ones.
"""

from __future__ import annotations

import math

import numpy as np

from common.errors import ConfigError
from workloads.types import Floats, Ints

NS = 1_000_000_000
MAX_SECONDS = 1e9  # thirty years, far inside 64-bit nanoseconds
MAX_REQUESTS = 50_000_000
MAX_PHASES = 20_000_000
Rng = np.random.Generator


def unit_gaps(rng: Rng, num: int, cv: float) -> Floats:
    """Gaps of mean 1 and the given coefficient of variation."""
    if cv == 1.0:
        return rng.standard_exponential(num)
    shape = 1.0 / (cv * cv)
    return rng.standard_gamma(shape, num) / shape


def unit_times(rng: Rng, cv: float, num: int | None, total: float) -> Floats:
    """The first `num` points of a unit-rate renewal process, or (None) those before `total`, or both."""
    check_count(total, num)
    if num is not None and math.isinf(total):
        return np.cumsum(unit_gaps(rng, num, cv))
    parts: list[Floats] = []
    last, count = 0.0, 0
    while last < total and (num is None or count < num):
        size = int(total - last + 4.0 * cv * math.sqrt(total)) + 16
        size = size if num is None else min(size, num - count)
        points = last + np.cumsum(unit_gaps(rng, size, cv))
        parts.append(points)
        last, count = float(points[-1]), count + size
    times = np.concatenate(parts) if parts else np.empty(0)
    times = times[: np.searchsorted(times, total)]
    return times if num is None else times[:num]


def check_count(expected: float, num: int | None) -> None:
    """As many requests as one run replays."""
    expected = expected if num is None else min(float(num), expected)
    if expected > MAX_REQUESTS:
        raise ConfigError(
            f"workload: {expected:.3g} requests are expected of this rate, duration and num_requests; "
            f"at most {MAX_REQUESTS:,} are replayed in one run"
        )


def check_extent(end_s: float, rate: float, num: int | None, phase_s: float) -> None:
    """Before phases of about `phase_s` are laid out until `end_s`: that they can be, and what arrives in them."""
    if not end_s < MAX_SECONDS:
        raise ConfigError(f"workload: arrivals reach beyond {MAX_SECONDS:.0e} s; lower duration_s or num_requests, "
                          "or raise the rate")  # fmt: skip
    check_count(end_s * rate, num)
    if end_s / phase_s > MAX_PHASES:
        raise ConfigError(f"workload: the rate changes {end_s / phase_s:.3g} times until {end_s:.3g} s; at most "
                          f"{MAX_PHASES:,} times are possible: lower duration_s or num_requests")  # fmt: skip


def to_ns(seconds: Floats) -> Ints:
    if len(seconds) and not float(seconds.max()) < MAX_SECONDS:
        raise ConfigError(f"workload: arrivals reach beyond {MAX_SECONDS:.0e} s; raise the rate, or lower num_requests")
    return np.rint(seconds * NS).astype(np.int64)


def constant(rng: Rng, rate: float, cv: float, num: int | None, duration_s: float | None) -> Ints:
    total = math.inf if duration_s is None else duration_s * rate
    return to_ns(unit_times(rng, cv, num, total) / rate)


def piecewise(rng: Rng, edges_s: Floats, rates: Floats, cv: float, num: int | None, duration_s: float | None) -> Ints:
    """`rates[i]` holds from `edges_s[i]` to `edges_s[i + 1]`; the last edge bounds what can arrive."""
    area = np.concatenate(([0.0], np.cumsum(np.diff(edges_s) * rates)))
    end = edges_s[-1] if duration_s is None else min(duration_s, float(edges_s[-1]))
    total = float(np.interp(end, edges_s, area))
    points = unit_times(rng, cv, num, total)
    # Where the rate is zero the area is flat: interpolate on its strictly rising corners only.
    index = np.searchsorted(area, points, side="right") - 1
    index = np.minimum(index, len(rates) - 1)
    return to_ns(edges_s[index] + (points - area[index]) / rates[index])


def burst_phases(
    rng: Rng,
    first_s: float,
    first_dwell_s: float | None,
    dwell: tuple[float, float, float],
    quiet_s: float,
    end_s: float,
) -> tuple[Floats, Ints]:
    """Edges of alternating quiet and burst phases until `end_s`, and 1 for each phase that is a burst.

    Bursts last lognormally (mean, standard deviation, cap), quiet phases exponentially.
    """
    mean, std, cap = dwell
    sigma = math.sqrt(math.log1p((std / mean) ** 2))
    edges, bursts = [0.0], []
    if first_s > 0:
        edges.append(first_s)
        bursts.append(0)
    while edges[-1] < end_s:
        drawn = min(cap, float(rng.lognormal(math.log(mean) - sigma * sigma / 2, sigma)))
        dwell_s = drawn if first_dwell_s is None or any(bursts) else first_dwell_s
        edges.append(edges[-1] + dwell_s)
        bursts.append(1)
        edges.append(edges[-1] + max(1e-3, quiet_s * float(rng.standard_exponential())))
        bursts.append(0)
    return np.array(edges), np.array(bursts, np.int64)


def enough_s(num: int, rate: float, cv: float) -> float:
    """A time by which a process of at least this rate has certainly made `num` arrivals."""
    return (num + 10.0 * cv * math.sqrt(num) + 40.0 * cv * cv + 20.0) / rate
