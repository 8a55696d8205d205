"""Designs by their counters, call counts, routing rules, failures and joins."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from common.errors import ConfigError
from common.types import CopySpan, RequestStatus, Status, Tier
from systems.memserve.config import Options, num_calls
from systems.memserve.job import Job
from systems.memserve.mempool import MemPool
from systems.memserve.scheduler import GlobalScheduler
from systems.memserve.site import Flow
from tests.memserve.lib import MS, PLANNER, Scenario, Turn, run

TURNS = tuple(Turn(0, 5, 20, 17) for _ in range(5))


def ladder(design, **more):
    options = Options(design=design, planner=PLANNER, **more)
    policy, executor = run(Scenario(TURNS, (48,), options, 2, 200, 0))
    assert all(status == RequestStatus.FINISHED for status in executor.record.requests.status)
    return [policy.flows[index] for index in range(len(TURNS))]


BLOCK, REPLY, USER = 16, 17, 20
BYTES = 4 * 4096 // BLOCK  # of a token: 4 layers
PROMPTS = [48 + USER + turn * (REPLY + USER) for turn in range(len(TURNS))]


def whole(tokens):
    """Tokens in full blocks."""
    return tokens - tokens % BLOCK


def at_p(flows):
    """By turn: prompt tokens that P read from its cache, and that it computed."""
    return [flow.hit for flow in flows], [flow.prompt - flow.hit for flow in flows]


def test_basic_computes_and_sends_everything_each_turn():
    flows = ladder("pd_basic")
    assert at_p(flows) == ([0] * len(TURNS), PROMPTS)
    assert [flow.sent_tokens for flow in flows] == PROMPTS
    assert not any(flow.back_bytes for flow in flows)


def test_caching_1_hits_the_last_prompt_and_still_sends_everything():
    """P -> D bytes grow with the turns. P computes the last reply, of which it has no KV, and the new text."""
    flows = ladder("pd_caching_1")
    hits, computed = at_p(flows)
    assert hits == [0, *(whole(prompt) for prompt in PROMPTS[:-1])]
    assert all(REPLY + USER <= tokens < REPLY + USER + BLOCK for tokens in computed[1:]), "flat, but for a part block"
    sent = [flow.sent_bytes for flow in flows]
    assert sent == [prompt * BYTES for prompt in PROMPTS] and sent == sorted(set(sent))
    assert not any(flow.back_bytes for flow in flows)


def test_caching_2_sends_the_increment_and_gains_nothing_at_p():
    """D keeps prompt and reply, so only what is new to it goes there. At P nothing changes against Caching-1: the hits
    of every turn are the same (flat from design to design), and so is what is computed (flat over the turns)."""
    one, two = ladder("pd_caching_1"), ladder("pd_caching_2")
    assert at_p(two) == at_p(one)
    kept = [0, *(whole(prompt + REPLY - 1) for prompt in PROMPTS[:-1])]  # the last token's KV is never made
    assert [flow.sent_tokens for flow in two] == [prompt - have for prompt, have in zip(PROMPTS, kept)]
    assert all(flow.sent_bytes == flow.sent_tokens * BYTES for flow in two)
    assert all(flow.sent_bytes <= (USER + 2 * BLOCK) * BYTES for flow in two[1:]), "increments, whatever the turn"
    assert not any(flow.back_bytes for flow in two)


def test_caching_3_brings_the_replies_back_so_p_computes_the_increment():
    """P's hits grow by a whole turn a turn, reply included; what it computes falls to the new text; D -> P carries
    the replies."""
    two, three = ladder("pd_caching_2"), ladder("pd_caching_3")
    hits, computed = at_p(three)
    assert hits == [0, *(whole(prompt + REPLY - 1) for prompt in PROMPTS[:-1])]
    assert all(USER < tokens <= USER + BLOCK for tokens in computed[1:])
    assert all(more - less >= REPLY - BLOCK for more, less in zip(hits[1:], at_p(two)[0][1:]))
    assert sum(hits) > sum(at_p(two)[0]) and sum(computed) < sum(at_p(two)[1])
    assert [flow.sent_tokens for flow in three] == [flow.sent_tokens for flow in two]
    assert all(0 < flow.back_tokens <= whole(REPLY + BLOCK) and flow.back_bytes for flow in three)


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
        assert policy.members.cm.declared == 1


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


def test_survivors_free_what_the_dead_instance_had_allocated(monkeypatch):
    """Its transfers under way held blocks at the receivers: they come back, and its requests end elsewhere."""
    broken = []
    arrived = MemPool.arrived

    def watched(pool, move, status, out):
        before = pool.moving[Tier.HBM]
        done = arrived(pool, move, status, out)
        if status is not Status.OK and move.src.dead and not pool.dead:
            broken.append(before - pool.moving[Tier.HBM])
        return done

    monkeypatch.setattr(MemPool, "arrived", watched)
    options = Options(design="pd_caching_3", roles="2P1D", transfer="by_request", heartbeat_s=0.0005, timeout_s=0.0015,
                      planner=PLANNER)  # fmt: skip
    turns = tuple(Turn(index, 1, 40, 20) for index in range(8))
    for when in range(2, 14):
        scenario = Scenario(turns, (48,) * 8, options, 3, 60, 0, losses=((when, 0),))
        _, executor = run(scenario)  # asserts that no block and no pin is left anywhere
        assert all(status == RequestStatus.FINISHED for status in executor.record.requests.status)
    assert broken and all(blocks > 0 for blocks in broken), "no transfer was cut off by the death"


def test_requests_of_a_dead_instance_wait_for_its_time_out():
    """Nobody knows before the manager does; then they go on elsewhere with what they have said."""
    options = Options(design="colocated_caching", policy="round_robin", heartbeat_s=0.0005, timeout_s=0.0015,
                      planner=PLANNER)  # fmt: skip
    base = Scenario((Turn(0, 1, 40, 40), Turn(1, 0, 40, 40)), (0, 0), options, 2, 60, 0)
    _, calm = run(base)
    _, executor = run(replace(base, losses=((10, 0), )))
    undisturbed, finish = max(calm.record.requests.finish_ns), max(executor.record.requests.finish_ns)
    assert undisturbed < finish and finish > 10 * MS // 10 + int(0.0015e9)
    assert list(executor.record.requests.output_tokens) == [40, 40]


def test_a_false_hit_costs_time():
    """The scheduler sends a turn after a prefix that its instance has forgotten: it is computed anew, later."""
    turns = (Turn(0, 0, 40, 17), Turn(0, 30, 40, 17))
    ttft = {}
    for ttl in (None, 0.0001):
        options = Options(design="colocated_caching", local_ttl_s=ttl, tree_ttl_s=10.0, swap=False, heartbeat_s=0.0005,
                          planner=PLANNER)  # fmt: skip
        policy, executor = run(Scenario(turns, (400,), options, 1, 100, 0))
        times = executor.record.requests
        ttft[ttl] = times.first_token_ns[1] - times.arrival_ns[1]
        assert policy.flows[1].expected > 400 and policy.flows[1].hit == (0 if ttl else policy.flows[1].expected)
    assert ttft[0.0001] > ttft[None]


def test_a_turn_waits_for_the_reply_and_carries_it():
    """Closed loop: what was generated is part of the next prompt, and PD-Caching-3 reads it from P's cache."""
    policy, executor = run(Scenario(TURNS, (48,), Options(design="pd_caching_3", planner=PLANNER), 2, 200, 0))
    times = executor.record.requests
    for index in range(1, len(TURNS)):
        assert times.arrival_ns[index] > times.finish_ns[index - 1]
        flow, before = policy.flows[index], policy.flows[index - 1]
        assert flow.prompt == before.prompt + 17 + 20
        assert flow.hit > before.prompt, "the hit reaches into the reply"


