"""Kinds of marks that `common.predictions` reads; their texts are JSON."""

PLANNED = "planned_move"  # {plan, request, src, dst, blocks, before, after, window_ns}: tokens per second of both ends
DONE = "moved"  # {plan, request, src, dst, blocks}
