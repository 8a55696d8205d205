"""KV bookkeeping without tensors: names of content, prefix indexes, block pools, spans over the KV plane."""
