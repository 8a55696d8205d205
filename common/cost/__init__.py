"""The cost model: how long an iteration, a copy or a start takes, and what fits in memory. See docs/cost-model.md."""
