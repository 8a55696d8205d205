"""The arenas are fair as declared: the same memory, links and requests for all, nobody told lengths, nobody tuned on
what is evaluated; and the search keeps to what is declared."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.arenas.cells import Cells
from bench.arenas.declared import ORACLES, Arena, Objective, load, names
from bench.arenas.play import RESULTS, moved, play
from bench.arenas.search import search
from bench.arenas.verdict import Change, change, ranked, sentences
from common.build import cluster_model
from common.config import RunConfig, compose
from systems.registry import ORACLES as TOLD

COMMITTED = sorted(path.stem for path in RESULTS.glob("*.json"))


@cache
def configured(arena: str, system: str) -> RunConfig:
    one = load(arena)
    return compose([text for text in one.overrides(system, {}, 0) if not text.startswith("workload")])


def test_the_four_arenas_are_declared_for_the_four_systems_and_vllm() -> None:
    assert names()[:4] == ("burst", "long_context", "sessions", "diurnal")
    for name in names():
        arena = load(name)
        assert {"vllm", "kunserve", "infinite_llm", "memserve", "mell"} <= set(arena.axes)
        assert len(arena.seeds) >= 5 and len(arena.tuning_seeds) >= 2 and not set(arena.seeds) & set(arena.tuning_seeds)
        assert any(text.startswith("slo.ttft_ms=") for text in arena.common)


@pytest.mark.parametrize("name", names())
def test_nobody_has_more_memory_faster_links_or_other_costs(name: str) -> None:
    arena = load(name)
    config = configured(name, "vllm")
    base = cluster_model(config)
    budget = config.hardware.memory_bytes * config.gpu_memory_utilization * len(base.instances)
    for system in arena.axes:
        if system in ORACLES:
            continue
        model = cluster_model(configured(name, system))
        used = sum(one.kv_cells * one.cell_bytes for one in model.instances)
        if system == "vllm_single":
            one = configured(name, system).model
            assert used + one.param_bytes <= budget
            continue
        assert model.instances == base.instances, system
        assert (model.nvlink, model.nic, model.pcie) == (base.nvlink, base.nic, base.pcie)
        assert (model.startup_ns, model.control_ns) == (base.startup_ns, base.control_ns)
        assert used + len(model.instances) * config.model.param_bytes <= budget
        assert model.nic.bandwidth < float("inf") and model.nvlink.latency_ns > 0


@pytest.mark.parametrize("name", names())
def test_nobody_ranked_is_told_output_lengths(name: str) -> None:
    for system in load(name).axes:
        assert system not in TOLD
        assert (configured(name, system).system_options.get("kv") == "unlimited") == (system in ORACLES)


def toy(metric: str = "slo_attainment", floor: float = 0.0) -> Arena:
    return replace(load("burst"), objective=Objective(metric, floor), axes={"s": {"a": [1, 2], "b": [3]}})


def test_the_search_tries_what_is_declared_on_the_tuning_seeds_and_keeps_the_best() -> None:
    asked: list[list[str]] = []

    def measure(overrides: list[str]) -> dict[str, Any]:
        asked.append(overrides)
        if "a=1" in overrides:
            return {"error": "does not fit"}
        met = 0.5 + 0.1 * ("a=2" in overrides) - 0.1 * ("b=3" in overrides)
        return {"slo_attainment": met, "mean_e2el_ms": 1.0}

    found = search(toy(), "s", measure)
    assert found.best == {"a": 2} and 2 * len(found.tried) == 8 == toy().num_search("s") == len(asked)
    assert [one[-1] for one in asked] == ["seed=20", "seed=21"] * 4 and asked[-1][-3:-1] == ["a=2", "b=3"]


def test_gpu_seconds_count_only_where_targets_are_met() -> None:
    goal = Objective("gpu_seconds", 0.95)
    cheap = {"slo_attainment": 0.9, "gpu_seconds": 10, "mean_e2el_ms": 1.0}
    good = {"slo_attainment": 0.96, "gpu_seconds": 90, "mean_e2el_ms": 1.0}
    better = {**good, "gpu_seconds": 80}
    assert goal.score([better]) > goal.score([good]) > goal.score([cheap])
    lucky = {**cheap, "slo_attainment": 1.0}
    assert goal.score([good, good]) > goal.score([cheap, lucky]), "the floor holds on every seed"
    assert goal.score([good, better]) > goal.score([good, good]), "otherwise means decide"


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_results_keep_to_the_declaration(name: str) -> None:
    result, arena = json.loads((RESULTS / f"{name}.json").read_text()), load(name)
    assert result["common"] == list(arena.common) and result["seeds"] == list(arena.seeds)
    assert result["tuning_seeds"] == list(arena.tuning_seeds)
    assert not result["git"].get("dirty")
    for row in result["rows"]:
        assert len(row["runs"]) == len(arena.seeds)
        assert all(key in arena.axes[row["system"]] and value in arena.axes[row["system"]][key]
                   for key, value in row["own"].items())  # fmt: skip
    assert not {row["system"] for row in ranked(result)} & set(ORACLES)
    assert len(sentences(result)) >= 6


def test_the_verdict_names_who_wins_and_who_is_ahead_in_what() -> None:
    def row(system: str, kind: str, met: list[float], ttft: list[float]) -> dict[str, Any]:
        runs = [{"slo_attainment": m, "mean_ttft_ms": t, "mean_e2el_ms": 1.0, "rejected": 0, "bytes_moved": 0,
                 "num_migrations": 0, "num_preemptions": 0} for m, t in zip(met, ttft)]  # fmt: skip
        return {"system": system, "kind": kind, "own": {}, "oracle": system in ORACLES, "runs": runs}

    result = {"objective": {"metric": "slo_attainment", "floor": 0.0}, "rows": [
        row("vllm", "best", [0.8, 0.7], [10.0, 12.0]), row("mell", "best", [0.9, 0.9], [20.0, 22.0]),
        row("infinite_kv", "best", [1.0, 1.0], [1.0, 1.0])]}  # fmt: skip
    text = sentences(result)
    assert text[0].startswith("**mell** (its defaults) meets the targets for 90.0% of requests: first of 2 systems")
    assert text[1].startswith("Against the second, vllm (its defaults), that is +20.0% [+1")
    assert text[3].startswith("It loses to it in mean TTFT +90.9% [+8")
    assert text[4].startswith("The best of the others is ahead of it in mean TTFT (vllm -47.6% [-4")
    assert text[4].endswith("targets met for 75.0%).")


def test_a_change_has_an_interval_over_seeds() -> None:
    mine, theirs = ({"runs": [{"x": value} for value in values]} for values in ([2, 3, 4], [1, 2, 2]))
    found = change(mine, theirs, "x")
    assert found is not None and found.low <= found.value <= found.high and found.sure
    assert change({"runs": [{"x": None}, {"x": 1}]}, {"runs": [{"x": 1}, {"x": 1}]}, "x") is None


def test_several_processes_give_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("workload=poisson", "workload.num_requests=20", "workload.rate=20", "cluster.num_instances=2",
             "run.figures=false", "slo.ttft_ms=2000", "slo.tpot_ms=200")  # fmt: skip
    arena = replace(load("burst"), common=small, seeds=(1, 2), tuning_seeds=(3, 4),
                    axes={"vllm": {"engine.block_size": [32]}, "mell": {}})  # fmt: skip
    results = []
    for jobs in (1, 2):
        monkeypatch.setattr(Cells.__init__, "__defaults__", (tmp_path / str(jobs),))
        results.append(play(arena, {"commit": "x"}, jobs=jobs))
        kept = (tmp_path / str(jobs) / "burst-x.jsonl").read_text().splitlines()
        assert len({json.loads(line)["key"] for line in kept}) == len(kept) >= 10
    assert results[0] == results[1]
    assert moved(arena, results[0]) == []
    results[0] = json.loads(json.dumps(results[0]))  # rows of one configuration share their runs
    results[0]["rows"][2]["runs"][0]["mean_ttft_ms"] += 1.0
    [line] = moved(arena, results[0])
    assert line.startswith("burst: mell (default) has moved in 1 numbers; targets met 100.0%, now 100.0%"), line
    for run in (run for row in results[1]["rows"] for run in row["runs"]):
        assert max(0, run["met_ttft"] + run["met_tpot"] - 1) <= run["slo_attainment"] <= min(
            run["met_ttft"], run["met_tpot"])  # fmt: skip
    assert [(row["system"], row["kind"]) for row in results[0]["rows"]] == [
        ("vllm", "default"), ("vllm", "best"), ("mell", "default"), ("mell", "best")]  # fmt: skip


def test_a_sure_difference_that_no_printed_digit_shows_is_no_win() -> None:
    assert Change(0.0007, 0.0002, 0.0011).tells and not Change(0.0004, 0.0002, 0.0006).tells
    assert not Change(0.02, -0.01, 0.05).tells and Change(-0.02, -0.03, -0.01).tells
