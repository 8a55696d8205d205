"""All four systems, and baselines, on workers: they finish, with the tokens of `local` and of one undisturbed instance,
and what each is for has really happened, byte by byte as planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.build_local import decoder_spec, parameter_source
from common.comm.peers import KINDS
from common.log import LogFile, read_log
from common.types import RequestStatus
from tests.deadline import at_most
from tests.dist.pool import shared_hub
from tests.dist.stories import BASELINES, COMMON, MORE_BASELINES, STORIES, Story, play, replay
from tests.engine.worlds import check_replies
from tests.laws.strategies import NIGHTLY
from workloads.paths import SHORT_NAMES, data_root

TOLD = {**STORIES, **BASELINES, **(MORE_BASELINES if NIGHTLY else {})}
SLICES = {"azure_conv": "workload.window_s=[100,109]", "azure_code": "workload.window_s=[200,225]"}
HAVE_TRACES = all((data_root() / SHORT_NAMES[name]).is_file() for name in SLICES)


def check(story: Story, log: Path) -> None:
    """On workers and in this process: same tokens, same times, and those of a dense decoder. The log that the run
    wrote as it went replays to the same commands."""
    with at_most(240), LogFile(log, at_once=True) as file:
        real = play(story, "dist", sink=file.append)
    again = replay(story, read_log(log))
    assert (again.num_events, again.num_commands) == (real.record.num_events, real.record.num_commands)
    assert again.num_commands > len(real.record.requests.status)
    config = story.config("runtime=dist")
    real.executor.world.source = parameter_source(config, decoder_spec(config, real.executor.world.spec.dtype))
    local = play(story, "local", "runtime.clock=modelled")
    assert set(real.record.requests.status) == {RequestStatus.FINISHED}
    assert check_replies(real.executor) == sum(real.record.requests.output_tokens) > 0
    assert real.tokens == local.tokens
    assert real.record.requests == local.record.requests
    counts = real.counts()
    assert all(counts[kind] > 0 for kind in story.happened), counts
    check_bytes(real)


def check_bytes(real) -> None:
    """What policies and executor planned is what workers sent and received, kind by kind."""
    report = real.report
    for kind in KINDS:
        found = {report[f"{count}_bytes"][kind] for count in ("ordered", "acknowledged", "sent", "received")}
        assert len(found) == 1, (kind, report)
    moves = real.record.moves
    planned = sum(size for src, dst, size in zip(moves.src, moves.dst, moves.num_bytes) if src != dst)
    assert report["sent_bytes"]["copies"] == planned
    remote = report["remote_attention"]
    assert report["sent_bytes"]["attention"] == remote["out_bytes"] + remote["back_bytes"]
    assert shared_hub().unclaimed == 0, "answers that nobody will ask for"


@pytest.mark.parametrize("name", TOLD)
def test_a_system_on_workers(name: str, tmp_path: Path) -> None:
    check(TOLD[name], tmp_path / "events.jsonl")


SLICED = {  # on four workers: overrides, and what happens there
    "kunserve": ((), STORIES["kunserve"].happened),
    "infinite_llm": (("engine.kv_blocks=20",), STORIES["infinite_llm"].happened),
    "memserve": ((), ("copy",)),  # this trace says nothing of content that is shared
    "mell": ((), ("copy",)),
}


@pytest.mark.skipif(not HAVE_TRACES, reason="the traces are not in $KVPLANE_DATA (docs/workloads.md)")
@pytest.mark.parametrize("name", STORIES)
def test_a_system_on_a_slice_of_a_real_trace(name: str, tmp_path: Path) -> None:
    """Four workers. Requests, their lengths (a tenth) and their gaps (80 times as fast) are the trace's."""
    (more, happened), story = SLICED[name], STORIES[name]
    check(Story(story.system, 4, (*sliced(story, "azure_conv", 80, 40), *more), happened), tmp_path / "events.jsonl")


@pytest.mark.skipif(not (HAVE_TRACES and NIGHTLY), reason="make nightly, and the traces (docs/workloads.md)")
@pytest.mark.parametrize("trace", SLICES)
@pytest.mark.parametrize("name", TOLD)
def test_all_on_slices_of_real_traces(name: str, trace: str, tmp_path: Path) -> None:
    """As many workers as in their stories, and ten times as fast."""
    story = TOLD[name]
    fits = name == "infinite_llm" or (trace == "azure_conv" and name in STORIES)
    room = () if fits else ("engine.kv_blocks=80",)  # where a prompt must fit in one instance's KV
    overrides = (*sliced(story, trace, 10, 24), *room)
    check(Story(story.system, story.instances, overrides), tmp_path / "events.jsonl")


def sliced(story: Story, trace: str, speed: int, num_requests: int) -> tuple[str, ...]:
    """A story's overrides with a slice of a trace for its workload."""
    assert COMMON[-1].startswith("engine.max_model_len")
    kept = [one for one in story.overrides if not one.startswith("workload")]
    return ("workload=file", f"workload.path={trace}", SLICES[trace], "workload.length_scale=0.1",
            f"workload.speed={speed}", f"workload.num_requests={num_requests}", *kept)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_what_is_cut_and_put_is_what_a_copy_of_blocks_moves(data) -> None:
    """`cut_tokens` then `put_tokens` = `put_blocks`: exactly these tokens, in whatever cells."""
    import numpy as np
    import torch

    from common.engine.instance import put_blocks
    from common.engine.relayout import cut_tokens, put_tokens

    size, layers, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    first = data.draw(st.integers(0, 3))
    start = data.draw(st.integers(first * size, first * size + size - 1))
    end = data.draw(st.integers(max(start + 1, (first + blocks - 1) * size + 1), (first + blocks) * size))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    here, there = (rng.permutation(layers * blocks + 3)[: layers * blocks].reshape(layers, blocks).astype(np.int32)
                   for _ in range(2))  # fmt: skip
    source, goal = (torch.from_numpy(rng.normal(size=(layers * blocks + 3, 2, size, 2, 3))) for _ in range(2))
    want = goal.clone()
    put_blocks(source, here, want, there, (start, end), first, size)
    came = cut_tokens(source, here, (start, end), first)
    assert came.shape == (layers, 2, end - start, 2, 3)
    put_tokens(came, goal, there, (start, end), first)
    assert torch.equal(goal, want)
