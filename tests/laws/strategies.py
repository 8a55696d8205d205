"""Hypothesis strategies over `lawlib.Scenario`."""

from __future__ import annotations

import os

from hypothesis import Phase, settings
from hypothesis import strategies as st

from common.types import Rule
from tests.laws.lawlib import Request, Scenario

NIGHTLY = bool(os.environ.get("KVPLANE_NIGHTLY"))

# `sampled_from` draws evenly: long replies that start together are what makes memory run out.
PROMPTS = st.sampled_from((1, 2, 3, 4, 7, 8, 16, 17, 33))
OUTPUTS = st.sampled_from((1, 2, 3, 6, 12, 20, 40))
GAPS = st.sampled_from((0, 0, 0, 1, 2, 5, 12))


def law(num: int) -> settings:
    """The same `num` examples every time; ten times as many by night. A failure is shrunk only by hand
    (KVPLANE_SHRINK=1): these examples are small enough to read."""
    phases = tuple(Phase) if os.environ.get("KVPLANE_SHRINK") else (Phase.explicit, Phase.generate)
    return settings(max_examples=num * 10 if NIGHTLY else num, deadline=None, derandomize=True, phases=phases)


@st.composite
def request_lists(draw, max_size=14, sessions=True):
    """Requests that arrive together, close together, or after a reply."""
    requests = []
    for index in range(draw(st.sampled_from(range(1, max_size + 1)))):
        parent = -1
        if sessions and index and draw(st.integers(0, 3)) == 0:
            parent = draw(st.integers(0, index - 1))
        prompt, document = draw(PROMPTS), draw(st.sampled_from((0, 0, 1, -1)))
        own = draw(st.sampled_from((0, 1, 5)))
        requests.append(Request(draw(GAPS), prompt, draw(OUTPUTS), document, min(own, prompt), parent))
    return tuple(requests)


def _longest(requests, size):
    """Blocks of the longest request at its end, counting its parents' turns."""
    ends = []
    for request in requests:
        before = ends[request.parent] if request.parent >= 0 else 0
        ends.append(before + request.prompt + request.output)
    return -(-max(ends) // size)


@st.composite
def scenarios(draw, losses=True, caching=None, max_size=14):
    """Runs of the vllm policy: usually every request fits, sometimes barely, at times one does not."""
    requests = draw(request_lists(max_size))
    size = draw(st.sampled_from((1, 4, 16)))
    instances = draw(st.sampled_from((1, 1, 2, 3, 4)))
    room = draw(st.sampled_from((-1, 0, 1, 2, 4, 100)))
    lost = ()
    if losses and instances > 1:
        pairs = st.tuples(st.integers(0, 150), st.integers(1, instances - 1))  # instance 0 stays
        lost = tuple(draw(st.lists(pairs, max_size=3, unique_by=lambda pair: pair[1])))
    return Scenario(
        requests,
        instances,
        max(1, _longest(requests, size) + room),
        size,
        draw(st.sampled_from(tuple(Rule))),
        draw(st.sampled_from((3, 16, 48, 512))),
        draw(st.sampled_from((1, 3, 5, 64))),
        draw(st.booleans()) if caching is None else caching,
        draw(st.sampled_from((0.0, 0.0, 0.1))),
        draw(st.sampled_from(("round_robin", "least_outstanding"))),
        draw(st.sampled_from((0.0, 0.0, 0.3, 1.0))),
        draw(st.booleans()),
        draw(st.sampled_from((None, None, None, 1, 3))),
        lost,
        draw(st.sampled_from((0, 0, 3))),
    )


@st.composite
def shared_scenarios(draw):
    """Two or three lanes over two instances: alone on one, side by side, or in a pipeline."""
    requests = draw(request_lists(sessions=False))
    size = draw(st.sampled_from((1, 4, 16)))
    routes = tuple(draw(st.lists(st.sampled_from((0, 0, 1, 10, 1)), min_size=2, max_size=3)))
    blocks = (_longest(requests, size) + draw(st.sampled_from((0, 1, 3, 50)))) * len(routes)
    return Scenario(
        requests,
        2,
        blocks,
        size,
        draw(st.sampled_from(tuple(Rule))),
        draw(st.sampled_from((8, 48, 512))),
        draw(st.sampled_from((1, 3, 64))),
        alpha=draw(st.sampled_from((0.0, 0.5))),
        grid=draw(st.booleans()),
        watch=draw(st.sampled_from((0, 0, 3))),
        routes=routes,
    )
