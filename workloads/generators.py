"""The synthetic workloads: an arrival process and a source of bodies, each from streams of its own."""

from __future__ import annotations

import math

import numpy as np

from common.errors import ConfigError
from common.rng import stream
from workloads import arrivals
from workloads.config import Burst, ClosedLoop, Diurnal, Lengthy, LongContext, Poisson, SharedPrefix
from workloads.lengths import LogNormal, Mixture, Pair, Uniform, lognormal, resolve
from workloads.readers import read_lengths
from workloads.transform import horizon_s
from workloads.types import Content, Floats, Ints, Workload, no_counts, plain

STEP_S = 1.0  # resolution of a sine


def draw_pair(pair: Pair, num: int, seed: int) -> tuple[Ints, Ints]:
    prompt = pair.prompt.draw(stream(seed, "workload.lengths.prompt"), num)
    return prompt, pair.output.draw(stream(seed, "workload.lengths.output"), num)


def draw_lengths(config: Lengthy, num: int, seed: int) -> tuple[Ints, Ints, str]:
    """From a distribution, or jointly (with replacement) from the rows of a trace: `lengths: trace:PATH`."""
    if isinstance(config.lengths, str) and config.lengths.startswith("trace:"):
        path = config.lengths.removeprefix("trace:")
        prompt, output = read_lengths(path)
        row = stream(seed, "workload.lengths.rows").integers(len(prompt), size=num)
        return prompt[row], output[row], f"lengths drawn from the rows of {path}"
    pair = resolve(config.lengths, config.prompt_tokens, config.output_tokens)
    return (*draw_pair(pair, num, seed), pair.origin)


def _with_lengths(config: Lengthy, arrival_ns: Ints, seed: int, why: str) -> Workload:
    prompt, output, origin = draw_lengths(config, len(arrival_ns), seed)
    return plain(config.kind, arrival_ns, prompt, output, config.max_output_tokens, f"{why}; {origin}")


def _steady(config: Poisson | LongContext | SharedPrefix, seed: int, num: int | None) -> Ints:
    return arrivals.constant(stream(seed, "workload.arrivals"), config.rate, config.cv, num, horizon_s(config))


def poisson(config: Poisson, seed: int) -> Workload:
    times = _steady(config, seed, config.num_requests)
    law = "Poisson" if config.cv == 1.0 else f"Gamma renewal (CV {config.cv:g})"
    return _with_lengths(config, times, seed, f"{law} arrivals at {config.rate:g}/s")


def closed_loop(config: ClosedLoop, seed: int) -> Workload:
    assert config.num_requests is not None
    prompt, output, origin = draw_lengths(config, config.num_requests, seed)
    arrival = np.full(config.num_requests, -1, np.int64)
    why = f"{config.concurrency} requests outstanding; {origin}"
    return Workload(
        config.kind, arrival, prompt, output, None, None, None, None, config.concurrency, no_counts(),
        config.max_output_tokens, why,
    )  # fmt: skip


def _end_s(end_s: float | None, num: int | None, enough_s: float) -> float:
    """Until when phases are laid out: no further than the last request that is asked for."""
    if end_s is None:
        return enough_s
    return end_s if num is None else min(end_s, enough_s)


def burst(config: Burst, seed: int) -> Workload:
    lowest = config.rate * min(1.0, config.burst_multiplier)
    end = horizon_s(config)
    end_s = _end_s(end, config.num_requests, arrivals.enough_s(config.num_requests or 0, lowest, config.cv))
    dwell = (config.dwell_mean_s, config.dwell_std_s, config.dwell_max_s)
    arrivals.check_extent(end_s, config.rate, config.num_requests, config.dwell_mean_s + max(1e-3, config.quiet_mean_s))
    edges, bursts = arrivals.burst_phases(
        stream(seed, "workload.phases"), config.first_burst_s, config.first_dwell_s, dwell, config.quiet_mean_s, end_s
    )
    rates = config.rate * np.where(bursts == 1, config.burst_multiplier, 1.0)
    rng = stream(seed, "workload.arrivals")
    times = arrivals.piecewise(rng, edges, rates, config.cv, config.num_requests, end)
    why = f"{config.rate:g}/s, ×{config.burst_multiplier:g} in bursts from {config.first_burst_s:g} s (KunServe §5)"
    return _with_lengths(config, times, seed, why)


def diurnal_rates(config: Diurnal, end_s: float) -> tuple[Floats, Floats]:
    """Edges and rates; both shapes have mean `rate` over a period."""
    if config.shape == "steps":
        levels: Floats = np.array(config.levels) / float(np.mean(config.levels))
        step = config.period_s / len(levels)
        count = math.ceil(end_s / step)
        stepped = np.arange(count + 1, dtype=np.float64) * step
        return stepped, config.rate * np.resize(levels, count)
    edges = np.arange(math.ceil(end_s / STEP_S) + 1, dtype=np.float64) * STEP_S
    middle = edges[:-1] + STEP_S / 2
    swing = (config.peak_to_trough - 1) / (config.peak_to_trough + 1)
    rates: Floats = config.rate * (1 - swing * np.cos(2 * math.pi * middle / config.period_s))
    return edges, rates


