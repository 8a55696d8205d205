"""Real tensors (runtime=local, fp32, CPU): a reply is the same whether its request migrates never, once, or at every
epoch, as KV or as tokens. Free cells hold NaN, and bytes move when the virtual copy ends: early reads would show."""

from __future__ import annotations

import random
from itertools import cycle

import pytest
import torch

from bench.mell.restless import Restless
from common.driver import drive
from common.record import RequestColumns, RunRecord
from common.types import RequestStatus
from tests.fakes import US, cluster
from tests.laws.strategies import NIGHTLY
from tests.mell.fleets import policy, workload

SCHEDULES = 200 if NIGHTLY else 40


MODES = {"never": None, "kv": ("kv",), "tokens": ("tokens",), "both": ("kv", "tokens")}


def play(seed, mode, once, output=60):
    """One schedule with real tensors; returns the policy and how many tokens were compared."""
    from common.executors.local import LocalExecutor
    from tests.engine.worlds import check_tokens, tiny_world

    torch.set_num_threads(1)
    rng = random.Random(seed)
    instances = rng.choice((2, 3))
    model = cluster(instances, rng.choice((16, 40)), 4, running=instances)
    load = workload(rng, rng.randint(2, 4), 500, rng.choice((20, 90)), output)
    made = policy("mell", model.info(), epoch_us=rng.choice((700, 2_000)), max_leap=rng.choice((None, 3)))
    made.planner = Restless(instances, mode and cycle(mode), once)
    engine = tiny_world(model)
    record = RunRecord(RequestColumns.empty(len(load.prompt_tokens)))
    executor = LocalExecutor(model, load, record, world=engine)
    drive(made, executor, record)
    assert all(status == RequestStatus.FINISHED for status in record.requests.status)
    assert all(memory.used == 0 for memory in executor.state.memory)
    compared = check_tokens(executor)
    engine.close()
    return made, compared


@pytest.mark.parametrize("part", range(8))
def test_replies_are_those_of_an_undisturbed_run(part):
    """`check_tokens` compares every reply with a dense decoder that knows no paging; so the modes agree as well."""
    moved, rng = 0, random.Random(part)
    for seed in range(part, SCHEDULES, 8):
        name = list(MODES)[(seed + seed // 8) % 4]
        made, compared = play(seed, MODES[name], once=rng.random() < 0.4)
        stats = made.mover.stats
        assert compared > 0 and (name != "never" or stats.started == 0)
        moved += stats.kv_done + stats.token_done
    assert moved > 0


@pytest.mark.parametrize("mode", ["kv", "tokens"])
def test_one_schedule_in_all_modes(mode):
    made, _ = play(11, MODES[mode], once=False, output=150)
    stats = made.mover.stats
    assert (stats.kv_done if mode == "kv" else stats.token_done) >= 3
    stalls = [stall for stalls in stats.stalls_ns.values() for stall in stalls]
    assert len(stalls) == stats.kv_done + stats.token_done
    assert min(stalls) >= 0 and max(stalls) > 10 * US


def test_mell_itself_with_real_tensors():
    from common.executors.local import LocalExecutor
    from tests.engine.worlds import check_tokens, tiny_world

    torch.set_num_threads(1)
    model = cluster(4, 20, 4, running=2, extra={"nic_bandwidth": 2e8, "prefill_tokens_per_s": 1e6})
    load = workload(random.Random(5), 14, 500, 120, 90)
    made = policy("mell", model.info(), "hybrid", epoch_us=1_000)
    engine = tiny_world(model)
    record = RunRecord(RequestColumns.empty(14))
    executor = LocalExecutor(model, load, record, world=engine)
    drive(made, executor, record)
    check_tokens(executor)
    assert made.mover.stats.kv_done + made.mover.stats.token_done > 0
    engine.close()
