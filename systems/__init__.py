"""Policies: each system is a rule for cutting KV planes and choosing where the pieces live."""
