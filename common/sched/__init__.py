"""Iteration composition, block arithmetic and lane scheduling that the systems share. No torch, no I/O."""
