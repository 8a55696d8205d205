"""What MELL's tables are made of: the paper's bars, pairs of seeds, equal service, rules for who outgrows a GPU."""

from __future__ import annotations

import pytest

from bench.mell import paper
from bench.mell.best_fit import RULES, Filled, Opens, Stays
from bench.mell.figure import against
from bench.mell.studies import equal_service
from systems.baselines.consolidate import FitPlanner

PRINTED = {  # savings in percent that the paper prints in its Figure 11: infrequent, middle, frequent, Azure
    ("13b", "best_fit"): (12, 19, 24, 18), ("13b", "worst_fit"): (14, 19, 22, 17),
    ("13b", "load_balance"): (9, 12, 15, 11), ("7b", "best_fit"): (24, 27, 31, 28),
    ("7b", "worst_fit"): (17, 19, 22, 20), ("7b", "load_balance"): (11, 13, 14, 12),
}  # fmt: skip


@pytest.mark.parametrize(("model", "system"), PRINTED)
def test_the_digitised_bars_give_the_printed_savings(model, system):
    for at, printed in enumerate(PRINTED[model, system]):
        saving = 100 * (1 - paper.GPUS[model]["mell"][at] / paper.GPUS[model][system][at])
        assert abs(saving - printed) < 1


def test_the_paper_has_bars_for_long_requests_only():
    assert paper.at(paper.GPUS, "7b_x10", "frequent", "mell") == 35.3
    assert paper.at(paper.GPUS, "13b_azure_x10", "azure_x10", "best_fit") == 54.4
    assert paper.at(paper.GPUS, "scale", "middle", "worst_fit") == 53.0
    assert paper.at(paper.GPUS, "13b_native", "frequent", "mell") is None
    assert paper.at(paper.GPUS, "13b_x10", "frequent", "oracle_best_fit") is None
    assert paper.peak("7b_x10", "frequent", "mell") == 49.0 and paper.peak("7b_x10", "middle", "mell") is None


def row(seed, **values):
    return {"case": {"seed": seed}, **values}


def test_systems_are_compared_over_the_seeds_that_both_ran():
    ours = [row(0, plan_mean=9.0), row(1, plan_mean=11.0), row(2, plan_mean=50.0)]
    theirs = [row(1, plan_mean=10.0), row(0, plan_mean=10.0), row(3, plan_mean=1.0)]
    assert against(ours, theirs, "plan_mean") == (0.0, 1)


def test_equal_service_takes_the_cheapest_watermark_that_serves_enough():
    def runs(paid, good):
        return [row(0, paid_mean=paid, good_5000_100=good)]

    rows = {("watermark", "0", "mell", ""): runs(20.0, 0.94), ("watermark", "0.2", "mell", ""): runs(24.0, 0.985),
            ("watermark", "0.1", "mell", ""): runs(25.0, 0.96), ("watermark", "0", "best_fit", ""): runs(19.0, 0.8),
            ("watermark", "0", "mell", "batching=false"): runs(1.0, 1.0)}
    lines = {line.split("|")[1].strip(): line for line in equal_service(rows)[2:]}
    assert "20.0 (watermark 0: 94.0%)" in lines["90%"] and lines["90%"].count("none") == 4
    assert "24.0 (watermark 0.2: 98.5%)" in lines["95%"] and lines["99%"].count("none") == 5


@pytest.mark.parametrize(("planner", "homes", "bins"), [
    (FitPlanner, (1, 2), 2), (Opens, (1, 3), 3), (Stays, (1, 1), 2),
])  # fmt: skip
def test_who_outgrows_a_gpu_goes_where_the_rule_says(planner, homes, bins):
    one = planner(100, 16, "best", "preempt")
    one.epoch([], {}, {0: 60, 1: 40, 2: 50})
    assert list(one.epoch([], {0: 80}, {})) == ([] if planner is Stays else [1])
    assert (one.bin_of(0), one.bin_of(1)) == homes and len(one.bins()) == bins
    assert sum(one.loads.values()) == 170
    assert planner in {way for _, way in RULES.values()}


def test_room_is_counted_by_the_largest_request():
    filled = Filled()
    filled.note([[60, 30], [20, 20, 20, 20], [1]], 100)
    filled.note([[60, 20]], 100)
    rows = filled.rows()
    assert rows["L"] == {"gpus": 1.0, "fill": pytest.approx(0.85), "left": pytest.approx(0.15)}
    assert rows["T"]["left"] == pytest.approx(0.1) and rows["small"]["gpus"] == 0.5 and rows["M"]["gpus"] == 0
