"""Generators: their statistics are what their configs say."""

import math

import numpy as np
import pytest

from common.errors import ConfigError
from common.rng import stream
from workloads import Workload, build, from_mapping
from workloads.config import ServeGen
from workloads.content import num_tokens, reusable
from workloads.lengths import PRESETS, LogNormal, Uniform, Zipf, clipped_mean, lognormal, resolve
from workloads.servegen import stationary


def make(kind: str, seed: int = 0, **keys: object) -> Workload:
    return build(from_mapping({"kind": kind} | keys), seed)


def rate_between(workload: Workload, start_s: float, end_s: float) -> float:
    seconds = workload.arrival_ns / 1e9
    return float(np.sum((seconds >= start_s) & (seconds < end_s)) / (end_s - start_s))


def test_poisson_rate_and_burstiness() -> None:
    for cv in (0.5, 1.0, 3.0):
        gaps = np.diff(make("poisson", num_requests=100_000, rate=7.0, cv=cv).arrival_ns) / 1e9
        assert gaps.mean() == pytest.approx(1 / 7, rel=0.03)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_duration_and_count_cut_the_same_arrivals() -> None:
    long = make("poisson", num_requests=None, duration_s=100.0, rate=5.0)
    assert long.num_requests == pytest.approx(500, abs=80) and long.arrival_ns[-1] < 100e9
    assert np.array_equal(make("poisson", num_requests=50, rate=5.0).arrival_ns, long.arrival_ns[:50])
    both = make("poisson", num_requests=20, duration_s=100.0, rate=5.0)
    assert np.array_equal(both.arrival_ns, long.arrival_ns[:20])


def test_transformations_still_fill_the_duration() -> None:
    for keys, rate in (({"rate_scale": 2.5}, 5.0), ({"rate_scale": 0.5}, 1.0), ({"speed": 3.0}, 6.0)):
        trace = make("poisson", num_requests=None, duration_s=1000.0, rate=2.0, **keys)
        assert trace.arrival_ns[-1] / 1e9 == pytest.approx(1000, abs=10)
        assert trace.num_requests == pytest.approx(1000 * rate, rel=0.1)


def test_burst_doubles_the_rate_at_45_s() -> None:
    trace = make("burst", rate=200.0)
    assert rate_between(trace, 0, 45) == pytest.approx(200, rel=0.05)
    assert rate_between(trace, 45, 75) == pytest.approx(400, rel=0.05)
    assert trace.arrival_ns[-1] < 150e9


def test_burst_dwell_times() -> None:
    from workloads.arrivals import burst_phases

    edges, bursts = burst_phases(stream(0, "x"), 45.0, None, (11.0, 14.9, 150.0), 45.0, 400_000.0)
    lengths = np.diff(edges)[bursts == 1]
    assert lengths.mean() == pytest.approx(11, rel=0.05) and 100 < lengths.max() <= 150
    assert np.diff(edges)[bursts == 0].mean() == pytest.approx(45, rel=0.05)
    assert edges[1] == 45.0 and bursts[:2].tolist() == [0, 1]


def test_burst_without_a_duration_makes_the_number_asked_for() -> None:
    for num in (1, 40):
        for multiplier in (0.1, 1.0, 5.0):
            keys = {"num_requests": num, "duration_s": None, "burst_multiplier": multiplier, "cv": 2.0}
            assert make("burst", **keys).num_requests == num


@pytest.mark.parametrize("shape", ["sine", "steps"])
def test_diurnal_swings_around_its_rate(shape: str) -> None:
    trace = make("diurnal", rate=100.0, shape=shape, lengths="fixed", duration_s=1200.0)
    assert rate_between(trace, 0, 1200) == pytest.approx(100, rel=0.03)
    if shape == "sine":
        assert rate_between(trace, 270, 330) / rate_between(trace, 570, 630) == pytest.approx(4, rel=0.15)
    else:
        assert [round(rate_between(trace, t, t + 150) / 100, 1) for t in (0, 150, 300, 450)] == [1.0, 1.6, 0.4, 1.0]
    quiet = make("diurnal", rate=50.0, shape="steps", levels=[1, 0], lengths="fixed", duration_s=600.0)
    assert rate_between(quiet, 300, 600) == 0 and rate_between(quiet, 0, 300) == pytest.approx(100, rel=0.05)


def test_closed_loop() -> None:
    trace = make("closed_loop", concurrency=8, num_requests=20, prompt_tokens=1024, output_tokens=128)
    assert trace.concurrency == 8 and set(trace.arrival_ns.tolist()) == {-1}
    assert set(trace.prompt_tokens.tolist()) == {1024} and set(trace.output_tokens.tolist()) == {128}
    assert trace.release_after is None
    assert make("closed_loop", lengths="sharegpt").prompt_tokens.std() > 100


