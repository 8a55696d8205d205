"""Instances of several ranks in one process: the tokens of TP 1, whatever the systems do with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.build import cluster_model
from common.engine.runner import Item
from common.engine.work import Batch, Work
from common.engine.world import EngineWorld
from common.errors import ConfigError, ContractError
from common.metrics import summarize
from common.spanning import gpus_per_instance
from common.types import RequestStatus, Span, Tier
from tests.dist.stories import BASELINES, STORIES, Play, Story, play
from tests.engine.worlds import check_replies, fitting_cluster, source_of, tiny_spec
from tests.laws.strategies import NIGHTLY
from tests.tp.lib import MODELS, PLAIN

MODELLED = "runtime.clock=modelled"


def local(story: Story, *more: str) -> Play:
    made = play(story, "local", MODELLED, "runtime.check=true", *more)
    assert set(made.record.requests.status) == {RequestStatus.FINISHED}
    assert check_replies(made.executor) == sum(made.record.requests.output_tokens) > 0
    return made


@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_the_same_at_any_tp(model: str) -> None:
    story = replace(PLAIN, overrides=(*PLAIN.overrides, *MODELS[model]))
    one = local(story)
    for tp in ("2", "4", "[4,1]"):
        assert local(story, f"cluster.tp={tp}").tokens == one.tokens, tp


@pytest.mark.parametrize("name", [*STORIES, "vllm_pp", "infercept"])
def test_a_system_with_instances_of_two_ranks(name: str) -> None:
    """Drops, loads, hops, borrowing, transfers, migration and swaps, rank by rank; NaN in free cells."""
    story = {**STORIES, **BASELINES}[name]
    made = local(story, "cluster.tp=2")
    found = made.counts()
    assert all(found[kind] > 0 for kind in story.happened if kind not in ("hidden", "attention")), found
    remote = made.report["remote_attention"]
    assert ("attention" not in story.happened) or remote["iterations"] > 0


@pytest.mark.parametrize("name, tp", [("memserve", "[1,2,4,1]"), ("memserve", "[4,1,1,4]"), ("mell", "[1,2,4,2]"),
                                      ("mell", "[4,2,1,1]"), ("llumnix", "[2,4]"), ("llumnix", "[4,1]"),
                                      ("pd", "[1,4]"), ("pd", "[4,2]")])  # fmt: skip
@pytest.mark.parametrize("kv_heads", [1, 4] if NIGHTLY else [4])
def test_kv_goes_between_instances_of_different_tp(name: str, tp: str, kv_heads: int) -> None:
    story = {**STORIES, **BASELINES}[name]
    sizes = ("model.num_heads=4", f"model.num_kv_heads={kv_heads}", "cluster.gpus_per_node=16")
    made = local(replace(story, overrides=(*story.overrides, *sizes)), f"cluster.tp={tp}")
    assert made.counts()["copy"] > 0
    tps = made.executor.world.tps
    assert any(tps[src] != tps[dst] for src, dst in zip(made.record.moves.src, made.record.moves.dst))


@pytest.mark.parametrize("name", ["kunserve", "infinite_llm"])
def test_parameters_and_queries_do_not_cross_unlike_instances(name: str) -> None:
    story = STORIES[name]
    tps = "[1,2]" if story.instances == 2 else "[1,2,4]"
    with pytest.raises(ConfigError, match=rf"^system={name} needs instances of one TP, not cluster.tp=\[1, 2"):
        local(story, f"cluster.tp={tps}")


def test_whoever_orders_it_all_the_same_is_told() -> None:
    spec = tiny_spec(2)
    infos = tuple(fitting_cluster(spec, 2, 8, 16, tp=tp).instances[index] for index, tp in enumerate((1, 2)))
    world = EngineWorld(infos, spec, source_of(spec), 16)
    try:
        for index in (0, 1):
            world.start(index)
            world.instances[index].drop((1, 2))
        for source, index in ((0, 1), (1, 0)):
            with pytest.raises(ContractError, match=rf"instances {source} and {index} differ in TP"):
                world.load(index, [1], source)
        work = Work(0, 16, 1, True, (Span(0, (0, 1), 0, 16), Span(1, (0, 1), 16, None)))
        for index in (0, 1):
            world.instances[index].stores[Tier.HBM].append(0, 0, 1, index)
        with pytest.raises(ContractError, match="instances 0 and 1 differ in TP"):
            world.run_stage(Item(Batch.of([work]), [3]), 0, (0, 1))
    finally:
        world.close()


@pytest.mark.parametrize("tp, why", [("[1,2,1]", "one for each of the 2 instances"), ("[1,0]", "cluster.tp"),
                                     ("[5,1]", "do not divide"), ("3", "do not divide"),
                                     ("[6,4]", "two nodes")])  # fmt: skip
def test_what_cannot_be_is_refused(tp: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        local(PLAIN, f"cluster.tp={tp}")


def test_gpus_of_unlike_instances_are_counted_each() -> None:
    more = ("cluster.num_instances=3", "cluster.tp=[1,4,2]", "cluster.gpus_per_node=8")
    config = replace(PLAIN, instances=3).config(*more)
    summary = summarize(play(PLAIN, "sim", *more).record, config.slo, gpus_per_instance(config))
    assert summary["peak_num_gpus"] == config.cluster.num_gpus == 7
    alike = PLAIN.config("cluster.tp=2")
    assert summarize(play(PLAIN, "sim", "cluster.tp=2").record, alike.slo, gpus_per_instance(alike))[
        "peak_num_gpus"] == alike.cluster.num_gpus == 4  # fmt: skip
    info = cluster_model(config)
    one, two = (info.link(0, index).bandwidth for index in (1, 2))
    assert one == two and info.link(1, 2).bandwidth == 2 * one, "an instance has as many links as GPUs"
    assert len({info.cost_at(index)(4, True, True).iteration_ns([(64, 0)], 0, 0, 1) for index in range(3)}) == 3
