"""python -m bench.memserve_planner: fit the estimator that MemServe's scheduler plans with (Eq. 1), per model and card.

exec(x, y) = base + token * n + pair * n * (y + n / 2), n = x - y. Fitted by least squares of relative errors to the
prefill times of one instance on a training split of (x, y); its error on the held-out split is printed and committed.
"""

from __future__ import annotations

import sys

import numpy as np

from bench.harness import exit_with, write_report
from bench.memserve import RESULTS
from common.build import cluster_model
from common.config import compose

LENGTHS = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)
RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9)
DEFAULT = ("model=llama2-13b", "hardware=h800-80g", "cluster.tp=2")


def main() -> int:
    """Fit and report."""
    overrides = tuple(sys.argv[1:]) or DEFAULT
    config = compose(["system=memserve", *overrides])
    model = cluster_model(config)
    cost = model.cost(model.num_layers, True, True)
    points = [(x, int(x * ratio) // 16 * 16) for x in LENGTHS for ratio in RATIOS]
    times = np.array([cost.iteration_ns([(x - y, y)], 0, 0, 1) for x, y in points], float)
    new = np.array([x - y for x, y in points], float)
    features = np.stack([np.ones(len(points)), new, new * (np.array([y for _, y in points]) + new / 2)], 1)
    train = np.arange(len(points)) % 3 != 0
    scaled = features[train] / times[train, None]
    base, token, pair = np.linalg.lstsq(scaled, np.ones(train.sum()), rcond=None)[0]
    error = np.abs(features @ np.array([base, token, pair]) / times - 1)
    link, pcie = model.nvlink.bandwidth / 1e9, model.pcie.bandwidth / 1e9
    rows = [{"base_ms": base / 1e6, "token_us": token / 1e3, "pair_ns": pair, "link_gb_s": link, "swap_gb_s": pcie}]
    errors = [{"split": name, "points": int(mask.sum()), "median": float(np.median(error[mask])),
               "max": float(error[mask].max())}
              for name, mask in (("training", train), ("held out", ~train))]  # fmt: skip
    notes = [f"{' '.join(overrides)}. Links are the datasheet's, one direction, all GPUs of an instance."]
    write_report("planner", "The scheduler's estimator", notes, {"fit": rows, "relative error": errors}, RESULTS)
    return 0


if __name__ == "__main__":
    exit_with(main)