@pytest.mark.parametrize("policy", ["mooncake", "sglang_router"])
def test_rules_of_other_routers(policy):
    """Mooncake: fetches a much longer prefix rather than queue behind it. SGLang: the best match above the threshold,
    else the smallest tree, and the shortest queue once loads are uneven."""
    gs = scheduler(policy, router_abs=3)
    gs.responded(0, 1, DOC, 160)
    assert gs.route(1, 0, DOC, 160, -1)[:1] == (1,), "the best match"
    gs.queue[1] = {index: 10**9 for index in range(5)}
    prefill, _, fetch, _ = gs.route(1, 1, DOC, 160, -1)
    assert (prefill, fetch) == ((0, 1) if policy == "mooncake" else (0, -1))
    if policy == "sglang_router":
        gs.queue[1] = {}
        assert gs.route(1, 2, (("else", 0, 160),), 160, -1)[:1] == (0,), "no match: the smallest tree"


@pytest.mark.parametrize("mode", ["by_layer", "by_request", "by_request_agg"])
def test_ordered_transfers_of_an_instance_never_overlap(mode):
    """One communicator: what a prefill instance sends goes in order; without the option copies run side by side."""
    turns = tuple(Turn(index, 0, 60, 3) for index in range(6))
    overlaps = {}
    for ordered in (True, False):
        options = Options(design="pd_basic", transfer=mode, roles="1P1D", ordered=ordered, planner=PLANNER)
        _, executor = run(Scenario(turns, (48,) * 6, options, 2, 90, 0, budget=24))
        moves = executor.record.moves
        times = sorted(zip(moves.start_ns, moves.end_ns))
        assert len(times) == len(turns)
        overlaps[ordered] = sum(start < end for (_, end), (start, _) in pairwise(times))
    assert overlaps[True] == 0
    assert overlaps[False] or mode == "by_request_agg", "few calls: these copies are over before the next begins"


