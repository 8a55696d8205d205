"""What can be done to any workload: window, mix, rate scaling, speed, length scaling, limits. Pure functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, TraceError
from common.rng import stream
from workloads.arrivals import MAX_SECONDS, NS
from workloads.config import Common
from workloads.content import cut, num_tokens, renumber_replies, scale, unique
from workloads.types import Ints, Workload, add_counts

Mask = NDArray[np.bool_]
ABSURD_TOKENS = 10_000_000  # no context is longer; what an unset `max_prompt_tokens` stands for


def horizon_s(config: Common) -> float | None:
    """How long to generate so that, after `speed` and `rate_scale`, `duration_s` is filled."""
    if config.duration_s is None:
        return None
    upscale = 1.1 * config.rate_scale if config.rate_scale > 1.0 else 1.0  # its rounding is random: a margin
    end = config.duration_s * config.speed * upscale
    return end if config.window_s is None else max(end, config.window_s[1])


def take(workload: Workload, keep: Mask) -> Workload:
    """The requests of `keep`, renumbered; turns that waited for a dropped request go with it (counted)."""
    alive = _with_ancestors(workload, keep)
    if bool(alive.all()):
        return workload
    new_index = np.cumsum(alive) - 1
    release, content = workload.release_after, workload.content
    if release is not None:
        kept = release[alive]
        release = np.where(kept >= 0, new_index[kept], -1)
    if content is not None:
        content = tuple(piece for piece, wanted in zip(content, alive, strict=True) if wanted)
        if release is not None:
            content = tuple(renumber_replies(pieces, new_index) for pieces in content)
    return replace(
        workload,
        arrival_ns=workload.arrival_ns[alive],
        prompt_tokens=workload.prompt_tokens[alive],
        output_tokens=workload.output_tokens[alive],
        content=content,
        session=None if workload.session is None else workload.session[alive],
        release_after=release,
        think_ns=None if workload.think_ns is None else workload.think_ns[alive],
        counts=add_counts(workload.counts, dropped_turns=int(keep.sum() - alive.sum())),
    )


def _with_ancestors(workload: Workload, keep: Mask) -> Mask:
    if workload.release_after is None:
        return keep
    alive = keep.copy()
    release = workload.release_after.tolist()
    for index in np.flatnonzero(workload.release_after >= 0).tolist():
        alive[index] &= alive[release[index]]
    return alive


def roots(workload: Workload) -> Ints:
    """Indices of the requests that arrive by time, in order of arrival."""
    index = np.flatnonzero(workload.arrival_ns >= 0)
    return index[np.argsort(workload.arrival_ns[index], kind="stable")]


def window(workload: Workload, start_s: float, end_s: float) -> Workload:
    """Requests arriving in [start, end), with time starting at `start`; later turns follow their first."""
    start, end = round(start_s * NS), round(end_s * NS)
    timed = workload.arrival_ns >= 0
    inside = (workload.arrival_ns >= start) & (workload.arrival_ns < end)
    cropped = _quiet_take(workload, inside | ~timed)
    moved = np.where(cropped.arrival_ns >= 0, cropped.arrival_ns - start, -1)
    return replace(cropped, arrival_ns=moved)


def first(workload: Workload, num: int) -> Workload:
    return _quiet_take(workload, np.arange(workload.num_requests) < num)


def _quiet_take(workload: Workload, keep: Mask) -> Workload:
    """As `take`, where leaving out is what was asked for, so nothing is counted."""
    return replace(take(workload, keep), counts=workload.counts)


def upscale_times(times: Ints, factor: float, rng: np.random.Generator) -> Ints:
    """TraceUpscaler: each timestamp ⌊f⌋ times, once more with probability frac(f); at most as many as before."""
    whole = int(factor)
    copies = whole + (rng.random(len(times)) < factor - whole)
    used = -(-len(times) // whole) if whole else len(times)  # the timestamps whose copies are enough
    return np.repeat(times[:used], np.minimum(copies[:used], len(times)))[: len(times)]


def rate_scale(workload: Workload, factor: float, seed: int) -> Workload:
    """Bodies keep their order and get the upscaled timestamps; sessions move as a whole."""
    order = roots(workload)
    times = upscale_times(workload.arrival_ns[order], factor, stream(seed, "workload.upscale"))
    arrival = workload.arrival_ns.copy()
    arrival[order[: len(times)]] = times
    keep = np.ones(workload.num_requests, bool)
    keep[order[len(times) :]] = False
    return _quiet_take(replace(workload, arrival_ns=arrival), keep)


def speed(workload: Workload, factor: float) -> Workload:
    """Replay the schedule `factor` times as fast; think times are people's and stay."""
    timed = workload.arrival_ns >= 0
    if timed.any() and float(workload.arrival_ns.max()) / factor >= MAX_SECONDS * NS:
        raise ConfigError(f"workload.speed={factor:g}: arrivals reach beyond {MAX_SECONDS:.0e} s")
    faster = np.where(timed, np.rint(workload.arrival_ns / factor).astype(np.int64), -1)
    return replace(workload, arrival_ns=faster)


