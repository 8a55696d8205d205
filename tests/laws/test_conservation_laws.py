"""Conservation under random arrivals, preemptions and losses: requests, blocks and time, after every event."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.sched.compose import room_for
from common.types import (
    FreeSpan,
    InstanceLost,
    InstanceUp,
    RequestArrived,
    RequestStatus,
    Rule,
    RunStep,
    StartInstance,
    StepDone,
)
from systems.baselines.vllm import VllmPolicy
from tests.laws.lawlib import LAYERS, Outcome, Request, Scenario
from tests.laws.strategies import law, scenarios

CHECKED = law(150)


class Checker:
    """Compares a vllm policy's ledger with the simulator after every event, once its commands are in."""

    def __init__(self, scenario: Scenario, max_leap: int | None = None) -> None:
        self.scenario = scenario
        self.max_leap = max_leap
        self.policy = scenario.policy(max_leap)
        self.outcome = Outcome(scenario.executor(), self.policy)
        self.executor = self.outcome.executor
        self.columns = self.outcome.record.requests
        self.now_ns = 0
        self.arrived = 0

    def run(self) -> Outcome:
        self.outcome.drive(self.policy, self.after)
        return self.outcome

    def after(self, now_ns, event):
        assert now_ns >= self.now_ns, "time runs backwards"
        self.now_ns = now_ns
        self.arrived += isinstance(event, RequestArrived)
        self.requests_are_conserved()
        self.nobody_idles()
        if isinstance(event, StepDone) and (lane := self.lane(event.lane)) is not None:
            self.blocks_are_conserved(lane)

    def lane(self, lane_id):
        """The scheduler of a lane whose instance is up."""
        return next((lane for lane in self.policy.lanes.values() if lane.lane == lane_id), None)

    def requests_are_conserved(self):
        status = list(self.columns.status)
        live = status.count(RequestStatus.LIVE)
        ended = status.count(RequestStatus.FINISHED) + status.count(RequestStatus.REJECTED)
        assert self.arrived == live + ended
        assert self.executor.live == live
        if not self.policy._dying:  # else some wait for their step's failure to be told
            lanes = self.policy.lanes.values()
            assert sum(lane.outstanding() for lane in lanes) + len(self.policy._orphans) == live

    def blocks_are_conserved(self, lane):
        """At a boundary: free + held = total, on both sides of the contract."""
        memory = self.executor.state.memory[lane.stages[0].instance]
        assert 0 <= lane.free <= lane.num_blocks
        assert memory.used == (lane.num_blocks - lane.free) * LAYERS
        if not lane.running:
            cached = lane.index.cached_blocks if lane.index is not None else 0
            assert lane.free + cached == lane.num_blocks
            assert memory.cached == memory.used == cached * LAYERS
        if lane.index is not None:
            lane.index.check()
            assert lane.index.num_leases == len(lane.running)

    def nobody_idles(self):
        """Work conservation: whoever has requests runs, and what could join at a boundary has joined."""
        if self.executor.state.ready:
            return  # a step's end is owed at this very instant
        for lane in self.policy.lanes.values():
            served = self.executor.lanes.get(lane.lane)
            running = served is not None and served.command_id is not None
            assert running == lane.busy == bool(lane.outstanding()), f"lane {lane.lane} idles beside its queue"
        for server in self.executor.instances:
            assert server.serving is not None or not server.fifo


