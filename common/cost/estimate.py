"""What policies may plan with: the paper's cost form, fitted on a training split of priced batches.

`python -m common.cost.estimate model=… hardware=…` prints the held-out error with and without the attention terms.

    cost(b) = sum over chunks of [alpha (p c + (c^2 + c) / 2) + beta c + gamma] - (|b| - 1) lambda

A decode is a chunk of one token behind its context. Least squares on relative errors, so that short batches count.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from common.executors.cluster import StageCost


LENGTHS = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
PREFIXES = (0, 512, 1024, 2048, 4096, 8192)
COUNTS = (1, 2, 3, 4, 6, 8)
HELD_OUT = 5  # every fifth batch is never fitted

Sample = tuple[tuple[int, int], ...]  # (chunk, prefix), as `StageCost.iteration_ns` takes them


class Fit(NamedTuple):
    """Coefficients in ns, and relative errors (mean, largest) on the batches held out."""

    alpha: float
    beta: float
    gamma: float
    lam: float
    mean_error: float
    max_error: float


def batches(max_tokens: int = 4096) -> list[Sample]:
    """A lattice of homogeneous batches, and mixed ones of different lengths."""
    found: list[Sample] = []
    for count in COUNTS:
        for chunk in LENGTHS:
            if count * chunk <= max_tokens:
                found += [((chunk, prefix),) * count for prefix in PREFIXES]
    for index, chunk in enumerate(LENGTHS):
        other = LENGTHS[(index * 5 + 3) % len(LENGTHS)]
        if chunk + other <= max_tokens:
            found += [((chunk, prefix), (other, 0)) for prefix in PREFIXES]
    return found


def features(batch: Sample, attention: bool, prefix: bool) -> list[float]:
    """Sums over chunks of what the coefficients multiply: a batch costs gamma + (gamma - lambda)(n - 1)."""
    pairs = sum((p * c if prefix else 0) + (c * c + c) / 2 for c, p in batch)
    row = [float(sum(c for c, _ in batch)), 1.0, float(len(batch) - 1)]
    return [float(pairs), *row] if attention else row


def fit(cost: StageCost, attention: bool = True, prefix: bool = True, max_tokens: int = 4096) -> Fit:
    """Least squares on the training split; `attention=False` or `prefix=False` leave those terms out."""
    samples = batches(max_tokens)
    times = np.array([cost.iteration_ns(batch, 0, 0, 1) for batch in samples], float)
    rows = np.array([features(batch, attention, prefix) for batch in samples])
    held = np.arange(len(samples)) % HELD_OUT == HELD_OUT - 1
    weights = 1 / times[~held]
    found = np.linalg.lstsq(rows[~held] * weights[:, None], np.ones(len(weights)), rcond=None)[0]
    errors = np.abs(rows[held] @ found - times[held]) / times[held]
    alpha, (beta, gamma, each) = (found[0], found[1:]) if attention else (0.0, found)
    return Fit(float(alpha), float(beta), float(gamma), float(gamma - each), float(errors.mean()), float(errors.max()))


def extra(cost: StageCost, max_tokens: int) -> dict[str, float]:
    """For `ClusterInfo.extra`."""
    found = fit(cost, max_tokens=max(max_tokens, 512))
    return {"cost_alpha": found.alpha, "cost_beta": found.beta, "cost_gamma": found.gamma, "cost_lambda": found.lam}


def main(arguments: Sequence[str]) -> int:
    """Print the fit and its held-out error, with and without attention terms."""
    from common.build import cluster_model
    from common.config import compose

    config = compose(list(arguments))
    cost = cluster_model(config).cost(config.model.num_layers, True, True)
    print(f"{config.model.name} on {config.hardware.name}, tp {config.cluster.tp}: held-out batches")
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("full", {}), ("no prefix term", {"prefix": False}), ("no attention", {"attention": False}),
    )  # fmt: skip
    for name, options in variants:
        found = fit(cost, **options)
        print(f"  {name:<15} error mean {found.mean_error:6.1%}  max {found.max_error:6.1%}   alpha {found.alpha:.4g} "
              f"beta {found.beta:.4g} gamma {found.gamma:.4g} lambda {found.lam:.4g} ns")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
