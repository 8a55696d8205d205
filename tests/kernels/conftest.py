"""One thread: the machine is shared, and small tensors gain nothing from more. Without torch, no tests."""

from importlib.util import find_spec

if find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    torch.set_num_threads(1)