@pytest.mark.parametrize(
    ("preset", "prompt", "output", "longest"),
    [("burstgpt", 642, 262, 16384), ("sharegpt", 1660, 373, 4096), ("longbench", 5900, 499, 16384),
     ("azure_conv", 1154.7, 211.1, 14050), ("azure_code", 2047.8, 27.9, 7437), ("loogle", 1798, 24, 2742)],
)  # fmt: skip
def test_presets_have_the_published_means(preset: str, prompt: float, output: float, longest: int) -> None:
    trace = make("poisson", num_requests=100_000, lengths=preset)
    assert trace.prompt_tokens.mean() == pytest.approx(prompt, rel=0.02)
    assert trace.output_tokens.mean() == pytest.approx(output, rel=0.03)
    assert trace.prompt_tokens.min() >= 1 and trace.prompt_tokens.max() <= longest


def test_every_preset_resolves() -> None:
    for name in PRESETS:
        assert resolve(name, 1, 1).origin


def test_lognormal_meets_its_mean_after_clipping() -> None:
    law = lognormal(1660, cv=1.0, high=4096)
    assert clipped_mean(law.mu, law.sigma, 1, 4096) == pytest.approx(1660, rel=1e-9)
    by_median = lognormal(775, p50=628, high=4096)
    assert math.exp(by_median.mu) == pytest.approx(628)
    draws = LogNormal(by_median.mu, by_median.sigma, 1, 4096).draw(stream(0, "x"), 200_000)
    assert draws.mean() == pytest.approx(775, rel=0.01) and np.median(draws) == pytest.approx(628, rel=0.02)


def test_uniform_and_zipf() -> None:
    rng = stream(0, "x")
    flat = Uniform(3, 7).draw(rng, 10_000)
    assert np.bincount(flat)[3:].tolist() == pytest.approx([2000] * 5, rel=0.1)
    spread = Uniform(10, 100_000, log=True).draw(rng, 10_000)
    assert spread.min() >= 10 and spread.max() <= 100_000 and np.median(spread) == pytest.approx(1000, rel=0.1)
    zipf = Zipf(1.0, 1, 4).draw(rng, 12_000)
    assert (np.bincount(zipf)[1:] / 12_000).tolist() == pytest.approx([0.48, 0.24, 0.16, 0.12], rel=0.1)


def test_length_laws_from_config() -> None:
    lengths = {
        "prompt": {"kind": "loguniform", "min": 10, "max": 1000},
        "output": {"kind": "lognormal", "mean": 50, "cv": 1},
    }
    trace = make("poisson", num_requests=20_000, lengths=lengths)
    assert trace.prompt_tokens.min() >= 10 and trace.prompt_tokens.max() <= 1000
    assert trace.output_tokens.mean() == pytest.approx(50, rel=0.05)


def test_lengths_drawn_jointly_from_a_trace(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt_tokens,output_tokens\n100,1\n200,2\n0,5\n")
    trace = make("poisson", lengths=f"trace:{path}", num_requests=500)
    assert sorted(set(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist()))) == [(100, 1), (200, 2)]


def test_long_context_ranges() -> None:
    spreads, largest = [], []
    for index in range(9):
        prompt = make("long_context", trace=index, num_requests=20_000).prompt_tokens
        spreads.append(prompt.std())
        largest.append(prompt.max())
    assert spreads[0] < spreads[1] < spreads[2] and max(largest[:3]) <= 60_000
    assert largest[3:] == sorted(largest[3:])
    assert largest[3] == pytest.approx(200_000, rel=0.02) and largest[8] == pytest.approx(2_000_000, rel=0.02)
    assert make("long_context", trace=8, max_context=5000).prompt_tokens.max() <= 5000


def test_shared_prefix_reuses_documents() -> None:
    trace = make("shared_prefix", num_requests=500, num_documents=100, system_tokens=64)
    assert trace.content is not None
    assert {pieces[0] for pieces in trace.content} == {("system", 0, 64)}
    documents = [pieces[1][0] for pieces in trace.content]
    assert sorted(documents.count(name) for name in set(documents)) == [5] * 100
    share = sum(reusable(trace.content, trace.output_tokens, np.arange(500))) / trace.prompt_tokens.sum()
    assert 0.7 < share < 0.85
    popular = make("shared_prefix", num_requests=500, zipf_alpha=1.2).content or ()
    assert sum(pieces[0][0] == "doc:0" for pieces in popular) > 80


def test_sessions_have_the_published_statistics() -> None:
    """MemServe Fig. 7, ShareGPT: prompts 775/628/2277, replies 322/294, 32 % first turns, 0.37 shared with a prompt."""
    trace = make("sessions", num_requests=20_000)
    assert trace.release_after is not None
    assert trace.prompt_tokens.mean() == pytest.approx(775, rel=0.05)
    assert np.percentile(trace.prompt_tokens, 50) == pytest.approx(628, rel=0.05)
    assert np.percentile(trace.prompt_tokens, 99) == pytest.approx(2277, rel=0.05)
    assert trace.output_tokens.mean() == pytest.approx(322, rel=0.03)
    before = trace.release_after
    assert np.mean(before < 0) == pytest.approx(0.32, abs=0.02)
    shared = np.where(before >= 0, trace.prompt_tokens[before] / trace.prompt_tokens, 0)
    assert shared.mean() == pytest.approx(0.37, abs=0.03)