def length_scale(workload: Workload, factor: float) -> Workload:
    """Prompts, their shared prefixes and outputs `factor` times as long (sessions do this turn by turn)."""
    prompt, output = scale_tokens(workload.prompt_tokens, factor), scale_tokens(workload.output_tokens, factor)
    content = workload.content
    if content is not None:
        content = tuple(scale(pieces, factor) for pieces in content)
        prompt = np.array([num_tokens(pieces) for pieces in content], np.int64)
    return replace(workload, prompt_tokens=prompt, output_tokens=output, content=content)


def scale_tokens(tokens: Ints, factor: float) -> Ints:
    """Rounded; what was not empty keeps at least one token."""
    return np.where(tokens > 0, np.maximum(1, np.rint(tokens * factor)), 0).astype(np.int64)


def mix(workload: Workload, other: Workload, weight: float, seed: int) -> Workload:
    """Each request takes, with probability `weight`, the next body of `other`; arrivals stay."""
    if workload.release_after is not None or other.release_after is not None:
        raise ConfigError("workload.mix needs requests that do not wait for one another; sessions cannot be mixed")
    chosen = np.flatnonzero(stream(seed, "workload.mix").random(workload.num_requests) < weight)
    if len(chosen) > other.num_requests:
        raise ConfigError(
            f"workload.mix.workload has {other.num_requests} requests but {len(chosen)} are needed; "
            "raise its num_requests or lower workload.mix.weight"
        )
    prompt, output = workload.prompt_tokens.copy(), workload.output_tokens.copy()
    prompt[chosen] = other.prompt_tokens[: len(chosen)]
    output[chosen] = other.output_tokens[: len(chosen)]
    content = workload.content
    if content is not None or other.content is not None:
        mine = list(content or unique(workload.prompt_tokens))
        theirs = other.content or unique(other.prompt_tokens)
        for index, body in zip(chosen.tolist(), theirs, strict=False):
            mine[index] = tuple((f"mix:{source}", start, length) for source, start, length in body)
        content = tuple(mine)
    why = f"{workload.provenance}; mixed with {weight:g} of: {other.provenance}"
    return replace(workload, prompt_tokens=prompt, output_tokens=output, content=content, session=None, provenance=why)


def limit(workload: Workload, config: Common) -> Workload:
    """Apply the policies for empty and overlong requests, and stop outputs where the server would."""
    workload = _limit_zero(workload, config)
    workload = _limit_prompts(workload, config)
    over = workload.output_tokens > config.max_output_tokens
    return replace(
        workload,
        output_tokens=np.minimum(workload.output_tokens, config.max_output_tokens),
        counts=add_counts(workload.counts, clipped_output=int(over.sum())),
    )


def _limit_zero(workload: Workload, config: Common) -> Workload:
    empty = (workload.prompt_tokens == 0) | (workload.output_tokens == 0)
    if not empty.any():
        return workload
    if config.zero_tokens == "error":
        raise TraceError(zero_message(f"{workload.name}: request {int(np.argmax(empty))}"))
    if config.zero_tokens == "reject":
        return _reject(workload, empty, "rejected_zero")
    content = workload.content
    if content is not None:
        content = tuple(pieces or ((f"u:{i}", 0, 1),) for i, pieces in enumerate(content))
    return replace(
        workload,
        prompt_tokens=np.maximum(workload.prompt_tokens, 1),
        output_tokens=np.maximum(workload.output_tokens, 1),
        content=content,
        counts=add_counts(workload.counts, clipped_zero=int(empty.sum())),
    )


def zero_message(where: str) -> str:
    return f"{where} has no prompt or no output tokens; set workload.zero_tokens=reject or clip"


def overlong_message(where: str, tokens: int, limit_tokens: int) -> str:
    return (
        f"{where} has {tokens} prompt tokens, more than {limit_tokens}; "
        "set workload.overlong=reject or clip, or raise workload.max_prompt_tokens"
    )


def _limit_prompts(workload: Workload, config: Common) -> Workload:
    most = config.max_prompt_tokens or ABSURD_TOKENS
    over = workload.prompt_tokens > most
    if not over.any():
        return workload
    if config.overlong == "error":
        row = int(np.argmax(over))
        where = f"{workload.name}: request {row}"
        raise TraceError(overlong_message(where, int(workload.prompt_tokens[row]), most))
    if config.overlong == "reject":
        return _reject(workload, over, "rejected_overlong")
    content = workload.content
    if content is not None:
        content = tuple(cut(p, most) if o else p for p, o in zip(content, over.tolist(), strict=True))
    return replace(
        workload,
        prompt_tokens=np.minimum(workload.prompt_tokens, most),
        content=content,
        counts=add_counts(workload.counts, clipped_overlong=int(over.sum())),
    )


def _reject(workload: Workload, bad: Mask, reason: str) -> Workload:
    counted = add_counts(workload.counts, **{reason: int(bad.sum())})
    return take(replace(workload, counts=counted), ~bad)


def jitter(times: Ints, spread_s: float, seed: int) -> Ints:
    """Quantised timestamps spread forward by up to `spread_s`; bodies keep their order, times are sorted."""
    shift = stream(seed, "workload.jitter").random(len(times)) * spread_s
    spread: Ints = times + np.rint(shift * NS).astype(np.int64)
    return np.sort(spread)
