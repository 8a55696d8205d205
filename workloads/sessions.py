"""Multi-turn sessions: each prompt is the previous prompt, its generated reply, and new user text.

The next turn waits for the reply and a think time, so these workloads are closed loops per session.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from common.errors import TraceError
from common.rng import stream
from workloads import arrivals
from workloads.arrivals import NS
from workloads.config import Common, File, Sessions
from workloads.lengths import lognormal
from workloads.transform import horizon_s, scale_tokens, zero_message
from workloads.types import Content, Ints, Piece, Workload, add_counts, no_counts

MESSAGE_MAX = 16384  # tokens of one message
TURNS_DRAWN = 64  # think times drawn per session; more only where some session is longer


@dataclass(frozen=True)
class Turns:
    """Turns in session order: new user tokens (all of the prompt on a first turn, less its system part), reply."""

    session: Ints  # rising: a session's turns are neighbours
    user_tokens: Ints
    output_tokens: Ints
    system: tuple[Piece, ...] | None = None  # per session: what its first prompt starts with


def compose(name: str, turns: Turns, start_ns: Ints, think_ns: Ints, config: Common, why: str) -> Workload:
    """Prompts grow from turn to turn. Lengths are scaled and limited per turn, so replies and prompts agree."""
    counts = no_counts()
    turns = _scaled(turns, config.length_scale)
    turns, think_ns, counts = _without_empty(name, turns, think_ns, config, counts)
    over = turns.output_tokens > config.max_output_tokens
    counts = add_counts(counts, clipped_output=int(over.sum()))
    output = np.minimum(turns.output_tokens, config.max_output_tokens)
    num = len(output)
    is_first = np.append(True, turns.session[1:] != turns.session[:-1]) if num else np.empty(0, bool)
    content: list[Content] = []
    history: Content = ()
    session, user, replies = turns.session.tolist(), turns.user_tokens.tolist(), output.tolist()
    for index, fresh in enumerate(is_first.tolist()):
        if fresh:
            begin = turns.system[session[index]] if turns.system is not None else ("", 0, 0)
            history = (begin,) if begin[2] else ()
        else:
            history = (*history, (f"gen:{index - 1}", 0, replies[index - 1]))
        history = (*history, (f"s:{session[index]}", _spoken(history), user[index]))
        content.append(history)
    return Workload(
        name,
        np.where(is_first, start_ns[turns.session], -1).astype(np.int64),
        np.array([sum(piece[2] for piece in pieces) for pieces in content], np.int64),
        output,
        tuple(content),
        turns.session,
        np.where(is_first, -1, np.arange(num) - 1).astype(np.int64),
        np.where(is_first, 0, think_ns).astype(np.int64),
        None,
        counts,
        config.max_output_tokens,
        why,
    )


def _spoken(history: Content) -> int:
    """How much of the session's own text its history already holds."""
    return sum(length for source, _, length in history if source.startswith("s:"))


def _scaled(turns: Turns, factor: float) -> Turns:
    if factor == 1.0:
        return turns
    system = turns.system and tuple((name, start, round(factor * size)) for name, start, size in turns.system)
    user, output = scale_tokens(turns.user_tokens, factor), scale_tokens(turns.output_tokens, factor)
    return replace(turns, user_tokens=user, output_tokens=output, system=system)


def _without_empty(
    name: str, turns: Turns, think_ns: Ints, config: Common, counts: dict[str, int]
) -> tuple[Turns, Ints, dict[str, int]]:
    empty = (turns.user_tokens == 0) | (turns.output_tokens == 0)
    if not empty.any():
        return turns, think_ns, counts
    if config.zero_tokens == "error":
        raise TraceError(zero_message(f"{name}: turn {int(np.argmax(empty))}"))
    user, output = turns.user_tokens, turns.output_tokens
    if config.zero_tokens == "clip":
        clipped = replace(turns, user_tokens=np.maximum(user, 1), output_tokens=np.maximum(output, 1))
        return clipped, think_ns, add_counts(counts, clipped_zero=int(empty.sum()))
    # A session ends before its first empty turn.
    seen = np.cumsum(empty)
    first_turn = np.searchsorted(turns.session, turns.session)
    before = seen[first_turn] - empty[first_turn]
    alive = seen == before
    counts = add_counts(counts, rejected_zero=int(empty.sum()), dropped_turns=int((~alive).sum() - empty.sum()))
    kept = replace(turns, session=turns.session[alive], user_tokens=user[alive], output_tokens=output[alive])
    return kept, think_ns[alive], counts


