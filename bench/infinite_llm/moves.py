"""The planner: how long a plan takes, and what its moves brought against what it predicted."""

from __future__ import annotations

import json
import time

import numpy as np

from bench.harness import write_report
from bench.infinite_llm.runs import RESULTS, SEEDS, Row, draw, keep, simulate, span
from common.marks import PLANNED
from common.plots.style import PALETTE, new_figure, styled
from common.predictions import Tokens, prediction_summary
from common.predictions import predictions as predicted
from common.record import RunRecord
from systems.infinite_llm.messages import Load
from systems.infinite_llm.planner import Planner, View
from systems.infinite_llm.throughput import Throughput

SECOND = 1_000_000_000
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
NUM_PLANS = 4  # of each seed, evenly spaced
WINDOWS_S = (10, 30)


def planner() -> None:
    """CPU time of one plan: every second instance full, half of these with requests waiting."""
    rows = []
    for instances in SIZES:
        view = crowded(instances)
        times, moves = [], 0
        for _ in range(7):
            made = Planner(Throughput(((1, 1e7), (256, 1.5e7)), 50.0), 16, hysteresis=0.0)
            begin = time.process_time()
            moves = len(made.plan(view))
            times.append((time.process_time() - begin) * 1e3)
        rows.append({"instances": instances, "moves planned": moves, "plan, ms (median)": float(np.median(times)),
                     "least": min(times), "most": max(times)})  # fmt: skip
    notes = ["Measured: CPU time of one plan in one Python process, 7 times; 30 requests an instance, drawn loads in "
             "which moves pay. A plan is made once a second at most."]  # fmt: skip
    write_report("planner", "Time of the planner", notes, {"planner": rows}, RESULTS)
    with styled():
        figure, axes = new_figure(1, 1, 4.4, 3.0)
        axis = axes[0][0]
        axis.loglog(list(SIZES), [row["plan, ms (median)"] for row in rows], marker="o", color=PALETTE[0])
        axis.set_xlabel("instances (30 requests each)")
        axis.set_ylabel("one plan, ms")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "planner", "measured (CPU): bench/infinite_llm")


def crowded(instances: int) -> View:
    """Loads and requests, drawn."""
    rng = np.random.default_rng(0)
    loads, requests = {}, {}
    for index in range(instances):
        own = {index * 100 + i: int(rng.integers(10, 200)) for i in range(30)}
        used, waiting = sum(own.values()), int(rng.integers(0, 6)) * (index % 2)
        capacity = 7000 if index % 2 == 0 else used + 5
        loads[index] = Load(capacity, capacity - used, len(own), waiting, waiting * 200, used * 16)
        requests[index] = own
    return View(loads, requests)


def predictions() -> None:
    """Windows before and after every move; and single plans, each against the same run without it."""
    windows, plans = [], []
    for seed in SEEDS:
        record = simulate("predictions", f"seed={seed}")
        windows.append({"seed": seed, **_windows(record)})
        plans += _counterfactual(record, seed)
    table = [{"window after the plan, s": at, **_errors(plans, at)} for at in WINDOWS_S]
    notes = ["Llama-2-7B, 8 A100-80GB, `experiment=infinite_llm/predictions` (400 requests at 2/s), 3 seeds.",
             "Windows: decode tokens per second of both ends in the 10 s before a plan and after its move's end, of "
             "moves whose windows end before the last arrival. Requests come and go in them, so this is the error of "
             "the model's throughput, not what a move brought.",
             f"Plans: {NUM_PLANS} plans of each seed, evenly spaced, each against the same run stopped before it "
             "(`system.plan_limit`): both are equal up to the plan, and neither makes another one. Predicted: the sum "
             "of its moves' gains. Realised: the difference in output tokens per second of the whole cluster, over the "
             "window from the plan on."]  # fmt: skip
    keep("predictions", "Predicted and realised throughput of moves", notes,
         {"windows": windows, "plans, summary": table, "plans": plans})  # fmt: skip
    _plot(plans)


