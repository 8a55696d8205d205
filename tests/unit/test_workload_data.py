"""Known facts about the public traces; skipped where the data folder is absent."""

import numpy as np
import pytest

from workloads import Workload, build, from_mapping
from workloads.content import reusable
from workloads.describe import prefix_share, statistics
from workloads.paths import SHORT_NAMES, data_root

pytestmark = pytest.mark.skipif(
    not all((data_root() / path).is_file() for path in SHORT_NAMES.values()),
    reason="the traces are not in $KVPLANE_DATA (docs/workloads.md says where to get them)",
)


def load(path: str, **keys: object) -> Workload:
    return build(from_mapping({"kind": "file", "path": path} | keys), 0)


@pytest.mark.parametrize(
    ("path", "num", "seconds", "cv", "prompt", "output"),
    [
        ("azure_conv", 19_366, 3501.7, 1.09, 1154.7, 211.1),
        ("azure_code", 8_819, 3435.9, 13.15, 2047.8, 27.9),
        ("mooncake_conversation", 12_031, 3537.0, None, 12035.1, 342.6),
        ("sharegpt_300", 300, 29.1, None, 857.5, 652.5),
        ("vidur_conv2k", 2_000, 1013.8, 1.0, 1096.3, 264.9),
    ],
)
def test_known_traces(path: str, num: int, seconds: float, cv: float | None, prompt: float, output: float) -> None:
    trace = load(path)
    stats = statistics(trace)
    assert trace.num_requests == num and not any(trace.counts.values())
    assert stats["duration_s"] == pytest.approx(seconds, abs=0.1)
    assert stats["prompt_mean"] == pytest.approx(prompt, abs=0.1)
    assert stats["output_mean"] == pytest.approx(output, abs=0.1)
    if cv is not None:
        assert stats["gap_cv"] == pytest.approx(cv, abs=0.05)


def test_times_since_a_start_are_kept() -> None:
    assert load("sharegpt_300").arrival_ns[0] == 46_926_808
    assert load("vidur_conv2k").arrival_ns[:2].tolist() == [1_202_104_000, 2_370_199_000]


def test_mooncake_reuse() -> None:
    """The infinite-cache hit ratio is 0.366 of blocks; in tokens, every prompt sharing block 0, 0.374."""
    trace = load("mooncake_conversation")
    assert trace.content is not None
    hits = np.array(reusable(trace.content, trace.output_tokens, np.arange(trace.num_requests)))
    blocks = -(-trace.prompt_tokens // 512)
    hit_blocks = np.where(hits == trace.prompt_tokens, blocks, hits // 512)
    assert hit_blocks.sum() / blocks.sum() == pytest.approx(0.366, abs=0.0005)
    assert hits.sum() / trace.prompt_tokens.sum() == pytest.approx(0.374, abs=0.001)
    assert (hits > 0).sum() == trace.num_requests - 1


def test_sharegpt_reuse() -> None:
    share = prefix_share(trace := load("sharegpt_300"))
    assert share is not None
    assert (share * trace.prompt_tokens).sum() / trace.prompt_tokens.sum() == pytest.approx(0.0759, abs=0.0005)


def test_mooncake_jitter_spreads_the_quanta() -> None:
    trace = load("mooncake_conversation", jitter_s=3.0)
    assert statistics(trace)["gap_cv"] == pytest.approx(1.0, abs=0.1)
    assert load("mooncake_conversation").prompt_tokens.tolist() == trace.prompt_tokens.tolist()


def test_servegen_clients_carry_the_load() -> None:
    keys = {"kind": "servegen", "pool": "m-large", "duration_s": 600.0, "rate": None}
    whole = build(from_mapping(keys), 0)
    top = build(from_mapping(keys | {"max_clients": 10}), 0)
    assert 0.5 < top.num_requests / whole.num_requests < 0.95


def test_arxiv_lengths_without_timestamps() -> None:
    trace = load("arxiv_summarization", num_requests=1000, rate=2.0)
    assert trace.num_requests == 1000 and trace.arrival_ns[-1] / 1e9 == pytest.approx(500, rel=0.1)
