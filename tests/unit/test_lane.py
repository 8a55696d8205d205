"""One lane's scheduler, fed by hand: every number below was worked out on paper. Blocks of 4 tokens, budget 8."""

from __future__ import annotations

import pytest

from common.errors import ContractError
from common.sched.lane import EngineConfig, LaneScheduler, Seq
from common.types import Abort, Entry, FreeSpan, Interrupt, Rule, RunStep, Stage, Status, StepDone

STAGES = (Stage(0, (0, 2)),)


class Bench:
    """A lane and the commands it gave last."""

    def __init__(self, blocks, **config):
        settings = {"block_size": 4, "max_num_batched_tokens": 8, "max_num_seqs": 4, **config}
        self.lane = LaneScheduler(0, STAGES, blocks, EngineConfig(**settings))
        self.step = None

    def _note(self, out):
        for command in out:
            if isinstance(command, RunStep):
                self.step = command
        return out

    def submit(self, request_id, prompt, content=None):
        out = []
        self.lane.submit(Seq(request_id, prompt, 1 << 20, content, -1), out)
        return self._note(out)

    def done(self, clock, finished=(), prefilled=(), partial=()):
        out = []
        before = self.lane.iteration
        event = StepDone(self.step.command_id, 0, Status.OK, clock - before, clock, finished, prefilled, partial)
        self.lane.step_done(event, out)
        self.lane.schedule(out)
        return self._note(out)


def added(step):
    return [(entry.request_id, entry.computed, entry.target) for entry in step.add]


def test_the_first_step_says_everything():
    """6 tokens take 2 of 10 blocks. The 7th and 8th fit; tokens 9, 13, .. 37 take the other 8; the next would come
    with token 41, computed by the iteration after the 34th."""
    bench = Bench(10)
    [step] = bench.submit(1, 6)
    assert step == RunStep(step.command_id, 0, (Entry(1, 0, 6),), stages=STAGES, token_budget=8, rule=Rule.CHUNKED,
                           max_iterations=34)  # fmt: skip
    assert (bench.lane.free, bench.lane.used_blocks(), bench.lane.outstanding()) == (8, 2, 1)


def test_later_steps_say_only_what_changes():
    bench = Bench(10)
    first = bench.submit(1, 6)[0]
    [step] = bench.done(1, prefilled=((1, 1),))
    assert step == RunStep(first.command_id + 1, 0, max_iterations=34)  # stored 6: as far as before, plus one
    assert step.stages is step.token_budget is step.rule is None


def test_an_arrival_that_could_start_interrupts_once():
    bench = Bench(10)
    bench.submit(1, 6)
    assert bench.submit(2, 2) == [Interrupt(0)]
    assert bench.submit(3, 2) == []
    [step] = bench.done(1, prefilled=((1, 1),))
    assert added(step) == [(2, 0, 2), (3, 0, 2)]
    assert bench.lane.free == 10 - 2 - 1 - 1


@pytest.mark.parametrize(
    ("config", "prompt"),
    (({"max_num_seqs": 1}, 2), ({}, 33), ({"watermark": 0.2}, 25)),
    ids=("seats", "blocks", "mark"),
)
def test_an_arrival_that_could_not_start_leaves_the_lane_alone(config, prompt):
    bench = Bench(10, **config)
    bench.submit(1, 6)
    assert bench.submit(2, prompt) == []


def test_the_queue_keeps_its_order():
    """The head does not fit beside the first request; what is behind it would, and waits all the same."""
    bench = Bench(10)
    bench.submit(1, 6)
    bench.submit(2, 36)
    bench.submit(3, 1)
    [step] = bench.done(1, prefilled=((1, 1),))
    assert step.add == ()
    [step] = bench.done(5, finished=(1,))
    assert added(step) == [(2, 0, 36)] and len(bench.lane.waiting) == 1  # 36 tokens want the whole budget


def test_a_step_ends_when_the_budget_has_room_for_the_head():
    """A prompt of 20 takes 8, 8, 4: after two iterations the next one has 4 left over."""
    bench = Bench(20)
    bench.submit(1, 20)
    assert bench.submit(2, 3) == [Interrupt(0)]
    [step] = bench.done(1, partial=((1, 8),))
    assert (step.add, step.max_iterations) == ((), 1)  # 12 are left: one more iteration
    [step] = bench.done(2, partial=((1, 16),))
    assert added(step) == [(2, 0, 3)]


