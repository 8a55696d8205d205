"""Laws of the cost model: nothing beats the speed of light, and more work never costs less than its bound says."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cost.model import InstanceCost
from common.cost.specs import load_hardware, load_model

CONF = Path(__file__).resolve().parents[2] / "conf"
CARDS = sorted(p.stem for p in (CONF / "hardware").glob("*.yaml"))
MODELS = ("llama3.1-8b", "llama2-13b", "qwen3-32b", "qwen2.5-72b", "tiny_qwen2")


@cache
def instance(model: str, card: str, tp: int) -> InstanceCost:
    spec = load_model(yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text()))
    hardware = load_hardware(yaml.safe_load((CONF / "hardware" / f"{card}.yaml").read_text()))
    return InstanceCost(spec, hardware, tp)


instances = st.builds(instance, st.sampled_from(MODELS), st.sampled_from(CARDS), st.sampled_from((1, 2)))
chunk = st.tuples(st.integers(1, 16384), st.integers(0, 300_000))


@settings(max_examples=300, deadline=None)
@given(instances, st.lists(chunk, max_size=5), st.integers(0, 1024), st.integers(1, 300_000))
def test_nothing_beats_the_speed_of_light(
    one: InstanceCost, chunks: list[tuple[int, int]], decodes: int, context: int
) -> None:
    if not chunks and not decodes:
        return
    logits = decodes + len(chunks)
    assert one.iteration_ns(chunks, decodes, context, logits) >= one.min_iteration_ns(chunks, decodes, context, logits)


@settings(max_examples=100, deadline=None)
@given(instances, st.integers(1, 1024), st.integers(0, 200_000))
def test_decode_is_a_step_of_its_prefix_sum(one: InstanceCost, batch: int, context: int) -> None:
    context %= 5000
    prefix = one.decode_prefix(batch, context + 1)
    assert prefix[context + 1] - prefix[context] == one.decode_ns(batch, context)


@settings(max_examples=100, deadline=None)
@given(instances, st.integers(1, 4000), st.integers(0, 8000), st.integers(0, 256), st.integers(1, 8000))
def test_times_are_whole_positive_and_repeatable(
    one: InstanceCost, new: int, cached: int, decodes: int, context: int
) -> None:
    first = one.iteration_ns([(new, cached)], decodes, context, decodes + 1)
    again = one.iteration_ns([(new, cached)], decodes, context, decodes + 1)
    assert isinstance(first, int) and first == again > 0
