"""Random stories of requests that run, park, copy, move, swap, are preempted and lose instances: at every leap the same
to the nanosecond, every token counted once, no cell left over."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from common.driver import drive
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.types import CopySpan, Entry, FreeSpan, RequestStatus, SetTimer, Span, Stage, Status, SwapSpan
from tests.contract.runtimes import Recorder
from tests.contract.script import Script
from tests.fakes import FakeWorkload, cluster

ALL = (0, 4)
US = 1_000
EXAMPLES = 1500 if os.environ.get("KVPLANE_NIGHTLY") else 120
KINDS = ("run", "run", "park", "copy", "copy", "move", "lend", "preempt", "swap", "forget", "kill")
OP = st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 2), st.integers(0, 600))
OPS = st.lists(OP, min_size=4, max_size=24)
REQUESTS = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 300)), min_size=4, max_size=4)


class Wanderers(Script):
    """Four requests over three instances, lane i on instance i. Instance 0 never dies."""

    def __init__(self, ops, info, leap):
        super().__init__(info, leap)
        self.ops = ops
        self.home: dict[int, int] = {}  # of parked requests
        self.copies: dict[int, dict[int, object]] = {}  # request -> instance -> wait for the answer
        self.dead: set[int] = set()
        self.sizes: dict[tuple[int, int], int] = {}  # tokens of the copy of a request on an instance

    def agents(self):
        return [self.story()]

    def story(self):
        requests = range(4)
        yield self.arrived(*requests)
        for kind, request, instance, delay in self.ops:
            yield self.ask(SetTimer, self.now + delay * US)
            if instance not in self.dead:
                yield from getattr(self, kind)(request, instance)
        for request in requests:
            yield from self.run(request, 0)
            if request in self.home:
                self.join(request, self.home[request])
        while waiting := [request for request in requests if not self.over(request)]:
            yield self.any_left(waiting)
            for request in waiting:  # whoever was lost on the way begins again
                yield from self.run(request, 0)

    def any_left(self, requests):
        return lambda: any(self.over(request) or self.lane_of(request) is None for request in requests)

    # ---- where they are

    def over(self, request):
        return ("finished", request) in self.happened

    def lane_of(self, request):
        for lane, book in self.books.items():
            entries = [*book.members, *book.targets, *(entry.request_id for entry in book.todo.get("add", ()))]
            if request in entries:
                return lane
        return None

    def here(self, request, instance):
        """Has a copy of all that the request stores arrived at an instance?"""
        wait = self.copies.get(request, {}).get(instance)
        answer = wait() if wait else None
        there = answer is not None and answer.status is Status.OK
        return there and self.sizes[request, instance] == self.tokens[request]

    def forgotten(self, request):
        self.copies.pop(request, None)
        self.home.pop(request, None)

    # ---- what they do

    def run(self, request, instance):
        if self.over(request) or self.lane_of(request) is not None:
            return
        if request not in self.home:
            self.copies.pop(request, None)
            self.change(instance, stages=(Stage(instance, ALL),), add=(Entry(request, 0, self.known[request]),))
        elif self.home[request] == instance or self.here(request, instance):
            self.join(request, instance)
        yield lambda: True

    def join(self, request, instance):
        home = self.home.pop(request)
        if home != instance:
            self.do(FreeSpan(home, request))
        self.copies.get(request, {}).pop(instance, None)
        self.change(instance, stages=(Stage(instance, ALL),), add=(self.again(request),))

    def park(self, request, instance):
        lane = self.lane_of(request)
        if lane is not None:
            yield self.change(lane)
            if request in self.books[lane].members and not self.books[lane].placements[request]:
                yield self.change(lane, park=(request,))
                if not self.over(request) and ("gone", lane) not in self.happened:
                    self.home[request] = lane

    def copy(self, request, instance):
        """Of what a request stores now (its prompt, at least), whether it runs or is parked."""
        lane = self.lane_of(request)
        if lane is not None:
            yield self.change(lane)
        running = lane is not None and request in self.books[lane].members
        if running and self.books[lane].placements[request]:
            return
        source = lane if running else self.home.get(request)
        if source is None or source == instance or instance in self.copies.get(request, {}) or instance in self.dead:
            return
        end = self.stored(request)
        self.sizes[request, instance] = end
        pace = 16 if end % 2 else None
        wait = self.ask(CopySpan, request, source, instance, ALL, (0, end), pace=pace, priority=end % 3)
        self.copies.setdefault(request, {})[instance] = wait

    def move(self, request, instance):
        yield from self.park(request, instance)
        if request in self.home:
            yield from self.copy(request, instance)
            wait = self.copies.get(request, {}).get(instance)
            if wait is not None:
                yield wait
            yield from self.run(request, instance)

    def lend(self, request, instance):
        """The first block goes to a creditor, at a boundary."""
        yield from self.move(request, 0)
        if self.lane_of(request) != 0 or instance == 0 or instance in self.dead:
            return
        yield from self.copy(request, instance)
        wait = self.copies.get(request, {}).get(instance)
        if wait is not None and (yield wait).status is Status.OK and not self.over(request):
            yield self.change(0)
            if request in self.books[0].members and ("gone", instance) not in self.happened:
                cut = self.sizes[request, instance] // 16 * 16
                if cut:
                    placement = (Span(instance, ALL, 0, cut), Span(0, ALL, cut, None))
                    yield self.change(0, park=(request,))
                    if not self.over(request) and ("gone", instance) not in self.happened:
                        self.do(FreeSpan(instance, request, tokens=(cut, 1 << 30)))
                        self.do(FreeSpan(0, request, tokens=(0, cut)))
                        self.forgotten(request)
                        self.change(0, add=(self.again(request)._replace(placement=placement),))
                    elif not self.over(request):
                        self.home[request] = 0

    def preempt(self, request, instance):
        lane = self.lane_of(request)
        if lane is not None:
            yield self.change(lane)
            yield self.change(lane, remove=(request,))
            if not self.over(request):
                self.forgotten(request)

    def swap(self, request, instance):
        home = self.home.get(request)
        if home is None or self.copies.get(request):
            return
        out = yield self.ask(SwapSpan, request, home, ALL, (0, self.tokens[request]), True)
        if out.status is Status.OK:
            back = yield self.ask(SwapSpan, request, home, ALL, (0, self.tokens[request]), False)
            if back.status is not Status.OK:
                self.home.pop(request, None)

    def forget(self, request, instance):
        """Give up a copy, done or under way."""
        if self.copies.get(request, {}).pop(instance, None) is not None and self.home.get(request) != instance:
            lane = self.lane_of(request)
            spread = lane is not None and self.books[lane].placements.get(request)
            if lane != instance and not spread:
                self.do(FreeSpan(instance, request))
        yield lambda: True

    def kill(self, request, instance):
        if instance and not self.dead and request == 3:
            self.mark("kill", instance)
            self.dead.add(instance)
            yield lambda: ("gone", instance) in self.happened
            yield self.ask(SetTimer, self.now)
            for parked in [parked for parked, home in self.home.items() if home == instance]:
                self.forgotten(parked)
            for copies in self.copies.values():
                copies.pop(instance, None)


def wander(ops, lengths, leap):
    """One run."""
    workload = FakeWorkload([0] * 4, [prompt for prompt, _ in lengths], [output for _, output in lengths])
    record = RunRecord(RequestColumns.empty(4))
    executor = SimExecutor(cluster(3, 256, host_blocks=64), workload, record)
    policy = Wanderers(ops, executor.cluster.info(), leap)
    drive(policy, Recorder(executor, []), record)
    return policy, executor


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(OPS, REQUESTS)
def test_random_moves_at_any_leap(ops, lengths):
    runs = []
    for leap in (None, 5, 1):
        policy, executor = wander(ops, lengths, leap)
        record, requests, segments = executor.record, executor.record.requests, executor.record.segments
        assert list(requests.status) == [RequestStatus.FINISHED] * 4
        assert list(requests.output_tokens) == [output for _, output in lengths]
        for memory in executor.state.memory:
            assert memory.used == memory.cached == memory.host_used == 0
        assert not (executor.state.held or executor.moves.copies or executor.moves.swaps or executor.control._spread)
        assert not any(instance.remote_load for instance in executor.instances)
        decoded = sum(count * batch for count, batch in zip(segments.iterations, segments.decodes))
        assert decoded + policy.num_sampled == sum(requests.output_tokens)
        moves = record.moves
        runs.append((list(requests.first_token_ns), list(requests.finish_ns), list(requests.num_preemptions),
                     list(requests.num_migrations), moves.kind, list(moves.start_ns), list(moves.end_ns),
                     list(moves.num_bytes)))  # fmt: skip
    assert runs[0] == runs[1] == runs[2]
