"""Infinite-LLM: one KV pool over many instances (README.md: paper section -> function)."""