def diurnal(config: Diurnal, seed: int) -> Workload:
    end = horizon_s(config)
    need_s = 2 * config.period_s + 2 * arrivals.enough_s(config.num_requests or 0, config.rate, config.cv)
    end_s = _end_s(end, config.num_requests, need_s)
    step_s = config.period_s / len(config.levels) if config.shape == "steps" else STEP_S
    arrivals.check_extent(end_s, config.rate, config.num_requests, step_s)
    edges, rates = diurnal_rates(config, end_s)
    rng = stream(seed, "workload.arrivals")
    times = arrivals.piecewise(rng, edges, rates, config.cv, config.num_requests, end)
    why = f"load swings around {config.rate:g}/s every {config.period_s:g} s ({config.shape})"
    return _with_lengths(config, times, seed, why)


# Infinite-LLM's nine traces. Ranges of 0-2, 3 and 8 are the paper's; 4-7 are spaced geometrically and every
# distribution is ours: (largest prompt, mean, coefficient of variation) and (largest, fraction of long ones).
SPREAD_MIXES = ((60_000, 6_000, 0.3), (60_000, 6_000, 1.0), (60_000, 6_000, 2.0))
RANGE_MIXES = tuple((largest, 0.05) for largest in (200_000, 320_000, 500_000, 800_000, 1_260_000, 2_000_000))


def _context_above(tokens: int, config: LongContext) -> int | None:
    if config.max_context is not None and config.max_context <= tokens:
        raise ConfigError(f"workload.max_context={config.max_context}: prompts of mix {config.trace} need more than "
                          f"{tokens:,}")  # fmt: skip
    return config.max_context


def long_context_prompt(config: LongContext) -> LogNormal | Mixture:
    if config.trace < 3:
        largest, mean, cv = SPREAD_MIXES[config.trace]
        return lognormal(mean, cv=cv, low=1000, high=_context_above(mean, config) or largest)
    largest, fraction = RANGE_MIXES[config.trace - 3]
    high = _context_above(1, config) or largest
    short = lognormal(min(2_000, high / 2), cv=1.5, high=min(10_000, high))
    share = fraction if config.long_fraction is None else config.long_fraction
    return Mixture(short, Uniform(min(10_000, high), high, log=True), share)


def long_context(config: LongContext, seed: int) -> Workload:
    times = _steady(config, seed, config.num_requests)
    pair = Pair(long_context_prompt(config), lognormal(373, cv=0.8, high=4096), "")
    prompt, output = draw_pair(pair, len(times), seed)
    why = f"Infinite-LLM trace {config.trace}: range of the paper (4-7 interpolated), distribution ours"
    return plain(config.kind, times, prompt, output, config.max_output_tokens, why)


def shared_prefix(config: SharedPrefix, seed: int) -> Workload:
    times = _steady(config, seed, config.num_requests)
    num = len(times)
    which = _documents(config, num, seed)
    sizes = lognormal(config.document_mean, p50=config.document_p50, high=config.document_max).draw(
        stream(seed, "workload.lengths.documents"), config.num_documents
    )
    question = lognormal(config.question_mean, p50=config.question_p50, high=4096)
    output = lognormal(config.output_mean, p50=config.output_p50, high=4096)
    asked, answered = draw_pair(Pair(question, output, ""), num, seed)
    system: Content = (("system", 0, config.system_tokens),) if config.system_tokens else ()
    documents = [(f"doc:{index}", 0, size) for index, size in enumerate(sizes.tolist())]
    content = tuple(
        (*system, documents[doc], (f"q:{index}", 0, size))
        for index, (doc, size) in enumerate(zip(which.tolist(), asked.tolist(), strict=True))
    )
    prompt = config.system_tokens + sizes[which] + asked
    why = "documents × questions: means and medians after MemServe Fig. 7 (LooGLE), popularity ours"
    return Workload(
        config.kind, times, prompt, answered, content, None, None, None, None, no_counts(),
        config.max_output_tokens, why,
    )  # fmt: skip


def _documents(config: SharedPrefix, num: int, seed: int) -> Ints:
    """The document of each request: all equally often in shuffled order, or by Zipf popularity."""
    rng = stream(seed, "workload.content")
    if config.zipf_alpha is None:
        shuffled: Ints = rng.permutation(np.arange(num) % config.num_documents)
        return shuffled
    weights = np.cumsum(np.arange(1, config.num_documents + 1, dtype=np.float64) ** -config.zipf_alpha)
    popular: Ints = np.searchsorted(weights, rng.random(num) * weights[-1], side="right").astype(np.int64)
    return popular