def _windows(record: RunRecord) -> Row:
    last = int(np.array(record.requests.arrival_ns).max())
    rows = [row for row in predicted(record) if row.done_ns < 0 or row.done_ns + 10 * SECOND <= last]
    found = prediction_summary(rows)
    return {"moves planned": found["num_planned_moves"], "made": found["num_moves_made"],
            "verified": found["num_moves_verified"],
            "error before, % (median)": _percent(found["median_tps_error_before"]),
            "error after, %": _percent(found["median_tps_error_after"]),
            "predicted change, tokens/s (mean)": _shown(found["mean_predicted_change_tps"]),
            "realised change": _shown(found["mean_realised_change_tps"]),
            "of it the move's own gain, predicted": _shown(found["mean_predicted_gain_tps"]),
            "moves with a rise, %": _percent(found["share_of_moves_with_a_rise"])}  # fmt: skip


def _percent(value: float | int | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def _shown(value: float | int | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _counterfactual(record: RunRecord, seed: int) -> list[Row]:
    marks = [(at, json.loads(text)) for at, _, kind, text in record.marks if kind == PLANNED]
    last = int(np.array(record.requests.arrival_ns).max())
    numbers = sorted({said["plan"] for at, said in marks if at + WINDOWS_S[-1] * SECOND <= last})
    picked = [numbers[int(index)] for index in np.linspace(0, len(numbers) - 1, min(NUM_PLANS, len(numbers)))]
    every, rows = tuple(range(8)), []
    for number in dict.fromkeys(picked):
        at = next(at for at, said in marks if said["plan"] == number)
        gain = sum(said["after"] - said["stay"] for _, said in marks if said["plan"] == number)
        made, without = (simulate("predictions", f"seed={seed}", f"system.plan_limit={limit}")
                         for limit in (number, number - 1))  # fmt: skip
        moves = [row for row in predicted(made) if row.plan_ns == at]
        row: Row = {"seed": seed, "plan": number, "at, s": at / 1e9, "moves": len(moves),
                    "made": sum(move.done_ns >= 0 for move in moves), "predicted gain": gain}  # fmt: skip
        for window in WINDOWS_S:
            end = at + window * SECOND
            row[f"realised in {window} s"] = (Tokens(made).per_second(every, at, end)
                                              - Tokens(without).per_second(every, at, end))  # fmt: skip
        rows.append(row)
    return rows


def _errors(plans: list[Row], window: int) -> Row:
    made = [row for row in plans if row["made"]]
    gain, real = ([row[key] for row in made] for key in ("predicted gain", f"realised in {window} s"))
    off = [abs(a - b) for a, b in zip(gain, real)]
    return {"plans": len(plans), "of which a move was made": len(made), "predicted gain, tokens/s": span(gain, "+.0f"),
            "realised": span(real, "+.0f"), "error (median)": float(np.median(off)) if off else float("nan"),
            "plans that gained, %": 100 * float(np.mean([value > 0 for value in real])) if real else float("nan"),
            "rank correlation": _ranks(gain, real)}  # fmt: skip


def _ranks(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    if len(a) < 3:
        return float("nan")
    first, second = (np.argsort(np.argsort(np.array(values))) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def _plot(plans: list[Row]) -> None:
    with styled():
        figure, axes = new_figure(1, len(WINDOWS_S), 7.4, 3.3)
        made = [row for row in plans if row["made"]]
        for axis, window in zip(axes[0], WINDOWS_S):
            x, y = ([row[key] for row in made] for key in ("predicted gain", f"realised in {window} s"))
            axis.scatter(x, y, color=PALETTE[0], s=14)
            ends = [0.0, max(x, default=1.0)]
            axis.plot(ends, ends, color="grey", lw=0.8, ls=":")
            axis.axhline(0, color="grey", lw=0.8)
            axis.set_title(f"{window} s from the plan on")
            axis.set_xlabel("predicted gain, tokens/s")
        axes[0][0].set_ylabel("realised, tokens/s of the cluster")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "predictions")
