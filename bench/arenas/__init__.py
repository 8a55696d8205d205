"""The common arenas: all systems on the same cluster, model, trace and targets, at their defaults and at their best."""
