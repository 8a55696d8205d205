"""MELL: fewer GPUs through bounded migration (see README.md)."""
