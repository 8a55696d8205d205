"""MemServe (arXiv 2406.17565): context caching in a cluster that splits prefill from decode."""
