"""Attention over cells with log-sum-exp, merging of partial results, KV writes and copies (docs/engine.md)."""
