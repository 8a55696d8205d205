"""Blocks that a destination promises to a request before its source removes it, as tokens."""

from __future__ import annotations

from common.sched.lane import EngineConfig, Seq
from common.sched.migrating import MigratingLane
from common.sched.moving import Migration, Mover, State
from common.types import RunStep, Stage, Status, StepDone

BLOCK = 16


def lane(blocks=10, watermark=0.0):
    return MigratingLane(0, (Stage(0, (0, 4)),), blocks, EngineConfig(BLOCK, 2048, 8, watermark=watermark))


def request(ident, tokens):
    return Seq(ident, tokens, 100, None, -1)


def steps(out):
    return [command for command in out if isinstance(command, RunStep)]


def ended(step, clock, finished=(), prefilled=()):
    return StepDone(step.command_id, step.lane, Status.OK, clock, clock, tuple(finished), tuple(prefilled))


def test_a_promise_holds_blocks_and_is_no_kv():
    one = lane()
    assert one.promise(7, 4) and (one.free, one.used_blocks(), one.empty) == (6, 0, False)
    assert one.promise(7, 6) and one.free == 4  # in all, not more of it
    assert not one.promise(8, 5) and (one.free, one.promised) == (4, {7: 6})
    one.retract(7)
    assert (one.free, one.empty) == (10, True)


def test_who_arrives_cannot_take_what_is_promised_and_who_has_a_promise_goes_first():
    one, out = lane(), []
    assert one.promise(7, 4)
    one.submit(request(1, 8 * BLOCK), out)
    assert steps(out) == [] and one.free == 6
    one.submit(request(7, 3 * BLOCK), out)
    (step,) = steps(out)
    assert [entry.request_id for entry in step.add] == [7]
    assert (one.free, one.promised) == (7, {})  # it needed three of the four
    assert [seq.request_id for seq in one.waiting] == [1]  # eight blocks of seven


def test_the_watermark_is_for_others():
    one, out = lane(watermark=0.5), []
    assert one.promise(7, 8)
    one.submit(request(7, 8 * BLOCK), out)
    assert [entry.request_id for entry in steps(out)[0].add] == [7]


def test_who_has_outgrown_a_promise_stays_at_its_source():
    one, out = lane(), []
    one.submit(request(3, 2 * BLOCK), out)
    (step,) = steps(out)
    assert step.add[0][:3] == (3, 0, 2 * BLOCK)
    one.step_done(ended(step, 2, prefilled=[(3, 1)]), out)  # 33 tokens known: three blocks
    one.leaving[3] = 2
    one.schedule(out)
    assert (one.kept, one.left, list(one.running), one.leaving) == ([3], [], [3], {})
    one.step_done(ended(steps(out)[-1], 3), out)
    one.kept, one.leaving[3] = [], 3
    one.schedule(out)
    assert [seq.request_id for seq in one.left] == [3] and steps(out)[-1].remove == (3,)
    assert (one.free, one.kept) == (10, [])


def test_a_request_that_loses_the_kv_that_it_moved_is_one_migration():
    one = lane()
    mover = Mover(4, {}, iter(range(99)).__next__, lambda seq, instance, out: None)
    moving = Migration(7, lane(), one, "kv", State.TAIL, parked=request(7, 20), parked_ns=5)
    mover.by_request[7] = moving
    mover._arrived(moving, 6, [])
    mover.prefilled(7, 9)  # its instance died, or had not one block for it: it was computed anew
    stats = mover.stats
    assert (stats.kv_done, stats.token_done, stats.left_ns, stats.stalls_ns) == (1, 0, [(7, 5)], {7: [4]})


def test_who_is_preempted_is_counted_with_all_that_it_computes_anew():
    mover = Mover(4, {}, iter(range(99)).__next__, lambda seq, instance, out: None)
    one, out = lane(blocks=5), []
    for ident in (1, 2):
        one.submit(request(ident, 2 * BLOCK), out)
    for clock in (1, 2):  # the first decodes, the second's prompt is computed; then each wants a third block
        one.step_done(ended(steps(out)[-1], clock, prefilled=[(clock, clock)]), out)
        mover.boundary(one, clock, out)
    assert steps(out)[-1].remove == (2,) and mover.stats.preempted == 1
    assert mover.stats.preempted_tokens == one.waiting[0].known == 2 * BLOCK + 1
