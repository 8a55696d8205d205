"""Every option of every system: what is given is of its kind and works, or is refused in one line that names it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import run as cli
from common.build import cluster_model
from common.config import available, compose
from common.errors import ConfigError, KVPlaneError
from common.options import Choice, Group, Kind, Number, Switch, Whole, checked
from systems.registry import FACTORIES, KINDS, make_policy
from tests.deadline import at_most

BAD: tuple[Any, ...] = (
    "often", "", "x" * 1_000_000, "a\nb", -1, 0, 1, 1.5, 10**400, float("nan"), float("inf"), 1e300, 1e-300,
    True, False, None, [], [1], [[1]], [[float("nan"), 0]], {"a": 1}, ["x"] * 10_000,
)  # fmt: skip
SYSTEMS = sorted(available("system"))
ALIKE = ("dcp", "vllm_pp", "static_pp", "llumnix", "kunserve", "infinite_llm", "memserve", "mell", "best_fit",
         "load_balance_drain")  # fmt: skip - one or two of those with the same options
SHORT = ["workload=poisson", "workload.num_requests=3", "workload.rate=10", "workload.lengths=fixed",
         "workload.prompt_tokens=200", "workload.output_tokens=20", "run.figures=false", "run.trace=false",
         "cluster.num_instances=4"]  # fmt: skip
TOGETHER = {  # legal by themselves, but not with the others as they are
    ("infinite_llm", "lease_ms"): "need lease_ms",
    ("infinite_llm", "margin_ms"): "need lease_ms",
    ("infinite_llm", "period_ms"): "need lease_ms",
    ("dcp", "group"): "do not divide",
    ("vllm_pp", "stages"): "must divide",
    ("static_pp", "stages"): "must divide",
}


def kinds(name: str) -> dict[str, Kind]:
    """What a system declares; keys of a group with a dot."""
    found = KINDS[name]
    found = import_module(found).OPTIONS if isinstance(found, str) else found
    flat: dict[str, Kind] = {}
    for key, kind in found.items():
        below = {f"{key}.{sub}": one for sub, one in kind.kinds.items()} if isinstance(kind, Group) else {key: kind}
        flat.update(below)
    return flat


def one_line(error: Exception, key: str) -> bool:
    text = str(error)
    return f"system.{key}" in text and "\n" not in text and len(text) <= 200


def test_every_system_declares_every_key_of_its_configuration() -> None:
    assert set(KINDS) == set(FACTORIES)
    for name in SYSTEMS:
        config = compose([f"system={name}"])
        declared = import_module(found).OPTIONS if isinstance(found := KINDS[config.system], str) else found
        assert set(config.system_options) <= {*declared, "against"}, name


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_value_works_or_is_refused_in_one_line(name: str) -> None:
    config = compose([f"system={name}"])
    info, given = cluster_model(config).info(), config.system_options
    cases = [(key, key, {**given, key: bad}) for key in given for bad in BAD]
    cases += [(f"{key}.{sub}", key, {**given, key: {**group, sub: bad}})
              for key, group in given.items() if isinstance(group, dict) for sub in group for bad in BAD]  # fmt: skip
    refused = 0
    for path, key, options in cases:
        with at_most(10):
            try:
                make_policy(config.system, info, config.engine, options)
            except KVPlaneError as error:
                refused += 1
                assert isinstance(error, ConfigError) and one_line(error, path), (path, f"{options[key]!s:.80}", error)
    assert refused > len(cases) / 2


def edges(kind: Kind) -> set[float]:
    """The least and the most that a number may be."""
    if isinstance(kind, Number):
        return {kind.high, *(() if kind.above else (kind.low,)), *((0,) if kind.zero else ())}
    return {kind.low, kind.high} if isinstance(kind, Whole) else set()


def test_bounds_themselves_end_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bound that is legal but never ends, or ends in a stack trace, is none."""
    base = [*SHORT, f"run.results={tmp_path}", "run.name=r"]
    cases = [(name, key, value) for name in ALIKE for key, kind in kinds(name).items() for value in sorted(edges(kind))]
    for name, key, value in cases:
        alone = ["system.against=null"] if name == "kunserve" else []
        with at_most(30):
            status = cli.main([*base, f"system={name}", *alone, f"system.{key}={value}"])
        error = capsys.readouterr().err.strip()
        refusal = TOGETHER.get((name, key))
        assert status == 0 or (status == 2 and refusal and refusal in error), (name, key, value, error)


