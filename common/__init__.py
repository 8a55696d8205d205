"""The shared core: vocabulary, event loop, KV planes, scheduling, executors, costs and results."""
