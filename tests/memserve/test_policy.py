"""Designs by their counters, call counts, routing rules, failures and joins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ConfigError
from common.types import CopySpan, RequestStatus
from systems.memserve.config import Options, num_calls
from systems.memserve.scheduler import GlobalScheduler
from tests.memserve.lib import PLANNER, Scenario, Turn, run

TURNS = tuple(Turn(0, 5, 20, 17) for _ in range(5))


def ladder(design, **more):
    options = Options(design=design, planner=PLANNER, **more)
    policy, executor = run(Scenario(TURNS, (48,), options, 2, 200, 0))
    assert all(status == RequestStatus.FINISHED for status in executor.record.requests.status)
    return [policy.flows[index] for index in range(len(TURNS))]


def test_basic_and_caching_1_send_everything_each_turn():
    for design in ("pd_basic", "pd_caching_1"):
        sent = [flow.sent_tokens for flow in ladder(design)]
        assert sent == [flow.prompt for flow in ladder(design)]


def test_caching_2_sends_increments_and_caching_3_lets_p_hit_the_replies():
    one, two, three = (ladder(f"pd_caching_{number}") for number in (1, 2, 3))
    assert all(flow.sent_tokens <= 20 + 32 for flow in two[1:]) and all(flow.back_tokens == 0 for flow in two)
    assert [flow.hit for flow in one] == [flow.hit for flow in two]
    assert all(more.hit > flow.hit for more, flow in zip(three[1:], two[1:]))
    assert all(flow.back_tokens > 0 for flow in three)


@pytest.mark.parametrize("mode", ["by_layer", "by_request", "by_request_agg"])
def test_call_counts(mode):
    assert num_calls(mode, 3, 40, 1) == {"by_request_agg": 3}.get(mode, 240)
    seen = []
    scenario = Scenario(TURNS[:1], (48,), Options(design="pd_basic", transfer=mode, planner=PLANNER), 2, 200, 0)
    from common.executors.sim import SimExecutor

    workload, record, _, _ = scenario.parts()
    executor = SimExecutor(scenario.model(), workload, record)
    submit = executor.submit
    executor.submit = lambda command: (seen.append(command), submit(command))
    run(scenario, executor, record)
    (copy,) = [command for command in seen if isinstance(command, CopySpan)]
    assert copy.num_calls == num_calls(mode, 5, 4, 1) and copy.by_layer == (mode == "by_layer")


def scheduler(policy, **more):
    options = Options(policy=policy, planner=PLANNER, **more)
    gs = GlobalScheduler(options, ["prefill", "prefill", "decode"], 16, 100)
    for instance in range(3):
        gs.join(instance, 0)
    return gs


DOC = (("doc", 0, 160),)


def test_longest_prefix_ignores_load_and_cost_does_not():
    for policy, busy in (("prompt_tree_longest", 1), ("prompt_tree_cost", 0)):
        gs = scheduler(policy)
        gs.responded(0, 1, DOC, 160)
        assert gs.route(1, 0, DOC, 160, -1)[:1] == (1,)
        gs.queue[1] = {index: 10**9 for index in range(5)}
        assert gs.route(1, 1, DOC, 160, -1)[:1] == (busy,)


def test_guard_and_ttl():
    gs = scheduler("prompt_tree_longest", guard_s=0.001, tree_ttl_s=1.0)
    gs.responded(0, 1, DOC, 160)
    assert gs.matched(0, 1, DOC, 160) == 144, "the last prompt token is always computed"
    gs.queue[1] = {0: 10**9}
    assert gs.route(1, 1, DOC, 160, -1).prefill == 0 and gs.guarded == 1
    assert gs.matched(2 * 10**9, 1, DOC, 160) == 0


def test_eq_2_fetches_only_what_is_faster_to_bring():
    gs = scheduler("prompt_tree_cost")
    gs.responded(0, 1, DOC, 160)
    gs.queue[1] = {index: 10**9 for index in range(5)}
    assert gs.route(1, 1, DOC, 160, -1).fetch == 1
    gs.token_bytes = 10**6
    assert gs.route(1, 2, DOC, 160, -1).fetch == -1


def test_session_rule_sticks():
    gs = scheduler("session")
    homes = {gs.route(0, index, DOC, 160, 7).prefill for index in range(4)}
    assert len(homes) == 1


def test_kill_is_detected_and_requests_go_on_elsewhere():
    turns = tuple(Turn(index, 1, 40, 20) for index in range(8))
    options = Options(design="pd_caching_3", roles="2P2D", heartbeat_s=0.0005, timeout_s=0.0015, restart=True,
                      planner=PLANNER)  # fmt: skip
    base = Scenario(turns, (48,) * 8, options, 4, 60, 0)
    for victim in range(4):
        policy, executor = run(replace(base, losses=((8, victim),)))
        assert all(status == RequestStatus.FINISHED for status in executor.record.requests.status)
        assert policy.cm.declared == 1


def test_options_are_checked():
    for bad in ({"design": "pd"}, {"transfer": "x"}, {"policy": "best"}, {"nothing": 1}):
        with pytest.raises(ConfigError):
            Options.of(bad)
    with pytest.raises(ConfigError):
        Options(design="pd_basic", roles="2P").role_of(2)
    assert Options(roles="1P2D").role_of(3) == ["prefill", "decode", "decode"]


def test_an_instance_that_dies_before_it_is_heard_of_is_started_anew():
    options = Options(design="pd_basic", roles="1P1D", restart=True, heartbeat_s=0.0005, timeout_s=0.0015,
                      planner=PLANNER)  # fmt: skip
    scenario = Scenario((Turn(0, 0, 40, 5),), (0,), options, 2, 10, 0, losses=((0, 1),))
    _, executor = run(scenario)
    assert executor.record.requests.status[0] == RequestStatus.FINISHED
