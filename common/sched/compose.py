"""Iteration composition: which prompts advance by how much in the next iteration of a lane.

Pure and shared: every executor composes with `next_iteration`, so all ranks of a group and all runtimes agree, and a
policy can foresee when the token budget will have room for another request (`iterations_until_room`).
Tokens, not phases: a request recomputed after a preemption is a prompt that happens to contain its own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from common.types import Rule


class Target(Protocol):
    """A request in a lane whose tokens `computed` .. `target` are still to be computed."""

    computed: int
    target: int


def next_iteration(rule: Rule, budget: int, num_decodes: int, targets: Sequence[Target]) -> tuple[bool, list[int]]:
    """Whether decodes run, and the chunk of each leading target (the list ends at the first that gets nothing).

    CHUNKED and SARATHI: every decode takes one token of the budget, prompts share the rest in order. PREFILL_FIRST:
    whole prompts, alone, as many as the budget holds (one always goes). PREFILL_FIRST_LEGACY: the budget holds
    count x longest, as in vLLM 0.2, where prompts were padded.
    """
    if not targets:
        return True, []
    if rule is Rule.CHUNKED or rule is Rule.SARATHI:
        chunks = []
        room = budget - num_decodes
        for target in targets:
            if room <= 0:
                break
            need = target.target - target.computed
            chunk = need if need < room else room
            chunks.append(chunk)
            room -= chunk
        return True, chunks
    return False, _whole_prompts(rule is Rule.PREFILL_FIRST_LEGACY, budget, targets)


def _whole_prompts(padded: bool, budget: int, targets: Sequence[Target]) -> list[int]:
    chunks: list[int] = []
    total = longest = 0
    for target in targets:
        need = target.target - target.computed
        total += need
        longest = max(longest, need)
        cost = longest * (len(chunks) + 1) if padded else total
        if chunks and cost > budget:
            break
        chunks.append(need)
    return chunks


def room_for(rule: Rule, budget: int, num_decodes: int, targets: Sequence[Target], need: int) -> bool:
    """Would a further target of `need` tokens, put last, get tokens in the next iteration?"""
    if not targets:
        return num_decodes < budget or (rule is not Rule.CHUNKED and rule is not Rule.SARATHI)
    pending = sum([target.target - target.computed for target in targets])
    if rule is Rule.CHUNKED or rule is Rule.SARATHI:
        return pending + num_decodes < budget
    if rule is Rule.PREFILL_FIRST_LEGACY:
        longest = max(max(target.target - target.computed for target in targets), need)
        return longest * (len(targets) + 1) <= budget
    return pending + need <= budget


def iterations_until_reached(rule: Rule, budget: int, num_decodes: int, targets: Sequence[Target]) -> int:
    """Iterations at whose end the first target is reached, if nothing else changes."""
    if rule is not Rule.CHUNKED and rule is not Rule.SARATHI:
        return 1
    room = budget - num_decodes
    return -(-(targets[0].target - targets[0].computed) // room) if room > 0 else 1 << 40


def iterations_until_room(rule: Rule, budget: int, num_decodes: int, targets: Sequence[Target], need: int) -> int:
    """Iterations after whose end `room_for` such a target first holds, if nothing else changes (0: now)."""
    if rule is not Rule.CHUNKED and rule is not Rule.SARATHI:
        return 0 if room_for(rule, budget, num_decodes, targets, need) else 1
    pending = [target.target - target.computed for target in targets]
    left, count, done = sum(pending), 0, 0
    while left + num_decodes >= budget:
        room = budget - num_decodes
        if room <= 0:
            return 1 << 40
        while done < len(pending) and pending[done] <= room:
            room -= pending[done]
            left -= pending[done]
            done += 1
            num_decodes += 1
        if done < len(pending) and room > 0:
            pending[done] -= room
            left -= room
        count += 1
    return count