def test_decode_goes_where_its_prefix_is_unless_load_is_uneven():
    options = Options(planner=PLANNER, decode_slack=2)
    gs = GlobalScheduler(options, ["prefill", "decode", "decode"], 16, 100)
    for instance in range(3):
        gs.join(instance, 0)
    gs.responded(0, 2, DOC, 160)
    assert gs.pick_decode(1, DOC, 160) == 2
    gs.decodes[2] = {index: 160 for index in range(2)}
    assert gs.pick_decode(1, DOC, 160) == 2, "within the slack locality decides"
    gs.decodes[2] = {index: 160 for index in range(3)}
    assert gs.pick_decode(1, DOC, 160) == 1, "beyond it load does"


def test_swap_in_only_where_it_is_faster_than_computing():
    turns = (Turn(0, 0, 40, 17), Turn(0, 30, 40, 17))
    for gb_s, swapped in ((1000.0, True), (0.0001, False)):
        options = Options(design="colocated_caching", swap_low=1.0, swap_high=1.0,
                          planner=replace(PLANNER, swap_gb_s=gb_s))  # fmt: skip
        policy, executor = run(Scenario(turns, (400,), options, 1, 100, 60))
        assert executor.record.requests.status[1] == RequestStatus.FINISHED
        assert (policy.flows[1].swapped > 0) == swapped


def test_a_hit_is_what_the_prefill_had():
    """Not what was fetched for it in vain: in an earlier try at an instance that died, or let go to make room."""
    policy = Scenario(TURNS, (48,), Options(planner=PLANNER), 2, 200, 0).policy()
    job = Job(0, 100, 5, None, -1)
    flow = policy.flows[0] = Flow(100, -1)
    flow.fetched, job.had = 48, 16
    policy._note_hit(job)
    assert flow.hit == 16


def test_roles_by_instance():
    assert Options(roles=["decode", "both", "prefill"]).role_of(3) == ["decode", "both", "prefill"]
    with pytest.raises(ConfigError):
        Options(roles=["decode", "both"]).role_of(3)
    options = Options(roles=["decode", "both", "prefill"], policy="round_robin", planner=PLANNER)
    turns = tuple(Turn(index, 1, 40, 5) for index in range(6))
    policy, executor = run(Scenario(turns, (0,) * 6, options, 3, 60, 0))
    assert {flow.prefill_at for flow in policy.flows.values()} == {1, 2}
    assert all(flow.decode_at == 1 for flow in policy.flows.values() if flow.prefill_at == 1), "both in one place"
    assert all(status == RequestStatus.FINISHED for status in executor.record.requests.status)
