"""Micro-benchmarks of kernels, engine and simulator against the same code at a pinned commit, in turns."""
