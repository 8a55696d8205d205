"""What MELL's paper shows: bars and curves of its vector figures, digitised (GPUs +-0.3). Loads: infrequent, middle,
frequent, then the Azure conversations."""

from __future__ import annotations

from collections.abc import Mapping

LOADS = ("infrequent", "middle", "frequent")
GPUS = {  # Figure 11
    "13b": {"mell": (29.4, 43.0, 56.8, 44.5), "load_balance": (32.5, 48.7, 66.8, 50.0),
            "worst_fit": (34.1, 53.0, 73.2, 53.8), "best_fit": (33.6, 53.2, 74.9, 54.4)},
    "7b": {"mell": (24.6, 29.8, 35.3, 28.8), "load_balance": (27.7, 34.1, 41.2, 32.9),
           "worst_fit": (29.6, 36.9, 45.5, 36.0), "best_fit": (32.4, 41.1, 51.4, 39.8)},
}  # fmt: skip
MOVES = {  # Figure 12, migrations per second
    "13b": {"load_balance": (5.9, 12.2, 18.7, 12.8), "mell": (4.4, 9.0, 15.4, 9.1)},
    "7b": {"load_balance": (9.2, 13.0, 19.0, 12.7), "mell": (6.2, 8.7, 11.8, 8.1)},
}
UNBATCHED = {"13b": (5.3, 12.0, 22.0, 12.2), "7b": (7.0, 10.3, 14.5, 9.3)}  # Figure 13; batched: as MELL in Figure 12
USED = {  # Figure 14, % of GPU memory
    "13b": {"mell": (87, 91, 95, 90), "load_balance": (79, 81, 82, 81), "worst_fit": (76, 76, 76, 77),
            "best_fit": (78, 76, 75, 77)},
    "7b": {"mell": (88, 91, 93, 89), "load_balance": (79, 79, 80, 80), "worst_fit": (74, 74, 73, 74),
           "best_fit": (68, 67, 65, 67)},
}  # fmt: skip
TIMELINE = {  # Figure 15: mean and maximum after 500 s, frequent
    "13b": {"best_fit": (75.6, 85.7), "worst_fit": (73.8, 83.7), "load_balance": (67.3, 82.7), "mell": (57.4, 68.4)},
    "7b": {"best_fit": (51.3, 62.2), "worst_fit": (45.2, 58.2), "load_balance": (40.7, 53.1), "mell": (34.8, 49.0)},
}  # fmt: skip


def at(figure: Mapping[str, Mapping[str, tuple[float, ...]]], experiment: str, load: str, system: str) -> float | None:
    """The paper's value for an experiment of ours (lengths x10, or Azure's), or None where it shows none."""
    model, _, kind = experiment.partition("_")
    if experiment == "scale":
        model, kind = "13b", "x10"
    values = figure.get(model, {}).get(system)
    if values is None or not (kind == "x10" or kind.startswith("azure")):
        return None
    return values[LOADS.index(load) if load in LOADS else 3]


def peak(experiment: str, load: str, system: str) -> float | None:
    """The paper's maximum over 5,000 s, which it shows for the frequent rate only."""
    model, _, kind = experiment.partition("_")
    if kind != "x10" or load != "frequent" or system not in TIMELINE.get(model, {}):
        return None
    return TIMELINE[model][system][1]
