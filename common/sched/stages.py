"""Even shares of a model's layers for the stages of a pipeline."""

from __future__ import annotations

from itertools import pairwise


def stage_layers(num_layers: int, stages: int) -> tuple[tuple[int, int], ...]:
    """Layers in order, as evenly as they divide, the larger shares first."""
    each, more = divmod(num_layers, stages)
    return tuple(pairwise(index * each + min(index, more) for index in range(stages + 1)))
