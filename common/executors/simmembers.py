"""Who is in a lane, and the KV that goes with it: joins, evictions, hand-overs and releases in the simulator."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import ContractError
from common.executors.memory import Held
from common.executors.simlane import Member, SimLane, Target
from common.executors.simstate import SimState
from common.types import Entry, RequestStatus, RunStep, Tier

if TYPE_CHECKING:
    from common.executors.sim import SimExecutor

LIVE = int(RequestStatus.LIVE)


class Members:
    """Owns what is known of each request: prompt, true output and generated tokens, and who joins behind whom."""

    def __init__(
        self, state: SimState, executor: SimExecutor, prompt: list[int], output: list[int], model: Sequence[int] | None
    ) -> None:
        self.state = state
        self.executor = executor
        self.prompt = prompt
        self.output = output  # the true lengths: no policy sees them
        self.model = model  # None: there is one
        self.requests = state.record.requests
        self.generated: array[int] = self.requests.output_tokens
        self.behind: dict[tuple[int, int], tuple[SimLane, Entry]] = {}  # by request and lane in front

    def model_of(self, request_id: int) -> int:
        """Which of the cluster's models a request asks for."""
        return 0 if self.model is None else int(self.model[request_id])

    def check_model(self, request_id: int, instance: int) -> None:
        """No instance of another model ever sees a request."""
        if self.model is None:
            return
        runs, asks = self.state.cluster.instances[instance].model, self.model_of(request_id)
        if runs != asks:
            raise ContractError(f"request {request_id} asks for model {asks}; instance {instance} runs model {runs}")

    def take_out(self, lane: SimLane, command: RunStep) -> None:
        """Preempt and park at this boundary; retained blocks become cached ones."""
        for index, request_id in enumerate(command.remove):
            self.evict(lane, request_id, keep=False)
            if command.retain and command.retain[index]:
                for stage in lane.stages:
                    cells = command.retain[index] * (stage.layers[1] - stage.layers[0])
                    memory = self.state.memory[stage.instance]
                    memory.take(cells)
                    memory.cached += cells
        for request_id in command.park:
            self.evict(lane, request_id, keep=True)

    def join(self, lane: SimLane, entry: Entry) -> None:
        """Take a request into the lane: absorb its KV held at the stages, charge what it will need there."""
        request_id, computed, target, _, _, _, _, decode, placement, behind, _ = entry
        self.check_model(request_id, lane.home)
        known = self.prompt[request_id] + self.generated[request_id]
        if not 0 <= computed < target <= known or (decode and computed != known - 1):
            raise ContractError(f"request {request_id}: entry {entry} of {known} known tokens")
        if self.requests.status[request_id] != LIVE:
            raise ContractError(f"request {request_id} joins lane {lane.id} but is not live")
        self._count_migration(lane, entry)
        if behind is not None:
            self.executor.control.check_behind(lane, entry)
            self.behind[request_id, behind] = (lane, entry)
            entry = entry._replace(shared=computed)  # so far it owns what it will compute itself
        if placement is not None and placement != self.executor.control.default(lane, entry):
            self.executor.control.adopt(lane, entry)
        else:
            self._take_over(lane, entry, computed if decode else target)
        if decode:
            left = self.output[request_id] - self.generated[request_id]
            if left <= 0:
                raise ContractError(f"request {request_id} decodes beyond its end")
            member = Member(entry, computed - lane.iteration, lane.iteration + left)
            lane.join(member, bool(lane.costs[0].skew_alphas))
            if self.executor.stalls.open:
                self.executor.stalls.rejoined(lane, request_id)
        else:
            lane.targets.append(Target(entry))

    def _take_over(self, lane: SimLane, entry: Entry, charged: int) -> None:
        """KV held at the stages becomes the lane's, which pays for the blocks of `charged` tokens."""
        state, size = self.state, self.state.block_size
        blocks = -(-charged // size) - entry.shared // size
        for stage in lane.stages:
            layers = stage.layers[1] - stage.layers[0]
            if entry.computed > entry.shared:
                tokens = (entry.shared, entry.computed)
                found = state.carve(entry.request_id, stage.instance, Tier.HBM, stage.layers, tokens)
                if found != layers * (entry.computed - entry.shared):
                    raise ContractError(
                        f"request {entry.request_id}: KV of tokens {tokens} is not (yet) on instance {stage.instance}"
                    )
            self._charge(lane, stage.instance, blocks, layers)

    def _charge(self, lane: SimLane, instance: int, blocks: int, layers: int) -> None:
        """Blocks of a join; where nothing is free they take over cached ones, as far as the step allows it."""
        memory = self.state.memory[instance]
        short = memory.used + blocks * layers - memory.capacity
        if short > 0 and lane.reclaim:
            cells = min(-(-short // layers), lane.reclaim) * layers
            lane.reclaim -= cells // layers
            memory.cached -= cells
            memory.give(cells)
        memory.take(blocks * layers)

    def hand_over(self, request_id: int, front: SimLane) -> None:
        """The lane in front has computed what an entry behind it goes on from."""
        lane, entry = self.behind.pop((request_id, front.id))
        target = next(target for target in lane.targets if target.entry.request_id == request_id)
        target.entry = entry
        self._take_over(lane, entry, entry.computed)

    def _count_migration(self, lane: SimLane, entry: Entry) -> None:
        requests, request_id = self.requests, entry.request_id
        before = requests.instance[request_id]
        if before < 0:
            requests.cached_tokens[request_id] = entry.shared
        elif before != lane.home and entry.computed > 0 and self.generated[request_id] > 0:
            requests.num_migrations[request_id] += 1
        requests.instance[request_id] = lane.home

    def stored(self, lane: SimLane, request_id: int) -> int:
        """Tokens whose KV a request in a lane has at the lane's last boundary."""
        member = lane.members.get(request_id)
        if member is not None:
            return member.offset + lane.iteration
        for target in lane.targets:
            if target.entry.request_id == request_id:
                return target.computed
        raise ContractError(f"request {request_id} is not in lane {lane.id}")

    def evict(self, lane: SimLane, request_id: int, keep: bool, cause: str = "removed") -> None:
        """Remove a request at a boundary: free its KV (a preemption), or park it under its name."""
        stored = self.stored(lane, request_id)
        self.executor.stalls.left(lane, request_id, self.state.now, "parked" if keep else cause)
        member = lane.members.get(request_id)
        if member is not None:
            entry, charged = member.entry, stored
            self.settle_generated(lane, member)
            lane.leave(request_id)
        else:
            target = next(target for target in lane.targets if target.entry.request_id == request_id)
            entry, charged = target.entry, target.target
            lane.targets.remove(target)
        for key in [key for key, value in self.behind.items() if key[0] == request_id and value[0] is lane]:
            del self.behind[key]
        if lane.followers:
            self.executor.moves.unfollow(lane, request_id)
        if not keep:
            self.requests.num_preemptions[request_id] += 1
        self.release(lane, entry, charged, stored if keep else 0)

    def settle_generated(self, lane: SimLane, member: Member) -> None:
        request_id = member.entry.request_id
        self.generated[request_id] = self.output[request_id] - (member.finish - lane.iteration)

    def release(self, lane: SimLane, entry: Entry, charged: int, keep_tokens: int) -> None:
        """Give back `charged` tokens' blocks at the stages; keep the first `keep_tokens` as held KV."""
        state, moves = self.state, self.executor.moves
        request_id, shared = entry.request_id, entry.shared
        if not keep_tokens and (moves.copies or moves.swaps):
            moves.cancel(request_id)
        if request_id in lane.spread:
            self.executor.control.release(lane, entry, charged, keep_tokens)
            return
        size = state.block_size
        blocks = -(-charged // size) - shared // size
        for stage in lane.stages:
            state.memory[stage.instance].give(blocks * (stage.layers[1] - stage.layers[0]))
            if keep_tokens > shared:
                held = Held(stage.instance, Tier.HBM, stage.layers, shared, keep_tokens)
                state.hold(request_id, held)
        if not keep_tokens and request_id in state.held:
            state.free_all(request_id)

    def lane_of(self, request_id: int) -> SimLane | None:
        for lane in self.executor.lanes.values():
            if request_id in lane.members or any(t.entry.request_id == request_id for t in lane.targets):
                return lane
        return None
