"""The GPU core: real tensors under the same policies. Shapes and ownership: docs/engine.md."""