def test_sessions_end_and_start_as_asked() -> None:
    single = make("sessions", turns_mean=1.0, num_requests=50)
    assert single.release_after is not None and set(single.release_after.tolist()) == {-1}
    timed = make("sessions", num_requests=None, duration_s=60.0, rate=2.0)
    assert 60 < np.sum(timed.arrival_ns >= 0) < 180 and timed.arrival_ns.max() < 60e9
    steady = make("sessions", think_cv=0.0, think_mean_s=2.5)
    assert steady.think_ns is not None and set(steady.think_ns.tolist()) == {0, 2_500_000_000}
    shared = make("sessions", system_tokens=100, system_prompts=2, num_requests=200).content or ()
    assert {pieces[0] for pieces in shared} == {("system:0", 0, 100), ("system:1", 0, 100)}


@pytest.mark.parametrize("law", ["", "Gamma", "Weibull"])
def test_servegen_renewals_are_stationary(law: str) -> None:
    """The expected count is the measured rate even when bursty windows hold few requests."""
    rng = stream(0, law)
    counts = [len(stationary(rng, law, 0.3 if law else 1.0, 5.0)) for _ in range(4000)]
    assert np.mean(counts) == pytest.approx(5.0, abs=0.4)


def test_servegen_archive(tmp_path) -> None:
    import io
    import tarfile

    path = tmp_path / "clients.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for client, rate in ((3, 4.0), (12, 1.0)):
            text = f"0,0,0,,,\n600,{rate},1.5,Gamma,0.444,1.0\n1200,{rate},1,Weibull,1.0,1.0\n"
            member = tarfile.TarInfo(f"language/m-mid/chunk-{client}-trace.csv")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    keys = {"path": str(path), "pool": "m-mid", "start_s": 600.0, "duration_s": 1200.0}
    measured = make("servegen", **keys, rate=None)
    assert measured.num_requests == pytest.approx(6000, rel=0.1) and measured.arrival_ns.max() < 1200e9
    scaled = make("servegen", **keys, rate=1.0)
    assert scaled.num_requests == pytest.approx(1200, rel=0.15)
    busiest = make("servegen", **keys, rate=None, max_clients=1)
    assert 4000 < busiest.num_requests < 5600
    assert set(busiest.arrival_ns.tolist()) < set(measured.arrival_ns.tolist())
    from common.errors import ConfigError, TraceError

    with pytest.raises(TraceError, match=r"no pool 'm-tiny'; workload.pool may be: m-mid"):
        make("servegen", **keys | {"pool": "m-tiny"})
    with pytest.raises(ConfigError, match="requests are expected"):
        make("servegen", **keys, rate=1e9)
    with pytest.raises(ConfigError, match="no client of m-mid is active then"):
        make("servegen", **keys | {"start_s": 0.0, "duration_s": 600.0})
    with pytest.raises(TraceError, match="replay it with workload=servegen"):
        make("file", path=str(path))
    assert ServeGen().kind == "servegen"


def test_mix_replaces_bodies_only() -> None:
    plain = make("poisson", num_requests=2000)
    mixed = make(
        "poisson", num_requests=2000, mix={"weight": 0.25, "workload": {"kind": "shared_prefix", "num_documents": 3}}
    )
    assert np.array_equal(plain.arrival_ns, mixed.arrival_ns)
    changed = plain.prompt_tokens != mixed.prompt_tokens
    assert changed.mean() == pytest.approx(0.25, abs=0.04)
    assert mixed.content is not None
    assert [num_tokens(pieces) for pieces in mixed.content] == mixed.prompt_tokens.tolist()
    assert {pieces[0][0] for pieces, new in zip(mixed.content, changed) if new} == {f"mix:doc:{i}" for i in range(3)}


def test_a_million_requests_are_quick_and_compact() -> None:
    trace = make("poisson", num_requests=1_000_000)
    assert trace.arrival_ns.nbytes + trace.prompt_tokens.nbytes + trace.output_tokens.nbytes == 24_000_000
    assert trace.content is None


def test_extreme_scales_are_a_line_or_a_workload() -> None:
    with pytest.raises(ConfigError, match=r"workload\.speed=1e-300: arrivals reach beyond"):
        build(from_mapping({"kind": "poisson", "num_requests": 5, "speed": 1e-300}), 0)
    at_once = build(from_mapping({"kind": "poisson", "num_requests": 3000, "rate_scale": 1e6}), 0)
    assert len(set(at_once.arrival_ns.tolist())) == 1  # as many copies of the first timestamp as there are requests
