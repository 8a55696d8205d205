"""Configs: yaml and dataclasses agree, and every mistake is one line that names the key."""

from pathlib import Path

import pytest
import yaml

from common.errors import ConfigError
from workloads import build, from_mapping
from workloads.config import KINDS, defaults
from workloads.several import by_cluster

CONF = Path(__file__).resolve().parents[2] / "conf" / "workload"
FILES = sorted(CONF.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_yaml_states_every_key(path: Path) -> None:
    mapping = yaml.safe_load(path.read_text())
    assert mapping["description"]
    own = defaults(mapping["kind"])
    assert sorted(mapping) == sorted(own)
    if path.stem in KINDS:
        tuned = {"description": "", "rate": own.get("rate")}  # the rate is tuned in the yaml, for the default cluster
        assert {key: tuned.get(key, value) for key, value in mapping.items()} == own
    if mapping["kind"] != "file":
        from_mapping(mapping)


def test_there_is_a_yaml_for_every_kind() -> None:
    stems = [path.stem for path in FILES]
    assert [kind for kind in KINDS if kind not in stems] == []


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"kind": "brst"}, r"workload.kind='brst' is unknown; choose one of: poisson"),
        ({}, r"workload.kind=None is unknown"),
        ({"kind": "burst", "rte": 3}, r"workload.rte is not a key of 'burst'; did you mean 'rate'\? known: "),
        ({"kind": "burst", "rate": "fast"}, r"workload.rate='fast' is not a number"),
        ({"kind": "burst", "rate": True}, r"workload.rate=True is not a number"),
        ({"kind": "burst", "rate": 0}, r"workload.rate=0.0 must be greater than 0"),
        ({"kind": "burst", "rate": float("nan")}, r"workload.rate=nan must be greater than 0"),
        ({"kind": "burst", "rate": float("inf")}, r"workload.rate=inf must be greater than 0"),
        ({"kind": "burst", "first_burst_s": -1}, r"workload.first_burst_s=-1.0 must not be negative"),
        ({"kind": "burst", "duration_s": None}, r"num_requests and workload.duration_s are both null"),
        ({"kind": "burst", "lengths": "short"}, r"workload.lengths='short' is unknown; choose fixed, burstgpt"),
        ({"kind": "burst", "overlong": "drop"}, r"workload.overlong='drop': choose one of: error, reject, clip"),
        ({"kind": "poisson", "num_requests": 1.5}, r"workload.num_requests=1.5 is not a whole number"),
        ({"kind": "poisson", "num_requests": -3}, r"workload.num_requests=-3 must be greater than 0"),
        ({"kind": "poisson", "window_s": [3, 1]}, r"workload.window_s=\[3.0, 1.0\] needs 0 <= start < end"),
        ({"kind": "poisson", "window_s": [3]}, r"workload.window_s=\[3\] needs 2 numbers"),
        ({"kind": "poisson", "window_s": 3}, r"workload.window_s=3 is not a list of numbers"),
        ({"kind": "poisson", "window_s": [1e9, 2e9]}, r"workload 'poisson' is empty"),
        ({"kind": "poisson", "lengths": {"prompt": {"kind": "zipf"}}}, r"needs exactly prompt and output"),
        ({"kind": "poisson", "mix": {"weight": 2, "workload": {"kind": "poisson"}}}, r"mix.weight=2 must lie between"),
        ({"kind": "poisson", "mix": {"share": 1}}, r"workload.mix has keys \['share'\]"),
        ({"kind": "long_context", "trace": 9}, r"workload.trace=9 is not one of the mixes 0 to 8"),
        ({"kind": "long_context", "long_fraction": 2}, r"workload.long_fraction=2.0 must lie between 0 and 1"),
        ({"kind": "poisson", "rate_scale": 1e300}, r"workload.rate_scale=1e[+]300 must be at most 1,000,000"),
        ({"kind": "poisson", "length_scale": 1e300}, r"workload.length_scale=1e[+]300 must be at most"),
        ({"kind": "sessions", "turns_max": 10**9}, r"workload.turns_max=1000000000 must be at most 100,000"),
        ({"kind": "shared_prefix", "num_documents": 10**8}, r"workload.num_documents=100000000 must be at most"),
        ({"kind": "closed_loop", "speed": 2}, r"workload.window_s, rate_scale and speed mean nothing"),
        ({"kind": "sessions", "mix": {}}, r"workload.mix does not apply to sessions"),
        ({"kind": "diurnal", "levels": [0, 0]}, r"workload.levels=\[0.0, 0.0\] needs numbers >= 0"),
        ({"kind": "file"}, r"workload.path is empty"),
        ({"kind": "file", "path": 3}, r"workload.path=3 is not a text"),
    ],
)
def test_mistakes_name_the_key(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build(from_mapping(mapping), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"kind": "gauss"}, "prompt needs kind: fixed"),
        ({"kind": "lognormal", "mean": 5, "median": 3}, r"prompt.median is not a key of lognormal"),
        ({"kind": "lognormal", "mean": 5}, "or give cv"),
        ({"kind": "lognormal", "cv": 5}, "lognormal needs mean"),
        ({"kind": "lognormal", "mean": 500, "cv": 1, "max": 100}, "mean 500 must lie between min 1 and max 100"),
        ({"kind": "uniform", "min": 9, "max": 3}, "min 9 is over max 3"),
        ({"kind": "fixed", "tokens": "x"}, r"prompt.tokens='x' is not a number"),
    ],
)
def test_length_laws_name_the_key(law: dict[str, object], message: str) -> None:
    lengths = {"prompt": law, "output": {"kind": "fixed", "tokens": 3}}
    with pytest.raises(ConfigError, match=message):
        build(from_mapping({"kind": "poisson", "lengths": lengths}), 0)


