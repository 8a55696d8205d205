"""Random bursts. Small ones are what real tensors can follow: a few requests that together overflow their instances."""

from __future__ import annotations

import os

from hypothesis import Phase, settings
from hypothesis import strategies as st

from systems.kunserve.state import State
from tests.kunserve.worlds import Burst

NIGHTLY = bool(os.environ.get("KVPLANE_NIGHTLY"))


def law(num: int, by_night: int) -> settings:
    """The same examples every time; more by night."""
    phases = tuple(Phase) if os.environ.get("KVPLANE_SHRINK") else (Phase.explicit, Phase.generate)
    return settings(max_examples=by_night if NIGHTLY else num, deadline=None, derandomize=True, phases=phases)


KILLS = (State.PARKING, State.DROPPING, State.EXCHANGING, State.EXCHANGING, State.PIPELINE, State.SHRINKING,
         State.LOADING, State.DRAINING)  # fmt: skip


@st.composite
def bursts(draw, small=False, crowded=False, modes=("pipeline", "pipeline", "remote_attention")):
    """Requests in a burst (`crowded`: enough of them to overflow), losses at any time, and every switch."""
    gaps = st.sampled_from((0, 0, 50, 200, 1000) if small else (0, 0, 50, 200, 1000, 4000))
    prompts = st.sampled_from((16, 33, 64, 100, 100) if small else (1, 8, 16, 33, 64, 100, 150, 200, 300))
    outputs = st.sampled_from((2, 6, 12, 24) if small else (1, 2, 10, 30, 60, 120))
    instances = draw(st.sampled_from((2, 2, 3, 4, 4) if small else (2, 2, 3, 4)))
    least, most = (4 * instances, 5 * instances) if small else (5 * instances, 24) if crowded else (2, 24)
    requests = tuple(draw(st.lists(st.tuples(gaps, prompts, outputs), min_size=least, max_size=most)))
    when = st.integers(100, 8_000 if small else 20_000)
    losses = draw(st.lists(st.tuples(when, st.integers(0, instances - 1)), max_size=2, unique_by=lambda one: one[1]))
    if draw(st.booleans()):
        losses = []
    kill = None
    if not losses and draw(st.booleans()):
        kill = (draw(st.sampled_from(KILLS)), draw(st.integers(0, 3)), draw(st.sampled_from((1, 1, 30_000, 400_000))))
    back = draw(st.booleans()) or len(losses) == instances
    mode = draw(st.sampled_from(modes))
    options = (
        ("mode", mode),
        ("exchange", draw(st.sampled_from(("coordinated", "coordinated", "uncoordinated", "recompute")))),
        ("lookahead", draw(st.sampled_from(("on", "on", "literal", "token_count")))),
        ("restore", draw(st.sampled_from(("on", "on", "off")))),
        ("exchange_batch", draw(st.sampled_from((1, 2, 8)))),
        ("min_tokens", draw(st.sampled_from((16, 64, 256)))),
    )
    blocks = draw(st.sampled_from((10, 12, 16) if small else (12, 20, 24) if crowded else (12, 20, 24, 40)))
    layers = 4 if small else draw(st.sampled_from((4, 6)))
    return Burst(requests, instances, blocks, layers, losses=tuple(losses), back=back, kill=kill, options=options)
