"""The experiments' files compose, every one is run by a bench, figures have their tables; what benches compute."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.memserve import balance
from bench.memserve_figures import DRAWN, FIGURES
from bench.memserve_runs import infinite, sessions
from common.config import compose
from systems.memserve.config import Options

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "conf" / "experiment" / "memserve").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_composes(name):
    config = compose([f"experiment=memserve/{name}"])
    assert config.system in ("memserve", "pd") and config.cluster.tp > 1
    options = config.system_options if isinstance(config.system_options, Options) else Options.of(config.system_options)
    assert len(options.role_of(config.cluster.num_instances)) == config.cluster.num_instances


def test_every_experiment_is_run():
    texts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("memserve*.py"))
    by_variable = {"sharegpt", "loogle", "react", "share", "share_sessions"}  # named in tables of the benches
    for name in NAMES:
        assert f"experiment=memserve/{name}" in texts or (name in by_variable and f'"{name}"' in texts), name


def test_figures_are_those_that_can_be_drawn():
    assert {path.stem for path in FIGURES.glob("*.png")} == set(DRAWN)


def prompts(*names):
    """A workload of prompts by the names of their blocks of 512 tokens."""
    content = tuple(tuple((f"h{name}", 0, 512) for name in one) for one in names)
    return SimpleNamespace(content=content, prompt_tokens=np.array([512 * len(one) for one in names]))


def test_an_infinite_cache_hits_what_came_before_but_for_the_last_token():
    bound = infinite(prompts("abc", "abcd", "axy", "abcd"))
    assert bound.blocks == (0 + 3 + 1 + 3) / 14 and bound.tokens == bound.blocks


def test_sessions_are_told_by_what_follows_the_common_block():
    found = sessions(prompts("0ab", "0cd", "0abe", "0f", "0cdg", "0abeh"))
    assert found.tolist() == [0, 1, 0, 3, 1, 0]


def test_balance_is_by_requests_tokens_and_work():
    flow = [SimpleNamespace(prefill_at=at, decode_at=to, prompt=prompt, hit=hit) for at, to, prompt, hit in
            ((0, 2, 100, 0), (0, 2, 100, 100), (1, 3, 400, 100))]  # fmt: skip
    gs = SimpleNamespace(roles=["prefill", "prefill", "decode", "decode"], dispatched={0: 2, 1: 1})
    found = balance(SimpleNamespace(gs=gs, flows=dict(enumerate(flow))))
    assert found == {"max_over_mean_requests": 2 / 1.5, "max_over_mean_tokens": 400 / 300,
                     "max_over_mean_computed": 300 / 200, "max_over_mean_decodes": 2 / 1.5}  # fmt: skip
