"""The ablations' switches: each exists, is refused in one line where it makes no sense, and does what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.build import cluster_model
from common.config import compose
from common.engine.runner import LayerTimes, Remote, StageTimes
from common.errors import ConfigError
from common.executors.local import LocalExecutor
from common.record import RequestColumns, RunRecord
from common.types import CopySpan, RunStep, Send
from systems.infinite_llm.messages import Freeze, MoveKvcache, TryMoveKvcache
from systems.infinite_llm.settings import from_options
from tests.engine.worlds import tiny_spec, tiny_world
from tests.fakes import FakeWorkload, cluster
from tests.infinite_llm.worlds import CYCLE, FAST, Run, World
from tests.unit.test_sim_moves import decode_ns, play, remote_ns, spread

# A home that fills, others with room, and requests that wait: something to plan and something to relieve.
BUSY = World(4, 40, tuple((200 * i, 300 if i % 4 == 0 else 60, 120) for i in range(16)), FAST, budget=512)


def sent(run: Run, kind: type) -> list[Send]:
    return [c for *_, commands in run.trace for c in commands if isinstance(c, Send) and isinstance(c.payload, kind)]


def test_remote_partials_run_beside_the_local_one_or_after_it() -> None:
    """By hand: max(local, remote) + merge in every layer, or their sum."""
    side, after = (play(spread, [64, 10], [3, 1], overlap=overlap) for overlap in (True, False))
    times = [run.record.requests.finish_ns[0] - run.times[-1] for run in (side, after)]
    assert times[0] == remote_ns(65, 32) + remote_ns(66, 32)
    remote = (5_000 + 128) + 3 * 32 + (5_000 + 160)
    assert times[1] == sum(decode_ns(context - 32) + 4 * (remote + 101) for context in (65, 66))
    assert times[1] > times[0]


@pytest.mark.parametrize("overlap", (True, False))
def test_the_measured_clock_overlaps_as_well(overlap: bool) -> None:
    """Two creditors took 20 and 30 ms, home 25 ms; the messages' time over the links comes on top."""
    model = cluster(3, 8, overlap=overlap, max_model_len=4096)
    engine = tiny_world(model, tiny_spec())
    record = RunRecord(RequestColumns.empty(1))
    executor = LocalExecutor(model, FakeWorkload([0], [4], [2]), record, world=engine, measured=True)
    played = World(3, 8, ((0, 4, 2),)).policy(model)
    while (item := executor.poll()) is not None:
        for command in played.on_event(*item):
            executor.submit(command)
        if executor.lanes:
            break
    layer = LayerTimes(0.025, [Remote(1, 0, 0, 0.020), Remote(2, 0, 0, 0.030)])
    lane = next(iter(executor.lanes.values()))
    took = executor._account(lane, 0, StageTimes(0.080, [layer]))
    slowest = 0.030 + 2 * 20_000e-9  # creditor 2 is on another node: latency there and back
    rest = 0.080 - 0.020 - 0.030
    assert took == pytest.approx(1e9 * (rest + (slowest - 0.025 if overlap else slowest)), abs=2)
    engine.close()


def test_the_configuration_reaches_the_executor() -> None:
    base = ["experiment=infinite_llm/mixes", "cluster.num_instances=2"]
    assert cluster_model(compose(base)).overlap and not cluster_model(compose([*base, "system.overlap=false"])).overlap


def test_moves_run_beside_decoding_or_stop_it() -> None:
    """Beside it at a pace; with `move_overlap=false` at full speed, while the source stands still."""
    runs = [replace(BUSY, settings=replace(FAST, move_overlap=beside)).run() for beside in (True, False)]
    for run, beside in zip(runs, (True, False)):
        copies = [c for *_, commands in run.trace for c in commands if isinstance(c, CopySpan)]
        assert copies and all((c.pace is not None) is beside for c in copies)


def test_reactive_makes_no_plans_and_proactive_does() -> None:
    plans = {mode: sent(replace(BUSY, settings=replace(FAST, mode=mode)).run(), MoveKvcache)
             for mode in ("proactive", "reactive")}  # fmt: skip
    assert plans["proactive"] and not plans["reactive"]


def test_a_random_creditor_is_another_one_and_the_same_in_every_run() -> None:
    asked = {}
    for creditor in ("most_free", "random"):
        world = replace(BUSY, settings=replace(FAST, creditor=creditor))
        first, again = ([send.to for send in sent(world.run(), TryMoveKvcache)] for _ in range(2))
        assert first == again
        asked[creditor] = first
    assert asked["most_free"] != asked["random"] and len(set(asked["random"])) > 1


def test_dgfm_off_freezes_nobody() -> None:
    runs = [replace(CYCLE, settings=replace(CYCLE.settings, dgfm=dgfm)).run() for dgfm in (True, False)]
    assert sent(runs[0], Freeze) and not sent(runs[1], Freeze)


def test_off_borrows_nothing() -> None:
    run = replace(BUSY, settings=replace(FAST, mode="off")).run()
    assert not any(isinstance(c, Send | CopySpan) for *_, commands in run.trace for c in commands)
    assert any(isinstance(c, RunStep) for *_, commands in run.trace for c in commands)


@pytest.mark.parametrize("key", ("overlap", "move_overlap", "locality", "dgfm"))
def test_a_switch_is_true_or_false(key: str) -> None:
    with pytest.raises(ConfigError, match=f"system.{key}='yes': use true or false"):
        from_options({key: "yes"})
