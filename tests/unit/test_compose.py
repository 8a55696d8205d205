"""Which prompts advance by how much in one iteration: outcomes worked out by hand, and the look-ahead against them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.sched.compose import iterations_until_reached, iterations_until_room, next_iteration, room_for
from common.types import Rule


@dataclass
class Target:
    target: int
    computed: int = 0


def targets(*needs):
    return [Target(need) for need in needs]


@pytest.mark.parametrize("rule", (Rule.CHUNKED, Rule.SARATHI))
@pytest.mark.parametrize(
    ("budget", "decodes", "needs", "chunks"),
    (
        (10, 0, (), []),
        (10, 0, (4, 3), [4, 3]),
        (10, 0, (12,), [10]),
        (10, 4, (4, 8), [4, 2]),
        (10, 4, (6, 8), [6]),
        (10, 10, (6,), []),
        (10, 12, (6,), []),  # more decodes than the budget: all of them run all the same
        (10, 3, (1, 1, 1, 9, 9), [1, 1, 1, 4]),
    ),
)
def test_chunked_fills_what_decodes_leave(rule, budget, decodes, needs, chunks):
    assert next_iteration(rule, budget, decodes, targets(*needs)) == (True, chunks)


def test_chunks_count_from_what_is_computed():
    assert next_iteration(Rule.CHUNKED, 10, 2, [Target(20, 15), Target(9, 1)]) == (True, [5, 3])


@pytest.mark.parametrize(
    ("rule", "budget", "needs", "chunks"),
    (
        (Rule.PREFILL_FIRST, 10, (4, 6, 1), [4, 6]),
        (Rule.PREFILL_FIRST, 10, (4, 7), [4]),
        (Rule.PREFILL_FIRST, 10, (12, 1), [12]),  # one always goes
        (Rule.PREFILL_FIRST, 10, (5, 5), [5, 5]),
        (Rule.PREFILL_FIRST_LEGACY, 12, (4, 4, 4, 1), [4, 4, 4]),
        (Rule.PREFILL_FIRST_LEGACY, 12, (1, 6), [1, 6]),
        (Rule.PREFILL_FIRST_LEGACY, 11, (1, 6), [1]),  # 2 x 6 with padding
        (Rule.PREFILL_FIRST_LEGACY, 11, (6, 1), [6]),
        (Rule.PREFILL_FIRST_LEGACY, 3, (6,), [6]),
    ),
)
def test_prefill_first_takes_whole_prompts_alone(rule, budget, needs, chunks):
    for decodes in (0, 5, 50):
        assert next_iteration(rule, budget, decodes, targets(*needs)) == (False, chunks)


@pytest.mark.parametrize("rule", Rule)
def test_without_prompts_decodes_run(rule):
    assert next_iteration(rule, 1, 3, []) == (True, [])


@pytest.mark.parametrize(
    ("rule", "budget", "decodes", "needs", "need", "room"),
    (
        (Rule.CHUNKED, 10, 4, (5,), 1, True),
        (Rule.CHUNKED, 10, 4, (6,), 1, False),
        (Rule.SARATHI, 10, 10, (), 1, False),
        (Rule.PREFILL_FIRST, 10, 99, (), 50, True),
        (Rule.PREFILL_FIRST, 10, 99, (6,), 4, True),
        (Rule.PREFILL_FIRST, 10, 99, (6,), 5, False),
        (Rule.PREFILL_FIRST_LEGACY, 12, 99, (4, 4), 4, True),
        (Rule.PREFILL_FIRST_LEGACY, 12, 99, (4, 4), 5, False),
        (Rule.PREFILL_FIRST_LEGACY, 12, 99, (5, 1), 1, False),
    ),
)
def test_room_for_one_more(rule, budget, decodes, needs, need, room):
    assert room_for(rule, budget, decodes, targets(*needs), need) is room


DRAWS = (st.sampled_from(tuple(Rule)), st.integers(1, 20), st.integers(0, 8),
         st.lists(st.integers(1, 12), max_size=5), st.integers(1, 12))  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(*DRAWS)
def test_room_means_that_the_next_iteration_takes_it(rule, budget, decodes, needs, need):
    _, chunks = next_iteration(rule, budget, decodes, targets(*needs, need))
    taken = len(chunks) == len(needs) + 1
    assert room_for(rule, budget, decodes, targets(*needs), need) is taken


@settings(max_examples=300, deadline=None, derandomize=True)
@given(*DRAWS)
def test_looking_ahead_is_running_ahead(rule, budget, decodes, needs, need):
    """Iteration by iteration: when does the token budget have room?

    Under prefill-first only the first iteration is foreseen: with a prompt in the batch it may end in a decision."""
    batch = targets(*needs)
    room = iterations_until_room(rule, budget, decodes, batch, need)
    whole = rule in (Rule.PREFILL_FIRST, Rule.PREFILL_FIRST_LEGACY)
    for done in range(200):
        if room_for(rule, budget, decodes, batch, need):
            assert room <= done if whole else room == done
            return
        assert whole or room > done
        _, chunks = next_iteration(rule, budget, decodes, batch)
        for chunk, target in zip(chunks, list(batch)):
            target.computed += chunk
            if target.computed == target.target:
                batch.remove(target)
                decodes += 1
    assert room >= 1 << 40  # decodes alone exceed the budget


@settings(max_examples=200, deadline=None, derandomize=True)
@given(*DRAWS[:3], st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_the_first_prompt_is_reached_when_foreseen(rule, budget, decodes, needs):
    batch = targets(*needs)
    foreseen = iterations_until_reached(rule, budget, decodes, batch)
    for done in range(1, 50):
        _, chunks = next_iteration(rule, budget, decodes, batch)
        for chunk, target in zip(chunks, batch):
            target.computed += chunk
        if any(target.computed == target.target for target in batch):
            assert foreseen == done
            return
    assert foreseen >= 1 << 40
