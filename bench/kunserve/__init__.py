"""KunServe's experiments, simulated: `python -m bench.kunserve`."""
