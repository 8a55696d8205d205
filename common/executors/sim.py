"""The simulated executor: the same commands and events as the real ones, on a virtual clock.

An instance is a FIFO server of items, each one or more iterations of one lane at one stage. A lane that is alone on
its instance, with one stage and its KV at home, leaps: many iterations are one item, cut by bisection when something
interrupts it or another lane arrives. Everything else advances item by item. Times are the same either way.

Boundary rule: an interrupt at time t takes effect at the first boundary that has not yet been delivered at t, which
is what a run with leaps of one iteration would see (`_strict`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

from common.errors import ContractError, Stalled
from common.executors.cluster import ClusterModel, StageCost
from common.executors.simcontrol import Control
from common.executors.simfaults import MessageFaults
from common.executors.simlane import Member, SimLane, Target
from common.executors.simloss import Losses
from common.executors.simmembers import Members
from common.executors.simmoves import Moves
from common.executors.simpipes import Pipes
from common.executors.simremote import remote_extra_ns
from common.executors.simserving import Serving
from common.executors.simstalls import Stalls
from common.executors.simstate import ARRIVAL, DONE, MESSAGE, TIMER, UP, SimState
from common.executors.source import NEVER, Client, WorkloadLike, integers
from common.record import RunRecord, pack_segment
from common.sched.compose import next_iteration
from common.types import (
    Abort,
    Command,
    CopySpan,
    DropLayers,
    Event,
    Interrupt,
    LoadLayers,
    Mark,
    RequestArrived,
    RequestStatus,
    RunStep,
    Stage,
    Status,
    StepDone,
    SwapSpan,
)

new_tuple = tuple.__new__  # of a NamedTuple, past its Python-level constructor: three times as fast
assert (len(RequestArrived._fields), len(StepDone._fields)) == (8, 9), "made field by field below"
OK = Status.OK
FINISHED, LIVE, REJECTED = int(RequestStatus.FINISHED), int(RequestStatus.LIVE), int(RequestStatus.REJECTED)


class SimInstance:
    """The compute side of an instance: a FIFO server."""

    __slots__ = ("active", "fifo", "id", "idle_from", "lanes", "piped", "remote_load", "serving")

    def __init__(self, instance: int) -> None:
        self.id = instance
        self.serving: SimLane | None = None
        self.idle_from = -(1 << 62)  # when its last item ended
        self.fifo: deque[SimLane] = deque()
        self.active = 0  # lanes with a running step that has a stage here
        self.piped = 0  # those of several stages
        self.lanes: dict[int, SimLane] = {}  # with a stage here
        self.remote_load: dict[int, float] = {}  # lane -> share of this instance's time it takes as a creditor


class SimExecutor:
    """See the module docstring. `oracle`: arrivals carry the true output length (for baselines labelled so)."""

    state_type: type[SimState] = SimState
    members_type: type[Members] = Members
    losses_type: type[Losses] = Losses

    def __init__(
        self,
        cluster: ClusterModel,
        workload: WorkloadLike,
        record: RunRecord,
        *,
        oracle: bool = False,
        faults: tuple[tuple[int, int], ...] = (),
        message_faults: MessageFaults | None = None,
        agent_faults: tuple[tuple[int, str, int], ...] = (),
    ) -> None:
        self.state = self.state_type(cluster, record)
        self.cluster = cluster
        self.record = record
        self.instances = [SimInstance(info.instance) for info in cluster.instances]
        self.lanes: dict[int, SimLane] = {}
        self.moves = Moves(self.state, self)
        self.control = Control(self.state, self, message_faults)
        self.client = Client(workload, cluster.frontend_ns)
        self._client_waits = workload.concurrency is not None or workload.release_after is not None
        self.oracle = oracle
        self._wake_share = cluster.wake_share
        self.live = 0
        self._last_work = 0
        self._workload = workload
        prompt = integers(workload.prompt_tokens)
        self.members = self.members_type(self.state, self, prompt, integers(workload.output_tokens), workload.model)
        self.losses = self.losses_type(self)
        self.stalls, self.pipes = Stalls(record.stalls), Pipes(record.stages)
        self.serving = Serving(record.serving)
        self.generated = self.members.generated
        self._segments = record.segments.packed
        self._costs: dict[tuple[int, int, int, bool, bool], StageCost] = {}
        self._submit: dict[type, Any] = {
            RunStep: self._run_step,
            Interrupt: self._interrupt,
            Abort: self._abort,
            Mark: self._mark,
            **self.moves.commands(),
            **self.control.commands(),
        }
        record.requests.prompt_tokens[:] = array("q", prompt)
        if workload.model is not None:
            record.requests.model = array("q", integers(workload.model))
        self.control.start(faults, agent_faults)

    # ------------------------------------------------------------ contract

    def submit(self, command: Command) -> None:
        """Accept a command at the time of the last event."""
        self._submit[type(command)](command)

    def poll(self) -> tuple[int, Event] | None:
        """The next event; internal work in between is done here."""
        state, client, heap = self.state, self.client, self.state.heap
        while True:
            if state.ready:
                return state.now, state.ready.popleft()
            arrival_ns = client.next_ns
            if heap and ((head := heap[0])[0] < arrival_ns or (head[0] == arrival_ns and head[1] < ARRIVAL)):
                if not self.live and arrival_ns == NEVER and not self._work_pending():
                    break
                time_ns, event_class, tie, sequence, handler, argument = heappop(heap)
                if event_class == TIMER:
                    self._check_stall(time_ns)
                state.now = time_ns
                state.event_class = event_class
                state.event_tie = tie
                event = handler(argument, sequence)
                if event is not None:
                    if event_class <= DONE:
                        self._last_work = time_ns
                    return time_ns, event
            elif arrival_ns != NEVER:
                return arrival_ns, self._arrive(arrival_ns)
            else:
                break
        if self.live:
            raise Stalled(f"{self.live} requests live but nothing is going on (first: {self._some_live()})")
        state.check_empty()
        self._close()
        return None

    def _close(self) -> None:
        self.record.end_ns = max(self.record.end_ns, self.state.now)
        self.pipes.close(self.instances, self.state.now)
        self.serving.close()
        self.control.close()

    def _work_pending(self) -> bool:
        return any(UP <= item[1] <= MESSAGE for item in self.state.heap)

    def _check_stall(self, time_ns: int) -> None:
        quiet = time_ns - self._last_work > self.cluster.stall_ns and self.client.next_ns == NEVER
        if self.live and quiet and not self._work_pending():
            raise Stalled(
                f"{self.live} requests live but only timers fired for {self.cluster.stall_ns / 1e9:g} s "
                f"(first: {self._some_live()})"
            )

    def _some_live(self) -> str:
        status = self.record.requests.status
        return ", ".join(str(index) for index, value in enumerate(status) if value == LIVE)[:60]

    def _arrive(self, arrival_ns: int) -> RequestArrived:
        state, workload = self.state, self._workload
        request_id = self.client.pop()
        state.now = self._last_work = arrival_ns
        state.event_class = ARRIVAL
        state.event_tie = 0
        requests = self.record.requests
        requests.arrival_ns[request_id] = arrival_ns - self.client.frontend_ns  # when the client sent it
        requests.status[request_id] = LIVE
        self.live += 1
        content, session = workload.content, workload.session
        fields = (
            request_id,
            self.members.prompt[request_id],
            workload.max_output_tokens,
            None if content is None else content[request_id],
            -1 if session is None else int(session[request_id]),
            self.members.output[request_id] if self.oracle else None,
            "",
            self.members.model_of(request_id),
        )
        return new_tuple(RequestArrived, fields)

    # ------------------------------------------------------------ steps

    def stage_cost(self, stage: Stage) -> StageCost:
        """Times of a stage; cached by shape."""
        low, high = stage.layers
        cluster = self.cluster.of(stage.instance)
        model = cluster.instances[0].model
        key = (model, cluster.tp(stage.instance), high - low, low == 0, high == cluster.num_layers)
        cost = self._costs.get(key)
        if cost is None:
            cost = self._costs[key] = cluster.cost_at(stage.instance)(*key[2:])
        return cost

    def _run_step(self, command: RunStep) -> None:
        command_id, lane_id, add, remove, _, park, place, stages, budget, rule, limit, reclaim = command
        lane = self.lanes.get(lane_id)
        if lane is None:
            lane = self.lanes[lane_id] = SimLane(lane_id, self.state.block_size)
        if lane.command_id is not None:
            raise ContractError(f"lane {lane.id}: RunStep {command_id} while {lane.command_id} runs")
        if remove or park:
            self.members.take_out(lane, command)
        if stages is not None:
            self._set_stages(lane, stages)
        lane.rule = rule or lane.rule
        lane.budget = budget or lane.budget
        lane.reclaim = reclaim
        lane.command_id = command_id
        lane.step_from = lane.ran
        if not lane.stages:
            raise ContractError(f"lane {lane.id}: no route, or its layers were dropped: RunStep needs stages")
        up = self.state.up
        for stage in lane.stages:
            if not up[stage.instance]:
                self.losses.fail_lane(lane)
                return
        for request_id, placement in place:
            self.control.replace(lane, request_id, placement)
        for entry in add:
            self.members.join(lane, entry)
        lane.limit = 1 << 60 if limit is None else lane.ran + limit
        lane.stop = False
        for foot in lane.feet:
            foot.active += 1
        if not lane.simple:
            self.pipes.started(lane, self.state.now)
        event = self._begin(lane, self.state.now)
        if event is not None:
            self.state.ready.append(event)

    def _set_stages(self, lane: SimLane, stages: tuple[Stage, ...]) -> None:
        if lane.members or lane.targets:
            raise ContractError(f"lane {lane.id}: its route changed while requests are in it")
        expected, infos = 0, self.cluster.instances
        num_layers = self.cluster.of(stages[0].instance).num_layers
        if any(infos[stage.instance].model != infos[stages[0].instance].model for stage in stages):
            raise ContractError(f"lane {lane.id}: stages {stages} run different models")
        for stage in stages:
            if stage.layers[0] != expected:
                raise ContractError(f"lane {lane.id}: stages {stages} do not tile the layers in order")
            expected = stage.layers[1]
            if self.state.up[stage.instance] and not self.state.memory[stage.instance].has(stage.layers):
                raise ContractError(f"lane {lane.id}: instance {stage.instance} does not hold layers {stage.layers}")
        if expected != num_layers:
            raise ContractError(f"lane {lane.id}: stages {stages} end before layer {num_layers}")
        for foot in lane.feet:
            foot.lanes.pop(lane.id, None)
        lane.stages = stages
        lane.home, (first, last) = stages[0]
        lane.home_layers = last - first
        lane.costs = [self.stage_cost(stage) for stage in stages]
        lane.feet = [self.instances[stage.instance] for stage in stages]
        for foot in lane.feet:
            foot.lanes[lane.id] = lane
        lane.durations = [0] * len(stages)
        lane.prefix = {}
        lane.simple = len(stages) == 1

    # ------------------------------------------------------------ items

    def _begin(self, lane: SimLane, now: int) -> Event | None:
        """At a boundary: queue the lane's next item, or end its step."""
        if lane.stop or lane.ran >= lane.limit:
            return self._step_done(lane)
        phase = lane.phase
        if lane.targets:
            runs, chunks = next_iteration(lane.rule, lane.budget, phase.num, lane.targets)
            lane.chunks, lane.runs_decodes = chunks, runs
            lane.item_iterations = 1
            self._price(lane)
        elif phase.num:
            lane.chunks, lane.runs_decodes = [], True
            foot = lane.feet[0]
            if lane.simple and foot.active == 1 and not foot.remote_load and not lane.paced and not lane.spread:
                self._leap(lane)
            else:
                lane.item_iterations = 1
                self._price(lane)
        else:
            return self._step_done(lane)
        lane.stage = 0
        instance = lane.feet[0]
        if instance.serving is None:
            self._serve(instance, lane, now)
        else:
            self._enqueue(lane, now)
        return None

    def _leap(self, lane: SimLane) -> None:
        """As many pure decode iterations as the step allows, priced by one subtraction of prefix sums."""
        if self._wake_share and self._cold(lane.feet[0]):
            lane.item_iterations = 1
            self._price(lane)
            return
        finish, request_id = lane.finishes[0]
        member = lane.members.get(request_id)
        if member is None or member.finish != finish:
            finish = lane.next_finish()
        count, left = finish - lane.iteration, lane.limit - lane.ran
        if left < count:
            count = left
        num = lane.phase.num
        cost = lane.costs[0]
        context = lane.effective_context(cost.skew_alphas)
        prefix = lane.prefix.get(num)
        if prefix is None or len(prefix) <= context + count:
            prefix = lane.prefix[num] = cost.decode_prefix(num, context + count)
        lane.leap_prefix, lane.leap_context = prefix, context
        lane.item_iterations = count
        lane.slowed = ()
        lane.durations[0] = prefix[context + count] - prefix[context]

    def _price(self, lane: SimLane) -> None:
        """Durations of one iteration at every stage."""
        logits = num = lane.phase.num if lane.runs_decodes else 0
        chunks = []
        for chunk, target in zip(lane.chunks, lane.targets):
            computed = target.computed
            chunks.append((chunk, computed))
            if computed + chunk == target.target and target.entry.sample:
                logits += 1
        lane.slowed, lane.shares = (), []
        for index, cost in enumerate(lane.costs):
            context = lane.effective_context(cost.skew_alphas) if num else 0
            if lane.spread:
                duration = remote_extra_ns(self, lane, index, chunks, num, logits)
            else:
                duration = cost.iteration_ns(chunks, num, context, logits)
            foot = lane.feet[index]
            if self._wake_share and self._cold(foot):
                duration += int(duration * self._wake_share)
            load = foot.remote_load
            if load:
                alone, duration = duration, int(duration * (1.0 + sum(load.values())))
                lane.slowed += ((lane.stages[index].instance, duration - alone),)
            lane.durations[index] = duration
        if lane.spread:
            self.control.refresh_remote(lane)

    def _cold(self, instance: SimInstance) -> bool:
        """Has it been idle for so long that its next iteration is slower (`ClusterModel.wake_share`)?"""
        return instance.serving is None and self.state.now - instance.idle_from > self.cluster.wake_after_ns

    def _enqueue(self, lane: SimLane, now: int) -> None:
        instance = lane.feet[lane.stage]
        if instance.serving is None:
            self._serve(instance, lane, now)
        else:
            instance.fifo.append(lane)
            self._cut(instance.serving)

    def _serve(self, instance: SimInstance, lane: SimLane, now: int) -> None:
        instance.serving = lane
        lane.item_start = now
        duration = lane.durations[lane.stage]
        state = self.state
        state.sequence = lane.due = state.sequence + 1
        heappush(state.heap, (now + duration, DONE, lane.id, lane.due, self._item_end, lane))
        if lane.followers:
            self.moves.item_started(lane, now, duration)

    def _strict(self, lane: SimLane) -> bool:
        """Has the lane's boundary at this very instant already been delivered?"""
        state = self.state
        return state.event_class > DONE or (state.event_class == DONE and state.event_tie > lane.id)

    def _until_boundary(self, lane: SimLane) -> int:
        """Iterations of a running leap from its start to its first boundary that is still to come."""
        prefix, context = lane.leap_prefix, lane.leap_context
        goal = self.state.now - lane.item_start + prefix[context]
        find = bisect_right if self._strict(lane) else bisect_left
        return find(prefix, goal, context + 1, context + lane.item_iterations) - context

    def _cut(self, lane: SimLane) -> None:
        """End a running leap at its first boundary that is still to come."""
        if lane.item_iterations == 1:
            return
        count = self._until_boundary(lane)
        if count >= lane.item_iterations:
            return
        prefix, context = lane.leap_prefix, lane.leap_context
        lane.item_iterations = count
        lane.durations[0] = duration = prefix[context + count] - prefix[context]
        state = self.state
        state.sequence = lane.due = state.sequence + 1
        heappush(state.heap, (lane.item_start + duration, DONE, lane.id, lane.due, self._item_end, lane))

    def _item_end(self, lane: SimLane, sequence: int) -> Event | None:
        if sequence != lane.due:
            return None  # cut short earlier
        now = self.state.now
        instance = lane.feet[lane.stage]
        instance.serving = None
        instance.idle_from = now
        if instance.piped:
            self.pipes.served(instance, lane.item_start, now)
        if not lane.simple and lane.stage + 1 < len(lane.stages):
            self.next_in_line(instance, now)
            self._hop(lane, now)
            return None
        event = self._boundary(lane, now)
        if instance.fifo:  # whoever waits at the instance goes first; then the lane's own next iteration
            self.next_in_line(instance, now)
        return self._begin(lane, now) if event is None else event

    def next_in_line(self, instance: SimInstance, now: int) -> None:
        if instance.fifo:
            self._serve(instance, instance.fifo.popleft(), now)

    def _hop(self, lane: SimLane, now: int) -> None:
        tokens = sum(lane.chunks) + (lane.phase.num if lane.runs_decodes else 0)
        src, dst = lane.stages[lane.stage].instance, lane.stages[lane.stage + 1].instance
        lane.stage += 1
        delay = self.moves.hop_ns(src, dst, tokens)
        lane.due = self.state.push(now + delay, DONE, lane.id, self._hopped, lane)

    def _hopped(self, lane: SimLane, sequence: int) -> Event | None:
        if sequence == lane.due:
            self._enqueue(lane, self.state.now)
        return None

    # ------------------------------------------------------------ boundaries

    def _boundary(self, lane: SimLane, now: int) -> Event | None:
        """Iterations are complete at every stage: tokens appear, prompts complete, requests finish."""
        count = lane.item_iterations
        self.note_segment(lane, now, count)
        if lane.runs_decodes:
            phase = lane.phase
            if phase.num:
                if lane.resumed:
                    self.stalls.iterated(lane, now)
                settled, lane.settled = lane.settled, 0
                grown = phase.growth(lane.iteration + settled, count - settled)
                if lane.spread:
                    self.grow(lane, grown, self.control.grow_spread(lane))
                elif grown:
                    self.grow(lane, grown)
            lane.iteration += count
        lane.ran += count
        if lane.chunks:
            self._advance_targets(lane, now)
        if lane.paced:
            self.moves.iterated(lane)
        if lane.finishes and lane.finishes[0][0] <= lane.iteration and lane.next_finish() <= lane.iteration:
            return self._step_done(lane)
        return None

    def note_segment(self, lane: SimLane, now: int, count: int) -> None:
        start = lane.item_start if lane.simple else now - sum(lane.durations)
        decodes = lane.phase.num if lane.runs_decodes else 0
        tokens = sum(lane.chunks) if lane.chunks else 0
        self._segments += pack_segment(start, now, lane.id, lane.home, count, decodes, tokens)
        if lane.slowed or lane.spread:
            self.serving.iterated(self, lane, start, now, decodes)

    def grow(self, lane: SimLane, blocks: int, elsewhere: Sequence[int] = ()) -> None:
        """Charge new blocks at every stage but for cells that grew `elsewhere`, taking over cached ones where the
        step allows it."""
        if lane.simple and not elsewhere:
            memory = self.state.memory[lane.home]
            used = memory.used + blocks * lane.home_layers
            if used <= memory.capacity:
                memory.used = used
                return
        for index, stage in enumerate(lane.stages):
            layers = stage.layers[1] - stage.layers[0]
            memory = self.state.memory[stage.instance]
            new_cells = blocks * layers - (elsewhere[index] if elsewhere else 0)
            short = memory.used + new_cells - memory.capacity
            if short > 0 and lane.reclaim:
                cells = min(-(-short // layers), lane.reclaim) * layers
                lane.reclaim -= cells // layers
                memory.cached -= cells
                memory.give(cells)
            memory.take(new_cells)

    def _advance_targets(self, lane: SimLane, now: int) -> None:
        """Add computed chunks; at a reached target sample, decode, or leave."""
        targets = lane.targets
        for chunk, target in zip(lane.chunks, targets if len(targets) == 1 else list(targets)):
            target.computed += chunk
            if target.computed < target.target:
                continue
            targets.remove(target)
            self._reached(lane, target, now)

    def _reached(self, lane: SimLane, target: Target, now: int) -> None:
        entry = target.entry
        request_id = entry.request_id
        lane.prefilled.append((request_id, lane.iteration))
        if entry.sample:
            if self.generated[request_id] == 0:
                self.record.requests.first_token_ns[request_id] = now
            if self.stalls.open:
                self.stalls.token(request_id, now)
            self.generated[request_id] += 1
        left = self.members.output[request_id] - self.generated[request_id]
        member = Member(entry, entry.target - lane.iteration, lane.iteration + left)
        if left and (entry.leave or not entry.sample):
            self.members.release(lane, entry, entry.target, entry.target)
            if (request_id, lane.id) in self.members.behind:
                self.members.hand_over(request_id, lane)
            lane.stop = True
        else:
            lane.join(member, bool(lane.costs[0].skew_alphas))  # with nothing left it finishes at this boundary

    def _step_done(self, lane: SimLane) -> StepDone:
        """End the lane's step here: finish requests whose last token this was, answer the command."""
        finished: list[int] = []
        iteration = lane.iteration
        finishes, members = lane.finishes, lane.members
        while finishes and finishes[0][0] <= iteration:
            finish, request_id = heappop(finishes)
            member = members.get(request_id)
            if member is not None and member.finish == finish:
                finished.append(request_id)
                self._finish(lane, request_id)
        partial: tuple[tuple[int, int], ...] = ()
        if lane.targets:
            partial = tuple([(target.entry.request_id, target.computed) for target in lane.targets
                             if target.computed > target.entry.computed])  # fmt: skip
        command_id = lane.command_id
        assert command_id is not None
        count = lane.ran - lane.step_from
        event = new_tuple(StepDone, (command_id, lane.id, OK, count, iteration, tuple(finished),
                                     tuple(lane.prefilled), partial, ""))  # fmt: skip
        if lane.prefilled:
            lane.prefilled.clear()
        lane.command_id = None
        self.record.num_iterations += count
        for foot in lane.feet:
            foot.active -= 1
        if not lane.simple:
            self.pipes.ended(lane, self.state.now)
        if self.moves.after or lane.followers:
            self.moves.step_ended(lane, command_id)
        if lane.id in self.control.creditors:
            self.control.unload(lane)
        return event

    def _finish(self, lane: SimLane, request_id: int) -> None:
        member = lane.leave(request_id)
        requests = self.record.requests
        self.generated[request_id] = self.members.output[request_id]
        requests.finish_ns[request_id] = self.state.now
        requests.status[request_id] = FINISHED
        self.live -= 1
        stored = member.offset + lane.iteration
        self.members.release(lane, member.entry, stored, stored if member.entry.keep else 0)
        if self._client_waits:
            self.client.ended(self.state.now, request_id)

    def _interrupt(self, command: Interrupt) -> None:
        lane = self.lanes.get(command.lane)
        if lane is None or lane.command_id is None or lane.stop:
            return
        lane.stop = True
        self._cut(lane)

    def _abort(self, command: Abort) -> None:
        """End a request without an answer. In a lane it must have been removed first."""
        request_id = command.request_id
        requests = self.record.requests
        if requests.status[request_id] != LIVE:
            raise ContractError(f"request {request_id} aborted but not live")
        if requests.instance[request_id] >= 0 and self.members.lane_of(request_id) is not None:
            raise ContractError(f"request {request_id} aborted but in a lane: remove it first")
        requests.status[request_id] = REJECTED
        requests.reasons[request_id] = command.reason
        self.stalls.open.pop(request_id, None)
        self.moves.cancel(request_id)
        self.state.free_all(request_id)
        self.live -= 1
        self.client.ended(self.state.now, request_id)

    def _mark(self, command: Mark) -> None:
        self.record.marks.append((self.state.now, command.instance, command.kind, command.text))

    def report(self) -> dict[str, Any]:
        """What a runtime with real tensors tells of its engine, for the manifest; nothing here."""
        return {}

    def outputs(self) -> dict[int, list[int]] | None:
        """Generated token ids by request; None where there are no tokens."""
        return None

    def close(self) -> None:
        """Give back what lies outside this process's ordinary memory."""

    # ------------------------------------------------------------ for runtimes that have real bytes

    def copied(self, command: CopySpan) -> bool | None:
        """The last byte of a copy has arrived; its destination is not readable yet. False: it has not, as an instance
        is gone that nobody knows of yet. None: it has not yet; `moves.landed` will be told."""
        return True

    def copy_stopped(self, command: CopySpan) -> None:
        """A copy has failed or was cancelled; its destination has not been freed yet."""

    def swap_begins(self, command: SwapSpan) -> None:
        """A swap has booked both tiers."""

    def swap_ends(self, command: SwapSpan, status: Status) -> None:
        """A swap is over; neither tier has been freed yet."""

    def layers_dropped(self, command: DropLayers) -> None:
        """A drop's remap is done."""

    def layers_loaded(self, command: LoadLayers, missing: Sequence[int], loaded: Callable[[], None]) -> None:
        """The last byte of these layers' parameters has arrived, or could have; `loaded` is to be called when it
        has."""
        loaded()

    def load_goes_on(self, command: LoadLayers) -> bool:
        """A load's source is lost: do its layers come all the same, from elsewhere?"""
        return False

    def load_stopped(self, command: LoadLayers) -> None:
        """A load has failed: an end of it was lost."""

    def kv_resized(self, instance: int) -> None:
        """`ShrinkKV` has set the capacity of an instance's KV range."""

    def came_up(self, instance: int) -> None:
        """An instance has started, empty."""

    def died(self, instance: int) -> None:
        """An instance is gone with all that was on it: lost, or stopped."""

    # ------------------------------------------------------------ for the other parts

    def abandon(self) -> None:
        """The run was interrupted: settle the token counts of what still runs, and close the books."""
        for lane in self.lanes.values():
            for member in lane.members.values():
                self.members.settle_generated(lane, member)
        self._close()

    def completed(self, lane: SimLane) -> int:
        """Iterations of a lane completed by now, inside a running leap too."""
        if lane.command_id is None or lane.item_iterations == 1 or lane.chunks or lane.feet[0].serving is not lane:
            return lane.iteration
        completed: int = lane.iteration + self._until_boundary(lane) - 1
        return completed

    def lanes_of(self, *instances: int) -> tuple[tuple[int, int], ...]:
        """(lane, completed iterations) of the lanes with a stage on these instances, by lane id."""
        found = self.instances[instances[0]].lanes
        for instance in instances[1:]:
            found = found | self.instances[instance].lanes
        return tuple([(lane_id, self.completed(found[lane_id])) for lane_id in sorted(found)])

    def cut_all(self, instance: int) -> None:
        """Something changed the speed of an instance: leaps there end at their next boundary (unseen by policies)."""
        serving = self.instances[instance].serving
        if serving is not None:
            self._cut(serving)

    def settle(self, instance: int) -> None:
        """Charge what a running leap has grown by so far: its blocks are needed before those of anything new."""
        lane = self.instances[instance].serving
        if lane is not None and lane.item_iterations > 1:
            done = self.completed(lane) - lane.iteration
            if done > lane.settled:
                self.grow(lane, lane.phase.growth(lane.iteration + lane.settled, done - lane.settled))
                lane.settled = done

    def boundary_ns(self, instance: int) -> int:
        """When the iteration that an instance is in ends; now, if it is in none. A leap is cut there."""
        lane = self.instances[instance].serving
        if lane is None:
            return self.state.now
        self._cut(lane)
        end_ns: int = lane.item_start + lane.durations[lane.stage]
        return end_ns
