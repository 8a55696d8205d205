"""Laws of workloads: the upscaling rule, transformations, content, causality, independent streams, reproducibility."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.rng import stream
from workloads import Workload, build, from_mapping
from workloads.content import cut, from_hashes, num_tokens, reusable, scale
from workloads.transform import rate_scale, upscale_times, window
from workloads.types import plain

ROOT = Path(__file__).resolve().parents[2]
SEEDS = st.integers(0, 2**32)


def make(kind: str, seed: int = 0, **keys: object) -> Workload:
    return build(from_mapping({"kind": kind} | keys), seed)


def tokens(content: tuple[tuple[str, int, int], ...]) -> list[tuple[str, int]]:
    return [(source, at) for source, start, length in content for at in range(start, start + length)]


def open_loop(gaps: list[int]) -> Workload:
    times = np.cumsum(np.array(gaps, np.int64))
    body = np.arange(1, len(gaps) + 1, dtype=np.int64)
    return plain("x", times, body, body * 10, 1 << 40, "")


GAPS = st.lists(st.integers(1, 10**10), min_size=1, max_size=60)


@given(GAPS, st.floats(0.05, 5.0), SEEDS)
def test_upscaling_replicates_timestamps(gaps: list[int], factor: float, seed: int) -> None:
    """Each timestamp ⌊f⌋ or ⌊f⌋ + 1 times, in order, at most as many as before; the cut falls on the last ones."""
    times = np.cumsum(np.array(gaps, np.int64))
    scaled = upscale_times(times, factor, stream(seed, "x"))
    assert len(scaled) <= len(times) and np.all(np.diff(scaled) >= 0)
    copies = [int(np.sum(scaled == time)) for time in times]
    assert sum(copies) == len(scaled)
    last = int(np.searchsorted(times, scaled[-1])) if len(scaled) else 0
    allowed = {int(factor), int(factor) + 1}
    if len(scaled) == len(times):  # cut: the last timestamp may have lost copies
        assert set(copies[:last]) <= allowed and copies[last] <= int(factor) + 1 and not any(copies[last + 1 :])
    else:
        assert set(copies) <= allowed


@given(GAPS, st.floats(0.05, 5.0), SEEDS)
def test_upscaling_keeps_bodies_in_order(gaps: list[int], factor: float, seed: int) -> None:
    before = open_loop(gaps)
    after = rate_scale(before, factor, seed)
    assert after.prompt_tokens.tolist() == before.prompt_tokens[: after.num_requests].tolist()
    assert after.output_tokens.tolist() == (after.prompt_tokens * 10).tolist()
    assert np.array_equal(rate_scale(before, 1.0, seed).arrival_ns, before.arrival_ns)


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_upscaling_scales_the_rate(seed: int) -> None:
    before = make("poisson", seed, num_requests=4000, rate=2.0)
    for factor in (0.5, 1.7, 3.0):
        times = rate_scale(before, factor, seed).arrival_ns
        assert abs(len(times) / (times[-1] / 1e9) / (2.0 * factor) - 1) < 0.2


@given(GAPS, st.integers(0, 100), st.integers(1, 100))
def test_window_keeps_exactly_what_arrives_in_it(gaps: list[int], start: int, length: int) -> None:
    before = open_loop(gaps)
    after = window(before, float(start), float(start + length))
    low, high = start * 10**9, (start + length) * 10**9
    wanted = [(t, p) for t, p in zip(before.arrival_ns.tolist(), before.prompt_tokens.tolist()) if low <= t < high]
    assert list(zip((after.arrival_ns + low).tolist(), after.prompt_tokens.tolist())) == wanted


TRANSFORMS = st.fixed_dictionaries(
    {
        "rate_scale": st.sampled_from([0.4, 1.0, 2.5]),
        "speed": st.sampled_from([0.5, 1.0, 3.0]),
        "length_scale": st.sampled_from([0.1, 1.0, 2.7, 10.0]),
        "window_s": st.sampled_from([None, [5.0, 60.0]]),
        "max_prompt_tokens": st.sampled_from([None, 700, 5000]),
        "max_output_tokens": st.sampled_from([20, 300, 4096]),
        "overlong": st.sampled_from(["clip", "reject"]),
    }
)
CONTENTFUL = st.sampled_from(
    [{"kind": "sessions"}, {"kind": "sessions", "system_tokens": 333, "system_prompts": 3}, {"kind": "shared_prefix"}]
)


@given(CONTENTFUL, TRANSFORMS, SEEDS)
@settings(max_examples=60, deadline=None)
def test_content_adds_up_and_sessions_are_causal(kind: dict[str, object], keys: dict[str, object], seed: int) -> None:
    try:
        trace = build(from_mapping(kind | {"num_requests": 120} | keys), seed)
    except ConfigError as error:
        assert keys["overlong"] == "reject" and "rejected_overlong" in str(error)
        return
    assert trace.content is not None
    assert [num_tokens(pieces) for pieces in trace.content] == trace.prompt_tokens.tolist()
    assert all(length > 0 for pieces in trace.content for _, _, length in pieces)
    assert trace.output_tokens.min() >= 1 and trace.output_tokens.max() <= keys["max_output_tokens"]
    assert trace.prompt_tokens.max() <= (keys["max_prompt_tokens"] or 10_000_000)
    timed = trace.arrival_ns[trace.arrival_ns >= 0]
    assert np.all(np.diff(timed) >= 0)
    if trace.release_after is not None:
        check_sessions(trace)


def check_sessions(trace: Workload) -> None:
    assert trace.session is not None and trace.release_after is not None and trace.think_ns is not None
    assert trace.content is not None and trace.think_ns.min() >= 0
    for index, before in enumerate(trace.release_after.tolist()):
        assert (before < 0) == (trace.arrival_ns[index] >= 0)
        generated = [piece for piece in trace.content[index] if piece[0].startswith("gen:")]
        for (
            source,
            start,
            length,
        ) in generated:  # only replies of earlier turns of this session, never longer than those
            of = int(source[4:])
            assert of < index and trace.session[of] == trace.session[index]
            assert start == 0 and length <= trace.output_tokens[of]
        if before < 0:
            assert not generated
            continue
        assert before < index and trace.session[before] == trace.session[index]
        prompt = (*trace.content[before], (f"gen:{before}", 0, int(trace.output_tokens[before])))
        assert trace.content[index] == cut(
            (*prompt, *trace.content[index][len(prompt) :]), num_tokens(trace.content[index])
        )


IDS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=8)


@given(IDS, st.integers(1, 4), st.data())
def test_equal_hash_prefixes_are_equal_tokens(paths: list[list[int]], block: int, data: st.DataObject) -> None:
    """Chained or not: two prompts share exactly the tokens of their common leading ids."""
    chained = data.draw(st.booleans())
    names: dict[object, int] = {}
    ids = [
        [names.setdefault(tuple(path[: i + 1]) if chained else path[i], len(names)) for i in range(len(path))]
        for path in paths
    ]
    prompt = np.array([data.draw(st.integers((len(path) - 1) * block + 1, len(path) * block + 2)) for path in paths])
    content = from_hashes(ids, prompt, block)
    assert [num_tokens(pieces) for pieces in content] == prompt.tolist()
    for i, mine in enumerate(content):
        for j, other in enumerate(content[:i]):
            shared_ids = next(
                (k for k, (a, b) in enumerate(zip(ids[i], ids[j])) if a != b), min(len(ids[i]), len(ids[j]))
            )
            common = next((k for k, (a, b) in enumerate(zip(tokens(mine), tokens(other))) if a != b), None)
            common = min(num_tokens(mine), num_tokens(other)) if common is None else common
            assert common == min(shared_ids * block, *(min(int(prompt[x]), len(ids[x]) * block) for x in (i, j)))


PIECES = st.lists(st.tuples(st.sampled_from("abc"), st.just(0), st.integers(1, 9)), min_size=1, max_size=4).map(tuple)


@given(st.lists(PIECES, min_size=1, max_size=8))
def test_reuse_never_exceeds_the_longest_common_prefix(prompts: list[tuple[tuple[str, int, int], ...]]) -> None:
    """`reusable` counts along pieces: it finds nothing that is not shared, and all of an exact repetition."""
    found = reusable(prompts, np.ones(len(prompts), np.int64), np.arange(len(prompts)))
    for index, prompt in enumerate(prompts):
        mine, best = tokens(prompt), 0
        for other in prompts[:index]:
            same = 0
            for a, b in zip(mine, tokens(other)):
                if a != b:
                    break
                same += 1
            best = max(best, same)
        assert found[index] <= best
        if prompt in prompts[:index]:
            assert found[index] == num_tokens(prompt)


@given(PIECES, PIECES, PIECES, st.floats(0.2, 8.0))
def test_scaling_keeps_shared_prefixes(head: tuple, one: tuple, two: tuple, factor: float) -> None:
    a, b = scale((*head, *one), factor), scale((*head, *two), factor)
    assert a[: len(scale(head, factor))] == b[: len(scale(head, factor))] == scale(head, factor)
    assert num_tokens(a) == round(factor * num_tokens((*head, *one)))


@given(SEEDS, st.floats(0.1, 50.0), st.floats(0.3, 4.0))
@settings(max_examples=25, deadline=None)
def test_arrivals_and_lengths_are_independent(seed: int, rate: float, cv: float) -> None:
    """Another arrival process, rate or burstiness leaves lengths as they are, and the other way round."""
    base = make("poisson", seed, num_requests=200)
    common = {"num_requests": 200, "duration_s": None, "lengths": "burstgpt"}
    for other in (
        make("poisson", seed, num_requests=200, rate=rate, cv=cv),
        make("burst", seed, **common, rate=rate),
        make("diurnal", seed, **common, rate=rate),
        make("closed_loop", seed, num_requests=200, lengths="burstgpt"),
    ):
        assert np.array_equal(other.prompt_tokens, base.prompt_tokens)
        assert np.array_equal(other.output_tokens, base.output_tokens)
    lengths = make("poisson", seed, num_requests=200, lengths="longbench")
    assert np.array_equal(lengths.arrival_ns, base.arrival_ns)
    assert not np.array_equal(base.arrival_ns, make("poisson", seed + 1, num_requests=200).arrival_ns)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_think_times_belong_to_session_and_turn(seed: int) -> None:
    """Longer or shorter sessions leave the think time of a given turn of a given session as it was."""
    thinks = []
    for turns in (2.0, 6.0):
        trace = make("sessions", seed, num_requests=100, turns_mean=turns)
        assert trace.session is not None and trace.think_ns is not None
        turn = np.arange(100) - np.searchsorted(trace.session, trace.session)
        thinks.append({(s, t): v for s, t, v in zip(trace.session.tolist(), turn.tolist(), trace.think_ns.tolist())})
    for key, value in thinks[0].items():
        assert thinks[1].get(key, value) == value


@given(SEEDS, st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_longer_workloads_extend_shorter_ones(seed: int, num: int) -> None:
    for kind in ("poisson", "burst", "sessions", "long_context", "diurnal"):
        keys = {} if kind in ("sessions", "poisson", "long_context") else {"duration_s": None}
        short, long = (make(kind, seed, num_requests=count, **keys) for count in (num, 80))
        assert np.array_equal(short.arrival_ns, long.arrival_ns[:num])
        assert np.array_equal(short.output_tokens, long.output_tokens[:num])
        assert all(a <= b for a, b in pairwise(long.arrival_ns[long.arrival_ns >= 0].tolist()))


DIGEST = """
import hashlib
from workloads import build, from_mapping
digest = hashlib.sha256()
for kind in ({"kind": "burst"}, {"kind": "sessions", "system_tokens": 9}, {"kind": "shared_prefix", "rate_scale": 1.5},
             {"kind": "diurnal"}, {"kind": "poisson", "mix": {"weight": 0.3, "workload": {"kind": "long_context"}}}):
    trace = build(from_mapping(kind), 7)
    for values in (trace.arrival_ns, trace.prompt_tokens, trace.output_tokens, trace.think_ns):
        digest.update(b"" if values is None else values.tobytes())
    digest.update(repr((trace.content, dict(trace.counts))).encode())
print(digest.hexdigest())
"""


def test_results_do_not_depend_on_the_hash_seed() -> None:
    seen = []
    for hash_seed in ("0", "1", "4242"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        seen.append(done.stdout)
    assert len(set(seen)) == 1 and len(seen[0].strip()) == hashlib.sha256().digest_size * 2


def test_workloads_import_nothing_they_must_not() -> None:
    import ast

    banned = {"torch", "time", "random", "asyncio", "threading", "hydra", "pandas", "systems"}
    for path in sorted((ROOT / "workloads").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & banned, path