@pytest.mark.parametrize(
    ("rule", "prompts", "admitted"),
    ((Rule.PREFILL_FIRST, (4, 4, 4), 2), (Rule.PREFILL_FIRST_LEGACY, (2, 3, 3), 2), (Rule.SARATHI, (4, 3, 4), 2)),
)
def test_admission_stops_at_the_budget(rule, prompts, admitted):
    """Beside a decoding request. Legacy: 3 x 3 padded tokens exceed 8. Sarathi: the decode takes one of the 8, two
    prompts the other seven, and the third would get none."""
    bench = Bench(20, rule=rule)
    bench.submit(1, 1)
    for index, prompt in enumerate(prompts):
        bench.submit(2 + index, prompt)
    [step] = bench.done(1, prefilled=((1, 1),))
    assert len(step.add) == admitted


def test_refusals_name_the_limit():
    bench = Bench(10, watermark=0.2, max_model_len=30, rule=Rule.PREFILL_FIRST)
    refuse = lambda prompt: bench.lane.refusal(Seq(1, prompt, 10, None, -1))  # noqa: E731
    assert refuse(8) is None
    assert refuse(9) == "prompt of 9 tokens exceeds max_num_batched_tokens 8 (no chunked prefill)"
    assert refuse(30) == "prompt of 30 tokens exceeds max_model_len 30"
    bench = Bench(10, watermark=0.2)
    refuse = lambda prompt: bench.lane.refusal(Seq(1, prompt, 10, None, -1))  # noqa: E731
    assert refuse(31) is None  # 32 tokens with the first of the reply: 8 blocks, and 2 kept free
    assert refuse(32) == "prompt of 32 tokens exceeds the KV cache of 10 blocks"


# ---------------------------------------------------------------- preemption


def crowded(**config):
    """Two requests of 4 tokens on 4 blocks; the second joins one iteration later than the first."""
    bench = Bench(4, **config)
    bench.submit(1, 4)
    bench.submit(2, 4)
    bench.done(1, prefilled=((1, 1),))  # the second arrived in mid-iteration
    return bench


def test_the_last_admitted_is_preempted_and_comes_back_first():
    bench = crowded()
    assert added(bench.step) == [(2, 0, 4)]
    # Stored: 4 and 0. Iteration 2 makes it 5 (a block) and 4; free 1. Iteration 3: the second stores 5 (a block).
    # Iterations 4 and 5 need nothing, iteration 6 finds 8 stored by the first, and no block.
    assert bench.step.max_iterations == 4  # counted as if the second already decoded: never too late
    [step] = bench.done(5, prefilled=((2, 2),))
    assert (step.remove, step.max_iterations) == ((2,), 1)  # the first stores 8: its next token wants a block
    assert bench.lane.free == 2 and bench.lane.num_preemptions == 1
    assert bench.submit(3, 1) == []
    assert [seq.request_id for seq in bench.lane.waiting] == [2, 3]
    [step] = bench.done(6)
    assert step.add == ()  # 8 known tokens want 2 blocks of the 1 that is free; 3 is behind
    assert step.max_iterations == 7  # 9 stored; tokens 10-12 fit, 13-16 take the last block, 17 has none
    [step] = bench.done(8, finished=(1,))
    assert step.add == (Entry(2, 0, 8),)  # 8 tokens take the whole budget: the third waits


def test_a_prompt_in_progress_can_be_preempted_too():
    """4 blocks: the first holds 2 (8 tokens), the prompt of 8 the other 2. Its chunks are 7 and 1."""
    bench = Bench(4)
    bench.submit(1, 7)
    bench.submit(2, 8)
    [step] = bench.done(1, prefilled=((1, 1),))
    assert added(step) == [(2, 0, 8)] and step.max_iterations == 1
    [step] = bench.done(2, partial=((2, 7),))  # 8 stored by the first: its next token wants a block
    assert step.remove == (2,) and bench.lane.free == 2 and bench.lane.targets == []
    assert [seq.known for seq in bench.lane.waiting] == [8]


def test_whoever_is_alone_and_still_too_long_is_given_up():
    """1 block: the fifth token has no place, now or ever. The lane is then free for others."""
    bench = Bench(1)
    bench.submit(1, 1)
    assert bench.step.max_iterations == 3
    bench.done(3, prefilled=((1, 1),))
    assert bench.step.max_iterations == 1
    [step] = bench.done(4)
    assert step.remove == (1,) and step.add == ()
    out = bench.done(4)
    assert out == [Abort(1, "output outgrew the KV cache of 1 blocks")]
    assert (bench.lane.free, bench.lane.outstanding(), bench.lane.busy) == (1, 0, False)
    assert added(bench.submit(2, 2)[0]) == [(2, 0, 2)]