class EagerChecker(Checker):
    """Steps of one iteration, so that every boundary is seen: the head of a queue waits only if it must."""

    def after(self, now_ns, event):
        super().after(now_ns, event)
        lane = self.lane(event.lane) if isinstance(event, StepDone) else None
        if lane is None or not lane.waiting or not isinstance(self.outcome.trace[-1][2][-1], RunStep):
            return
        step, head = self.outcome.trace[-1][2][-1], lane.waiting[0]
        if step.remove:
            return
        config = lane.config
        need = -(-head.known // config.block_size)
        growth = sum((seq.offset + lane.iteration) % config.block_size == 0
                     for seq in lane.running.values() if seq.decoding)  # fmt: skip
        fits = need + growth + lane.watermark <= lane.free
        room = room_for(config.rule, config.max_num_batched_tokens, lane.phase.num, lane.targets, head.known)
        assert not (fits and room and len(lane.running) < config.max_num_seqs), "the head of the queue could start"


def assert_all_ended(outcome, scenario):
    """No starvation, causality, true lengths, and nothing left behind."""
    columns = outcome.record.requests
    for index, request in enumerate(scenario.requests):
        status = columns.status[index]
        assert status in (RequestStatus.FINISHED, RequestStatus.REJECTED)
        arrival, first, finish = columns.arrival_ns[index], columns.first_token_ns[index], columns.finish_ns[index]
        assert arrival >= 0
        if status == RequestStatus.FINISHED:
            assert arrival < first <= finish <= outcome.record.end_ns
            assert columns.output_tokens[index] == request.output
            assert (first == finish) == (request.output == 1)
            if request.parent >= 0 and scenario.concurrency is None:
                assert arrival >= columns.finish_ns[request.parent]
        else:
            assert finish == -1 and index in columns.reasons
            assert columns.output_tokens[index] < request.output
        assert columns.num_preemptions[index] >= 0
    state = outcome.executor.state
    assert not state.held
    for memory in state.memory:
        assert memory.used == memory.cached and memory.host_used == 0
    for lane in outcome.policy.lanes.values():
        assert not lane.busy and not lane.outstanding() and lane.phase.num == 0
        if lane.index is not None:
            assert lane.index.num_leases == lane.index.pinned_blocks == 0
            lane.index.clear()  # refuses while anyone holds a block


@CHECKED
@given(scenarios(), st.sampled_from((1, 3, None)))
def test_requests_and_blocks_are_conserved_at_every_event(scenario, max_leap):
    assert_all_ended(Checker(scenario, max_leap).run(), scenario)


@CHECKED
@given(scenarios(caching=False))
def test_the_head_of_a_queue_waits_only_if_it_must(scenario):
    assert_all_ended(EagerChecker(scenario, 1).run(), scenario)


@CHECKED
@given(scenarios())
def test_every_iteration_of_every_token_is_accounted_for(scenario):
    """Segments of one lane never overlap, and hold as many tokens as were produced and prompts computed."""
    outcome = scenario.run()
    columns, segments = outcome.record.requests, outcome.record.segments
    ends = {}
    decoded = prefilled = 0
    for row, lane in enumerate(segments.lane):
        assert segments.start_ns[row] < segments.end_ns[row]
        assert segments.start_ns[row] >= ends.get(lane, 0), "a lane runs two iterations at once"
        ends[lane] = segments.end_ns[row]
        decoded += segments.iterations[row] * segments.decodes[row]
        prefilled += segments.prefill_tokens[row]
    sampled = sum(columns.output_tokens)
    firsts = sum(first >= 0 for first in columns.first_token_ns)
    entries = sum(len(command.add) for *_, commands in outcome.trace for command in commands
                  if isinstance(command, RunStep))  # fmt: skip
    assert sampled - entries <= decoded <= sampled - firsts  # a token comes from a decode or from an entry's prompt
    targets = sum(entry.target - entry.computed for *_, commands in outcome.trace for command in commands
                  if isinstance(command, RunStep) for entry in command.add)  # fmt: skip
    lost = any(columns.num_preemptions) or scenario.losses
    assert prefilled <= targets if lost else prefilled == targets


@CHECKED
@given(scenarios(losses=False))
def test_without_losses_every_command_is_answered_once(scenario):
    """Command ids are unique, every RunStep has one StepDone, and lane clocks never go back."""
    outcome = scenario.run(5)
    asked, answered, clocks = [], [], {}
    for _, event, commands in outcome.trace:
        asked += [command.command_id for command in commands if isinstance(command, RunStep)]
        if isinstance(event, StepDone):
            answered.append(event.command_id)
            assert event.lane_iterations >= clocks.get(event.lane, 0)
            clocks[event.lane] = event.lane_iterations
    assert len(set(asked)) == len(asked)
    assert sorted(answered) == sorted(asked)


class Restarting(VllmPolicy):
    """Brings every lost instance back."""

    def on_event(self, now_ns, event):
        commands = super().on_event(now_ns, event)
        if isinstance(event, InstanceLost):
            commands = [*commands, StartInstance((1 << 50) + now_ns + event.instance, event.instance)]
        return commands


@CHECKED
@given(scenarios())
def test_a_lost_instance_that_comes_back_starts_empty(scenario):
    checker = Checker(scenario)
    checker.policy = checker.outcome.policy = Restarting(
        scenario.model().info(), scenario.config(None), scenario.dispatch
    )
    outcome = checker.run()
    assert_all_ended(outcome, scenario)
    ids = [command.command_id for *_, commands in outcome.trace for command in commands if isinstance(command, RunStep)]
    assert len(set(ids)) == len(ids)


def test_requests_wait_for_the_only_instance_to_come_back():
    scenario = Scenario((Request(0, 8, 40), Request(3, 8, 40), Request(60, 8, 8)), losses=((10, 0),))
    checker = Checker(scenario)
    checker.policy = checker.outcome.policy = Restarting(scenario.model().info(), scenario.config(None))
    outcome = checker.run()
    assert_all_ended(outcome, scenario)
    up = [now for now, event, _ in outcome.trace if isinstance(event, InstanceUp)]
    assert len(up) == 2 and all(first > 0 for first in outcome.record.requests.first_token_ns)
    assert outcome.record.requests.finish_ns[0] > up[1]


def retained(trace):
    """Blocks that have been left to the cache in all."""
    commands = [command for *_, commands in trace for command in commands]
    freed = sum(command.retain for command in commands if isinstance(command, FreeSpan))
    return freed + sum(sum(command.retain) for command in commands if isinstance(command, RunStep))


def test_the_draws_reach_what_the_laws_are_about():
    """Preemption, refusal, give-up, cache hits, resumption with hits, losses in mid-step: none is vacuous."""
    seen = {}

    @law(200)
    @given(scenarios())
    def collect(scenario):
        outcome = scenario.run()
        columns = outcome.record.requests
        reasons = " ".join(columns.reasons.values())
        steps = [command for *_, commands in outcome.trace for command in commands if isinstance(command, RunStep)]
        found = {
            "preempted": any(columns.num_preemptions),
            "refused": "exceeds" in reasons,
            "gave up": "outgrew" in reasons,
            "hit": any(columns.cached_tokens),
            "resumed with a hit": any(
                entry.shared and columns.num_preemptions[entry.request_id] and entry.target >
                outcome.executor.members.prompt[entry.request_id] for step in steps for entry in step.add),
            "lost in mid-step": any(isinstance(event, StepDone) and event.status for _, event, _ in outcome.trace),
            "evicted": not scenario.losses and retained(outcome.trace) > sum(
                memory.cached // memory.info.num_layers for memory in outcome.executor.state.memory),
            "chunked": any(isinstance(event, StepDone) and event.partial for _, event, _ in outcome.trace),
            "leapt": any(iterations > 5 for iterations in outcome.record.segments.iterations),
            **{rule.value: scenario.rule is rule for rule in Rule},
        }  # fmt: skip
        for name, value in found.items():
            seen[name] = seen.get(name, 0) + bool(value)

    collect()

    rare = {name: count for name, count in seen.items() if count < 4}
    assert not rare, f"of 200 draws too few show: {rare} (all: {seen})"


@pytest.mark.parametrize("rule", Rule)
def test_a_long_overload_with_preemption_ends(rule):
    """Twice what the memory holds, for a thousand requests: conserved throughout, nobody starves."""
    requests = tuple(Request(index % 3, 1 + index * 7 % 37, 1 + index * 11 % 29, index % 4 - 1, 3 * (index % 2))
                     for index in range(1000))  # fmt: skip
    scenario = Scenario(requests, 2, 40, 4, rule, 48, 16, caching=rule is Rule.CHUNKED)
    outcome = Checker(scenario).run()
    assert_all_ended(outcome, scenario)
    assert sum(outcome.record.requests.num_preemptions) > 20


def test_a_prompt_pins_cached_blocks_only_where_nothing_grows_into_them():
    """Found by the laws: 2 blocks of 4. A finished request's block is in the cache; the same prompt, admitted before
    it was there, is computed, and pins it while its own reply grows. The step must end in between."""
    prompts = ((1, 1), (1, 1), (1, 1), (4, 1), (4, 6))
    requests = (*(Request(0, prompt, output, 0) for prompt, output in prompts), Request(0, 1, 1, 0, 0, 0))
    scenario = Scenario(requests, 1, 2, 4, Rule.CHUNKED, 3, 1, caching=True, dispatch="round_robin", grid=False)
    for max_leap in (1, 2, None):
        assert_all_ended(Checker(scenario, max_leap).run(), scenario)
