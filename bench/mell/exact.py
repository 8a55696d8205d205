"""The exact fewest bins for small cases, by HiGHS through SciPy (`pip install -c constraints.txt '.[exact]'`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from systems.mell.bounds import first_fit, martello_toth


def optimum(sizes: Sequence[int], capacity: int) -> int:
    """Assignment program over as many bins as first-fit-decreasing needs; skipped where the bounds meet."""
    low, high = martello_toth(sizes, capacity), first_fit(sizes, capacity)
    if low == high:
        return low
    num, bins = len(sizes), high - 1  # is one fewer enough, and how many fewer?
    ordered = sorted(sizes, reverse=True)
    columns = num * bins + bins  # x[item, bin], then y[bin]
    rows, lower, upper = [], [], []
    for item in range(num):
        row = np.zeros(columns)
        row[item * bins : (item + 1) * bins] = 1
        rows.append(row)
        lower.append(1.0)
        upper.append(1.0)
    for place in range(bins):
        row = np.zeros(columns)
        row[place : num * bins : bins] = ordered
        row[num * bins + place] = -capacity
        rows.append(row)
        lower.append(-np.inf)
        upper.append(0.0)
    for place in range(bins - 1):  # bins in use first
        row = np.zeros(columns)
        row[num * bins + place], row[num * bins + place + 1] = 1, -1
        rows.append(row)
        lower.append(0.0)
        upper.append(np.inf)
    row = np.zeros(columns)
    row[num * bins :] = 1
    rows.append(row)
    lower.append(float(low))
    upper.append(float(bins))
    limits = np.ones(columns)
    for item in range(num):  # item k is in one of the first k + 1 bins
        limits[item * bins + item + 1 : (item + 1) * bins] = 0
    goal = np.zeros(columns)
    goal[num * bins :] = 1
    found = milp(goal, constraints=LinearConstraint(np.array(rows), lower, upper), bounds=Bounds(0, limits),
                 integrality=np.ones(columns))  # fmt: skip
    if found.status == 2:  # infeasible: first-fit-decreasing was optimal
        return high
    if found.status != 0:
        raise RuntimeError(f"HiGHS: {found.message}")
    return round(float(found.fun))
