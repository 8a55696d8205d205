"""Infinite-LLM's experiments, simulated: `python -m bench.infinite_llm NAME`."""