@pytest.mark.parametrize(("name", "values"), [
    ("memserve", ["swap=false", "fetch=false", "ordered=true", "restart=true", "roles=[prefill,both,decode,both]"]),
    ("kunserve", ["lookahead=literal", "restore=off", "max_group=2", "piece_mb=2"]),
    ("infinite_llm", ["mode=off", "plan_limit=3", "locality=true"]),
    ("llumnix", ["drain=null", "drain=[[1,0],[2.5,1]]"]),
])  # fmt: skip
def test_what_the_configurations_say_may_be_given_may(name: str, values: list[str]) -> None:
    for value in values:
        config = compose([f"system={name}", f"system.{value}", "cluster.num_instances=4"])
        make_policy(config.system, cluster_model(config).info(), config.engine, config.system_options)


@pytest.mark.parametrize(("kind", "good", "bad", "says"), [
    (Whole(1, 9), (1, 9), (0, 10, 1.0, True, "1", None), "k.a={}: give a whole number of at least 1"),
    (Whole(null=True), (None, 0), (-1, []), "k.a={}: give a whole number of at least 0, or null"),
    (Number(0, 1), (0, 0.5, 1), (-0.1, 1.1, float("nan"), False), "k.a={}: give a number from 0 to 1"),
    (Number(0, 1, above=True), (1e-9, 1), (0, 0.0), "k.a={}: give a number above 0 up to 1"),
    (Number(1, 2, zero=True), (0, 1), (0.5, 3), "k.a={}: give 0, or a number from 1 to 2"),
    (Switch(), (True, False), (1, "yes", None), "k.a={}: use true or false"),
    (Choice(("on", "two")), ("on", "two"), (False, 1, ["on"]), "k.a={} is unknown; choose one of: on, two"),
])  # fmt: skip
def test_kinds(kind: Kind, good: tuple[Any, ...], bad: tuple[Any, ...], says: str) -> None:
    for value in good:
        assert checked({"a": value}, {"a": kind}, "k.") == {"a": value}
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            checked({"a": value}, {"a": kind}, "k.")
        told = "off" if isinstance(kind, Choice) and value is False else value  # as YAML reads it
        assert str(caught.value).startswith(says.format(repr(told)))


def test_yaml_reads_on_and_off_as_booleans() -> None:
    assert checked({"a": True}, {"a": Choice(("on", "literal"))}) == {"a": "on"}
    assert checked({"a": False}, {"a": Choice(("on", "off"))}) == {"a": "off"}
    with pytest.raises(ConfigError, match=r"^system\.a=True is unknown"):
        checked({"a": True}, {"a": Choice(("yes", "no"))})


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^system\.pol_ms is unknown; did you mean system\.poll_ms\?$"):
        checked({"pol_ms": 1}, kinds("llumnix"))
    config = compose(["system=memserve"])
    with pytest.raises(ConfigError, match=r"^system\.planner\.speed is unknown; known: base_ms, token_us"):
        make_policy("memserve", cluster_model(config).info(), config.engine, {"planner": {"speed": 1}})


def test_a_bad_option_costs_neither_a_run_nor_older_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [*SHORT, f"run.results={tmp_path}", "run.name=r"]
    assert cli.main(base) == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "r").iterdir())
    for bad in (["system=vllm", "system.dispatch=often"], ["system=kunserve", "system.against=often"],
                ["system=kunserve", "system.against=[1]"], ["system=kunserve", "system.poll_ms=often"]):  # fmt: skip
        capsys.readouterr()
        assert cli.main([*base, *bad]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {bad[1].split('=')[0]}=") and "\n" not in error and len(error) <= 207, error
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "r").iterdir()) == before