def test_a_waiting_request_that_outgrew_the_instance_does_not_block_the_queue():
    """Watermark 2 of 10 blocks. The second request is preempted with 33 known tokens: 9 blocks, which with the
    watermark even an empty lane would not grant. Once nothing runs it is given up, and the third starts."""
    bench = Bench(10, watermark=0.2, max_num_batched_tokens=64)
    bench.submit(1, 1)
    bench.submit(2, 28)
    bench.done(1, prefilled=((1, 1),))
    [step] = bench.done(2, prefilled=((2, 2),))
    assert step.max_iterations == 4  # a block for token 29 and one for the first's fifth; none for token 33
    [step] = bench.done(6)
    assert step.remove == (2,)
    bench.submit(3, 2)
    assert bench.done(7)[0].add == ()
    abort, step = bench.done(8, finished=(1,))
    assert abort == Abort(2, "output outgrew the KV cache of 10 blocks")
    assert added(step) == [(3, 0, 2)]


def test_growth_beyond_the_ledger_is_refused():
    bench = Bench(4)
    bench.submit(1, 8)
    with pytest.raises(ContractError, match="grew by 3 blocks of 2 free"):
        bench.done(10, prefilled=((1, 1),))


# ---------------------------------------------------------------- prefix caching


def test_a_second_request_reads_what_the_first_has_computed():
    """Ten tokens are shared: two full blocks of four. The step ends where the first prompt is computed, so that the
    waiting one finds them."""
    bench = Bench(10, prefix_caching=True)
    [step] = bench.submit(1, 11, (("doc", 0, 10), ("own:1", 0, 1)))
    assert step.add == (Entry(1, 0, 11, keep=True, cache=True),)
    assert step.max_iterations == 2  # chunks of 8 and 3
    assert bench.submit(2, 12, (("doc", 0, 10), ("own:2", 0, 2))) == [Interrupt(0)]
    [step] = bench.done(1, partial=((1, 8),))
    assert added(step) == [(2, 0, 12)]  # the budget has room, and nothing is there to share yet
    bench = Bench(10, prefix_caching=True)
    bench.submit(1, 11, (("doc", 0, 10), ("own:1", 0, 1)))
    bench.done(2, prefilled=((1, 2),))
    bench.submit(2, 12, (("doc", 0, 10), ("own:2", 0, 2)))
    [step] = bench.done(3)
    assert step.add == (Entry(2, 8, 12, shared=8, keep=True, cache=True),)
    assert bench.lane.free == 10 - 3 - 1  # the third block of each is its own


def test_the_last_prompt_token_is_always_computed():
    """8 tokens, all of them cached: only the first block may be read, the second is computed again."""
    bench = Bench(10, prefix_caching=True)
    bench.submit(1, 8, (("doc", 0, 8),))
    out = bench.done(1, finished=(1,), prefilled=((1, 1),))
    assert out == [FreeSpan(0, 1, retain=2)]
    assert (bench.lane.free, bench.lane.available(), bench.lane.used_blocks()) == (8, 10, 0)
    [step] = bench.submit(2, 8, (("doc", 0, 8),))
    assert step.add == (Entry(2, 4, 8, shared=4, keep=True, cache=True),)


def test_a_reply_is_found_by_the_next_turn():
    """4 + 5 tokens, the last of which was never stored: the next turn reads 8."""
    bench = Bench(10, prefix_caching=True)
    bench.submit(1, 4, (("own:1", 0, 4),))
    bench.done(1, prefilled=((1, 1),))
    assert bench.done(5, finished=(1,))[-1] == FreeSpan(0, 1, retain=2)
    [step] = bench.submit(2, 12, (("own:1", 0, 4), ("gen:1", 0, 5), ("own:2", 0, 3)))
    assert step.add == (Entry(2, 8, 12, shared=8, keep=True, cache=True),)


