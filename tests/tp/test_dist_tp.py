"""Instances of several workers: a worker is a rank. Tokens are those of `local` bit by bit, bytes are those planned,
and a rank that dies takes its instance along."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace

import pytest

from common.build_local import decoder_spec, parameter_source
from common.comm.hub import Timeouts
from common.comm.peers import KINDS
from common.types import RequestStatus
from tests.deadline import at_most
from tests.dist.pool import after_orders, nothing_left, own_hub
from tests.dist.stories import BASELINES, STORIES, Play, play, replay
from tests.engine.worlds import check_replies
from tests.laws.strategies import NIGHTLY
from tests.tp.lib import MODELS, PLAIN

TOLD = {**STORIES, **BASELINES, "plain": PLAIN}
TIMEOUTS = Timeouts(start_s=60.0, reply_s=60.0, transfer_s=60.0, heartbeat_s=20.0)
TWO = ("cluster.num_instances=2", "cluster.gpus_per_node=16")
CASES = {  # story, TP of each instance, model
    "kunserve": ((2, 2), ()),
    "infinite_llm": ((2, 2, 2), ()),
    "memserve": ((1, 4, 2, 1), ("model.num_heads=4", "model.num_kv_heads=4")),
    "mell": ((2, 1, 1, 2), ()),
    "pd": ((1, 4), MODELS["llama, 8"]),
    "vllm_pp": ((2, 1), ()),
    "plain": ((4, 2), MODELS["qwen3, 4"]),
}
IN_CI = ("kunserve", "pd", "vllm_pp")  # remote attention rank by rank: tests/dist/test_random.py


def config_of(name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    tps, model = CASES[name]
    return tps, (*model, f"cluster.tp={list(tps)}".replace(" ", ""), "cluster.gpus_per_node=16")


def finished(made: Play, more: tuple[str, ...]) -> None:
    config = made.story.config("runtime=dist", *more)
    made.executor.world.source = parameter_source(config, decoder_spec(config, made.executor.world.spec.dtype))
    assert set(made.record.requests.status) == {RequestStatus.FINISHED}
    assert check_replies(made.executor) == sum(made.record.requests.output_tokens) > 0


@pytest.mark.parametrize("name", CASES if NIGHTLY else IN_CI)
def test_a_rank_is_a_worker(name: str) -> None:
    story, (tps, more) = TOLD[name], config_of(name)
    lines: list = []
    hub = own_hub(sum(tps), TIMEOUTS, tps)
    with nothing_left(hub), at_most(180):
        real = play(story, "dist", "runtime.check=true", *more, hub=hub, sink=lines.append)
        assert hub.unclaimed == 0, "answers that nobody will ask for"
    finished(real, more)
    local = play(story, "local", "runtime.clock=modelled", *more)
    assert real.tokens == local.tokens and real.record.requests == local.record.requests
    assert replay(story, lines, *more).num_commands == real.record.num_commands
    happened = real.counts()
    assert all(happened[kind] > 0 for kind in (*story.happened, "reduce")), happened
    for kind in KINDS:
        found = {real.report[f"{count}_bytes"][kind] for count in ("ordered", "acknowledged", "sent", "received")}
        assert len(found) == 1, (kind, real.report)
    moves = real.record.moves
    planned = sum(size for src, dst, size in zip(moves.src, moves.dst, moves.num_bytes) if src != dst)
    assert real.report["sent_bytes"]["copies"] == planned
    remote = real.report["remote_attention"]
    assert real.report["sent_bytes"]["attention"] == remote["out_bytes"] + remote["back_bytes"]
    if name in ("memserve", "mell", "pd"):
        assert any(tps[src] != tps[dst] for src, dst in zip(moves.src, moves.dst)), "no KV between unlike instances"


@pytest.mark.parametrize("seed", range(4 if NIGHTLY else 1))
@pytest.mark.parametrize("name", ["kunserve", "mell"])
def test_a_rank_that_dies_is_a_lost_instance(name: str, seed: int) -> None:
    """Recovered from like any loss; its siblings, which wait for its part of a sum, end too."""
    story, (tps, more) = TOLD[name], config_of(name)
    rng = random.Random(f"rank of {name} {seed}")
    lines: list = []
    hub = own_hub(sum(tps), TIMEOUTS, tps)
    with nothing_left(hub), at_most(120):
        victim = rng.choice([team for team in hub.teams if len(team) > 1])
        rank = rng.choice(victim)
        after_orders(hub, {rng.randrange(40, 400): lambda: os.kill(hub.processes[rank].pid, signal.SIGKILL)})
        made = play(story, "dist", *more, hub=hub, sink=lines.append)
        hub.drain(0.5)
        assert not hub._answers, "answers that nobody will ask for"
    finished(made, more)
    assert list(made.report["lost_workers"]) == [str(hub.instance_of[rank])]
    assert set(hub.lost) == set(victim)
    for kind in KINDS:
        acknowledged, received, sent, ordered = (
            made.report[f"{count}_bytes"][kind] for count in ("acknowledged", "received", "sent", "ordered"))
        assert max(acknowledged, received) <= sent <= ordered, (kind, acknowledged, received, sent, ordered)
    assert replay(story, lines, *more).num_commands == made.record.num_commands


def test_ranks_by_the_wall_clock() -> None:
    story, (tps, more) = replace(TOLD["memserve"], instances=2), config_of("pd")
    hub = own_hub(sum(tps), TIMEOUTS, tps)
    with nothing_left(hub), at_most(180):
        made = play(story, "dist", "runtime.clock=measured", *more, hub=hub)
    finished(made, more)
    assert made.counts()["copy"] > 0 and made.report["sent_bytes"]["reduce"] > 0
