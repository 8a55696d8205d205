"""Llumnix: books under migrations, drains and losses; who moves and why; exact tokens."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.sched.lane import EngineConfig
from common.types import CopySpan, StopInstance
from systems.baselines.llumnix import LlumnixConfig, LlumnixPolicy
from systems.baselines.vllm import VllmPolicy
from systems.registry import make_policy
from tests.baselines.worlds import Load, Run, leap_matters, loads, play_local
from tests.fakes import US
from tests.laws.strategies import law


def policy(info, engine, threshold=3.0, drain=(), migrate=True, poll_us=300):
    return LlumnixPolicy(info, engine, LlumnixConfig(poll_us * US, threshold, migrate, drain))


def check(run: Run) -> None:
    """Nobody is forgotten; at boundaries both sides count the same blocks."""
    made = run.policy
    assert set(made.seqs) == run.live()
    somewhere = {seq.request_id for seq in made.orphans} | set(made.mover.by_request)
    for lane in [*made.lanes.values(), *made._dying.values()]:
        somewhere |= {*lane.running, *(seq.request_id for seq in (*lane.waiting, *lane.joining))}
    assert somewhere == run.live()
    for instance, lane in made.lanes.items():
        served = run.executor.lanes.get(lane.lane)
        assert 0 <= lane.free <= lane.num_blocks
        if served is None or served.command_id is None or served.ran == served.step_from:
            used = (lane.num_blocks - lane.free) * run.model.num_layers
            assert run.executor.state.memory[instance].used == used, f"instance {instance}"


THRESHOLDS = st.sampled_from((0.5, 1.0, 3.0))
DRAINS = st.sampled_from(((), (), ((2_000 * US, 0),), ((0, 1),)))


def test_everyone_ends_and_no_block_is_lost():
    met: Counter[str] = Counter()

    @law(150)
    @given(loads(), THRESHOLDS, DRAINS)
    def draws(load, threshold, drain):
        run = Run(load, policy(load.model().info(), load.engine(), threshold, drain), check=check).drive()
        met["moved"] += run.policy.mover.stats.kv_done
        met["aborted"] += run.policy.mover.stats.aborted
        met["stopped"] += len(run.commands(StopInstance))
        for instance, lane in run.policy.lanes.items():
            assert lane.empty and lane.free == lane.num_blocks, f"instance {instance}"

    draws()
    assert met["moved"] > 20 and met["aborted"] and met["stopped"], met


@law(100)
@given(loads(), THRESHOLDS, DRAINS)
def test_leaps_of_any_size_give_the_same_times(load, threshold, drain):
    def play(load):
        return Run(load, policy(load.model().info(), load.engine(), threshold, drain)).drive()

    assert not leap_matters(load, play)


def test_a_run_is_the_same_every_time():
    load = Load(tuple((200, 60, 20 + 30 * (index % 3)) for index in range(30)))
    traces = [Run(load, policy(load.model().info(), load.engine())).drive().trace for _ in range(2)]
    assert traces[0] == traces[1]


def test_a_head_of_line_request_gets_room_by_a_move():
    """Free memory is in pieces, and a prompt fits in none: whoever runs before it leaves for the other instance."""
    requests = ((0, 100, 120), (0, 100, 120), (0, 60, 120), (500, 260, 4))
    load = Load(requests, blocks=24)
    moved = Run(load, policy(load.model().info(), load.engine(), threshold=1.0, poll_us=100), check=check).drive()
    stayed = Run(load, policy(load.model().info(), load.engine(), migrate=False), check=check).drive()
    copy = moved.commands(CopySpan)[0]
    assert (copy.request_id, copy.src, copy.dst) == (1, 1, 0)
    first = [run.record.requests.first_token_ns[3] for run in (moved, stayed)]
    assert first[0] < first[1] and not stayed.commands(CopySpan)


def test_who_waits_for_blocks_of_a_move_that_is_given_up_starts():
    """A large request that is on its way to an idle instance finishes first; nothing else happens there."""
    load = Load(((50, 300, 10), (4000, 300, 10), (1000, 33, 60), (1000, 33, 120)), instances=3, blocks=20, layers=6,
                max_leap=7)  # fmt: skip
    assert Run(load, policy(load.model().info(), load.engine()), check=check).drive().finished() == 4


def test_a_drained_instance_is_emptied_and_stops():
    load = Load(tuple((300, 40, 60) for _ in range(12)), blocks=60)
    run = Run(load, policy(load.model().info(), load.engine(), drain=((2_000 * US, 0),)), check=check).drive()
    [stop] = run.commands(StopInstance)
    assert stop.instance == 0 and list(run.policy.lanes) == [1]
    assert run.policy.mover.stats.kv_done > 0 and sum(run.record.requests.num_preemptions) == 0


def test_without_overload_ttft_is_near_vllm_and_nobody_moves():
    load = Load(tuple((2000, 60, 12) for _ in range(40)), blocks=200)
    mine = Run(load, policy(load.model().info(), load.engine())).drive()
    theirs = Run(load, VllmPolicy(load.model().info(), load.engine())).drive()
    assert not mine.commands(CopySpan)
    ttft = [sum(a - b for a, b in zip(run.record.requests.first_token_ns, run.record.requests.arrival_ns))
            for run in (mine, theirs)]  # fmt: skip
    assert ttft[0] == pytest.approx(ttft[1], rel=0.05)


@pytest.mark.parametrize(("options", "text"), [
    ({"drain": [[1, 2]]}, "of the 2 instances"),
    ({"drain": [[1, 0], [2, 1]]}, "leave an instance"),
    ({"drain": [3]}, "give .*seconds, instance"),
    ({"migrate": 1}, "use true or false"),
    ({"threshold": -1}, "system.threshold=-1"),
])  # fmt: skip
def test_bad_options_are_one_line(options, text):
    with pytest.raises(ConfigError, match=text):
        make_policy("llumnix", Load(()).model().info(), EngineConfig(), options)


def test_prefix_caching_is_refused():
    with pytest.raises(ConfigError, match="does not cache prefixes"):
        make_policy("llumnix", Load(()).model().info(), EngineConfig(prefix_caching=True), {})


def test_replies_are_those_of_an_undisturbed_run():
    moved = 0

    @law(16)
    @given(loads(small=True), DRAINS)
    def draws(load, drain):
        nonlocal moved
        run = play_local(load, lambda info, engine: policy(info, engine, 1.0, drain, poll_us=70), check)
        moved += run.policy.mover.stats.kv_done

    draws()
    assert moved > 3
