"""What an operation of the scheduler looks at grows no faster than the logarithm of the number of GPUs. Lines executed
are counted, not time, so that a busy machine does not matter (`bench.mell.cost` measures)."""

from __future__ import annotations

import random
import sys

import pytest

from bench.mell.cost import CAPACITY, fill

OPERATIONS = 240


def lines_per_operation(num_gpus, mixed, seed):
    """Mean and worst lines of Python in Allocate, Depart and Update, a third each, and how many GPUs there were."""
    rng = random.Random(seed)
    groups = fill(rng, num_gpus, 5 if mixed else 11, mixed)
    live, counts, next_id = list(groups.sizes), [], 10**6
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    for step in range(OPERATIONS):
        at = rng.randrange(len(live))
        request_id, kind, count = live[at], step % 3, 0
        size = rng.choice((10, 100, 200, 400, 700) if mixed else (20, 60, 120))
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            if kind == 0:
                groups.allocate(next_id, size)
            elif kind == 1:
                groups.depart(request_id)
            else:
                groups.update(request_id, min(CAPACITY, groups.sizes[request_id] + 1))
        finally:
            sys.settrace(before)
        if kind == 0:
            live.append(next_id)
            next_id += 1
        elif kind == 1:
            live[at] = live[-1]
            live.pop()
        counts.append(count)
    return sum(counts) / len(counts), max(counts), len(groups.bins)


@pytest.mark.parametrize("mixed", [False, True])
def test_work_per_operation_grows_no_faster_than_the_logarithm_of_gpus(mixed):
    small, worst_small, few = lines_per_operation(16, mixed, 0)
    large, worst_large, many = lines_per_operation(512, mixed, 0)
    assert few < 32 and many > 400 and small > 20
    assert large <= small * 9 / 4  # log2 512 / log2 16
    assert worst_large <= 4 * worst_small


def test_the_count_would_notice_a_look_at_every_gpu():
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    def look(bins):
        return [one for one in bins if one > 3]

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        look(range(500))
    finally:
        sys.settrace(before)
    assert count > 500
