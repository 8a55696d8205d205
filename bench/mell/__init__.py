"""Measurements of MELL: exact optima, the scheduler's cost, GPU counts against the bounds."""