def test_several_models_each_have_the_requests_that_they_would_have_alone() -> None:
    base = {"kind": "poisson", "num_requests": 40, "lengths": "fixed", "output_tokens": 9}
    both = build(from_mapping(base | {"per_model": {"a": {}, "b": {"rate": 8.0, "num_requests": 30}}}), 3)
    alone = build(from_mapping(base | {"per_model": {"a": {}, "b": {"kind": "poisson", "num_requests": 5}}}), 3)
    assert both.models == ("a", "b") and both.model is not None and alone.model is not None
    assert (both.arrival_ns[:-1] <= both.arrival_ns[1:]).all() and both.num_requests == 70
    assert both.arrival_ns[both.model == 0].tolist() == alone.arrival_ns[alone.model == 0].tolist()
    assert both.arrival_ns[both.model == 1].tolist() != both.arrival_ns[both.model == 0][:30].tolist()
    turned = by_cluster(both, ("b", "a"))
    assert turned.model is not None and (turned.model == 1 - both.model).all()


@pytest.mark.parametrize(
    ("per_model", "message"),
    [
        ({"a": {}}, r"workload.per_model={'a': {}}: give two or more models"),
        ({"a": {}, "b": 3}, r"workload.per_model.b=3: give keys of the workload"),
        ({"a": {}, "b": {"rte": 1.0}}, r"workload.rte is not a key of 'poisson'; did you mean 'rate'"),
        ({"a": {}, "b": {"kind": "sessions"}}, r"workload.per_model.b: requests of several models arrive by the clock"),
    ],
)
def test_what_several_models_cannot_ask_for(per_model: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(from_mapping({"kind": "poisson", "num_requests": 5, "per_model": per_model}), 0)


@pytest.mark.parametrize(
    ("names", "models", "message"),
    [
        (("a", "b"), (), r"cluster.models=\['a', 'b'\]: say who asks for which: workload.per_model={a: {}, …}"),
        ((), ("a", "b"), r"asks for a, which is none of cluster.models=\[\]"),
        (("a", "c"), ("a", "b"), r"asks for b, which is none of cluster.models=\['a', 'c'\]"),
    ],
)
def test_models_of_workload_and_cluster_must_match(names: tuple[str, ...], models: tuple[str, ...],
                                                   message: str) -> None:  # fmt: skip
    mapping = {"kind": "poisson", "num_requests": 5} | ({"per_model": {name: {} for name in models}} if models else {})
    with pytest.raises(ConfigError, match=message):
        by_cluster(build(from_mapping(mapping), 0), names)