def test_a_preempted_request_resumes_with_what_is_left_of_its_blocks():
    """As `crowded`, but removed blocks stay: the second leaves 1 full block of its 7 stored tokens behind."""
    bench = crowded(prefix_caching=True)
    assert bench.step.max_iterations == 1  # to the end of the prompt
    [step] = bench.done(2, prefilled=((2, 2),))
    assert (step.max_iterations, step.reclaim) == (3, 0)  # 5 and 4 stored, 1 free: up to 8 and 7
    [step] = bench.done(5)
    assert (step.remove, step.retain, step.reclaim) == ((2,), (1,), 1)
    assert (bench.lane.free, bench.lane.available()) == (1, 2)
    bench.done(6)
    assert (bench.lane.free, bench.lane.available()) == (0, 1)
    out = bench.done(8, finished=(1,))
    # The first stored 11 tokens in 3 blocks: 2 stay cached, 1 is free, with which the second goes on: 8 tokens known.
    assert out[0] == FreeSpan(0, 1, retain=2)
    assert out[-1].add == (Entry(2, 4, 8, shared=4, keep=True, cache=True),)
    assert bench.lane.free == 0


def test_cached_blocks_are_evicted_oldest_first_when_an_admission_needs_them():
    bench = Bench(4, prefix_caching=True)
    bench.submit(1, 8, (("old", 0, 8),))
    bench.done(1, finished=(1,), prefilled=((1, 1),))
    bench.submit(2, 4, (("new", 0, 4),))
    bench.done(2, finished=(2,), prefilled=((2, 2),))
    assert (bench.lane.free, bench.lane.index.cached_blocks) == (1, 3)
    out = bench.submit(3, 12, (("other", 0, 12),))
    [step] = out
    assert added(step) == [(3, 0, 12)] and step.reclaim == 3  # the two that its join takes over, and the one left
    assert bench.lane.index.match((("old", 0, 8),), 8) == 0
    assert bench.lane.index.match((("new", 0, 4),), 4) == 4


def test_a_refused_admission_leaves_the_order_of_eviction():
    """Two old blocks and a new one are cached, none is free. What reads the old ones needs two more than are left."""
    bench = Bench(5, prefix_caching=True)
    bench.submit(1, 8, (("old", 0, 8),))
    bench.done(1, finished=(1,), prefilled=((1, 1),))
    bench.submit(2, 4, (("new", 0, 4),))
    bench.done(2, finished=(2,), prefilled=((2, 2),))
    bench.submit(3, 5, (("run", 0, 5),))
    bench.submit(4, 13, (("old", 0, 8), ("own", 0, 5)))
    index = bench.lane.index
    assert (bench.lane.free, index.cached_blocks, index.evictable_blocks) == (0, 3, 3)
    bench.done(3, prefilled=((3, 3),))
    assert (bench.lane.outstanding(), len(bench.lane.waiting)) == (2, 1)
    assert index.match((("old", 0, 8),), 8) == 8
    index.evict(1)
    assert index.match((("old", 0, 8),), 8) == 4 and index.match((("new", 0, 4),), 4) == 4


# ---------------------------------------------------------------- loss


def test_after_a_loss_every_request_knows_what_it_had_said():
    bench = Bench(20, max_num_batched_tokens=64)
    bench.submit(1, 5)
    bench.submit(2, 9)
    bench.done(1, prefilled=((1, 1),))
    bench.submit(3, 4)
    event = StepDone(bench.step.command_id, 0, Status.FAILED, 2, 3, (), ((2, 2),))
    seqs = bench.lane.lost(event)
    assert [(seq.request_id, seq.known, seq.computed) for seq in seqs] == [(1, 8, 0), (2, 11, 0), (3, 4, 0)]
    assert bench.lane.outstanding() == 0


def test_a_preempted_request_finds_its_own_output_in_the_cache_when_it_resumes() -> None:
    """With prefix caching the full blocks of prompt *and* output stay; some resume must hit beyond its prompt."""
    import numpy as np

    from common.driver import drive
    from common.executors.sim import SimExecutor
    from common.log import Recorder, Submitted
    from common.record import RequestColumns, RunRecord
    from systems.baselines.vllm import VllmPolicy
    from tests.fakes import cluster, random_workload

    workload = random_workload(np.random.default_rng(5), 60, 300, 60, 200)
    model = cluster(1, blocks=48)
    record = RunRecord(RequestColumns.empty(60))
    lines: list[object] = []
    executor = Recorder(SimExecutor(model, workload, record), lines.append)
    drive(VllmPolicy(model.info(), EngineConfig(prefix_caching=True, max_num_seqs=32)), executor, record)
    steps = [line.command for line in lines if isinstance(line, Submitted) and isinstance(line.command, RunStep)]
    hits = [entry.shared - workload.prompt_tokens[entry.request_id] for step in steps for entry in step.add]
    assert sum(record.requests.num_preemptions) > 0 and max(hits) > 0
