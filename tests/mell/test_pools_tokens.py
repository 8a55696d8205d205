"""Several models with real tensors (runtime=local, fp32, CPU): every reply is the one that the request's own model
gives alone, while GPUs change hands and requests migrate."""

from __future__ import annotations

import random

import pytest
import torch

from common.driver import drive
from common.executors.cluster import pooled
from common.record import RequestColumns, RunRecord
from common.types import InstanceUp, RequestStatus
from tests.fakes import US, FakeWorkload
from tests.laws.strategies import NIGHTLY
from tests.mell.pools import pools


def play(seed):
    """One run of two tiny models, of other layers and weights; the executor, the policy and GPUs that changed hands."""
    from common.engine.manyworlds import ManyWorlds
    from common.engine.world import EngineWorld
    from common.executors.local import LocalExecutor
    from tests.engine.worlds import fitting_cluster, source_of, tiny_spec

    torch.set_num_threads(1)
    rng = random.Random(seed)
    specs = [tiny_spec(4), tiny_spec(3, num_heads=4)]
    sources = [source_of(specs[0], 0), source_of(specs[1], 1)]
    cluster = pooled([fitting_cluster(spec, 3, 20 * spec.num_layers, 16, startup_ns=500 * US)
                      for spec in specs])  # fmt: skip
    num = 10
    model = [index // 5 % 2 for index in range(num)] if rng.random() < 0.5 else [rng.randrange(2) for _ in range(num)]
    arrivals = sorted(rng.randint(0, 20_000) * US for _ in range(num))
    work = FakeWorkload(arrivals, [rng.randint(1, 90) for _ in range(num)], [rng.randint(1, 60) for _ in range(num)],
                        model=model)  # fmt: skip
    worlds = [EngineWorld(cluster.instances, spec, source, 16, poison=True) for spec, source in zip(specs, sources)]
    record = RunRecord(RequestColumns.empty(num))
    world = ManyWorlds(worlds, [info.model for info in cluster.instances])
    executor = LocalExecutor(cluster, work, record, world=world)
    policy = pools(cluster.info(), epoch_us=700, cooldown_us=1_000)
    owners: dict[int, set[int]] = {}
    seen = policy.on_event

    def note(now, event):
        if isinstance(event, InstanceUp):
            owners.setdefault(cluster.instances[event.instance].gpu, set()).add(cluster.instances[event.instance].model)
        return seen(now, event)

    policy.on_event = note
    drive(policy, executor, record)
    assert all(status == RequestStatus.FINISHED for status in record.requests.status)
    compared = check(executor, specs, sources, model)
    world.close()
    moved = sum(pool.mover.stats.kv_done + pool.mover.stats.token_done for pool in policy.pools)
    return compared, moved, sum(len(models) > 1 for models in owners.values())


def check(executor, specs, sources, model):
    """Against a dense decoder of the request's model; the other model would say something else."""
    from tests.engine.worlds import undisturbed

    compared = 0
    for request_id, ids in executor.tokens.items():
        length, output = executor.members.prompt[request_id], executor.members.output[request_id]
        alone = [undisturbed(spec, source, ids[:length], output) for spec, source in zip(specs, sources)]
        assert ids[length:] == alone[model[request_id]], f"request {request_id} differs from its model alone"
        assert output < 4 or alone[0] != alone[1], "the two models cannot be told apart"
        compared += output
    return compared


@pytest.mark.parametrize("part", range(2))
def test_replies_are_those_of_each_model_alone(part):
    compared = moved = handed = 0
    for seed in range(part, 60 if NIGHTLY else 12, 2):
        tokens, moves, hands = play(seed)
        compared, moved, handed = compared + tokens, moved + moves, handed + hands
    assert compared > 500 and moved > 0 and handed > 0