def think_times(session: Ints, mean_s: float, cv: float, seed: int) -> Ints:
    """Drawn by (session, turn) from a stream of its own, so no think time depends on how long sessions get."""
    num = len(session)
    if cv == 0.0 or mean_s == 0.0 or num == 0:
        return np.full(num, round(mean_s * NS), np.int64)
    turn = np.arange(num) - np.searchsorted(session, session)
    most = max(TURNS_DRAWN, int(turn.max()) + 1)
    unit = arrivals.unit_gaps(stream(seed, "workload.think"), (int(session[-1]) + 1) * most, cv)
    return np.rint(unit[session * most + turn] * mean_s * NS).astype(np.int64)


def build_sessions(config: Sessions, seed: int) -> Workload:
    """Chat sessions; with `system_tokens`, agents whose few-shot prompt is shared and whose tools answer between."""
    start_ns, session = _starts_and_turns(config, seed)
    num = len(session)
    is_first = np.append(True, session[1:] != session[:-1]) if num else np.empty(0, bool)
    opening = _draw("first", config.first_mean, config.first_p50, num, seed)
    later = _draw("user", config.user_mean, config.user_p50, num, seed)
    output = _draw("output", config.output_mean, config.output_p50, num, seed)
    system = None
    if config.system_tokens:
        which = stream(seed, "workload.content").integers(config.system_prompts, size=len(start_ns)).tolist()
        system = tuple((f"system:{prompt}", 0, config.system_tokens) for prompt in which)
    turns = Turns(session, np.where(is_first, opening, later), output, system)
    think = think_times(session, config.think_mean_s, config.think_cv, seed)
    why = "sessions: means and medians after MemServe Fig. 7, turn counts and think times ours"
    return compose("sessions", turns, start_ns, think, config, why)


def _draw(name: str, mean: float, p50: float, num: int, seed: int) -> Ints:
    return lognormal(mean, p50=p50, high=MESSAGE_MAX).draw(stream(seed, f"workload.lengths.{name}"), num)


def _starts_and_turns(config: Sessions, seed: int) -> tuple[Ints, Ints]:
    """Session starts, and the session of every turn: as many whole sessions as the config asks for."""
    num = config.num_requests  # a session has at least one turn
    start_ns = arrivals.constant(stream(seed, "workload.arrivals"), config.rate, config.cv, num, horizon_s(config))
    draws = stream(seed, "workload.turns").random(len(start_ns))
    stop = 1.0 / config.turns_mean
    if stop >= 1.0:
        num_turns = np.ones(len(start_ns), np.int64)
    else:
        geometric = np.floor(np.log1p(-draws) / math.log1p(-stop)) + 1
        num_turns = np.minimum(geometric, config.turns_max).astype(np.int64)
    session = np.repeat(np.arange(len(start_ns)), num_turns)
    if num is not None:
        session = session[:num]
        start_ns = start_ns[: int(session[-1]) + 1] if len(session) else start_ns[:0]
    return start_ns, session


def from_file(turns: Turns, config: File, seed: int, name: str, why: str) -> Workload:
    """Recorded conversations: they start as a Poisson process of `rate`, people think as configured."""
    count = int(turns.session[-1]) + 1 if len(turns.session) else 0
    start_ns = arrivals.constant(stream(seed, "workload.arrivals"), config.rate, 1.0, count, None)
    think = think_times(turns.session, config.think_mean_s, 1.0, seed)
    return compose(name, turns, start_ns, think, config, why)
