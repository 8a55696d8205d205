"""Plans with fixed buffers: refilled in place, they say what a fresh plan says, and padding says nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import ContractError
from common.kernels.reference import TorchBackend
from common.kernels.static import TorchStatic, can_be_static, static_key, static_plan
from tests.kernels.case import make_rows, make_tensors

BATCHES = (
    [(1, 9, 0, 10), (1, 0, 0, 1), (1, 29, 0, 30)],
    [(1, 31, 0, 32), (1, 4, 0, 5), (1, 16, 0, 17), (1, 3, 0, 4), (1, 15, 0, 16)],
    [],
    [(1, 30, 0, 31)],
)


def check_static(make_plan, backend, device="cpu", tolerance=1e-5, size=16):
    """One plan, refilled for every batch: longer and shorter rows, more and fewer of them, none."""
    block, max_rows = 4, 6
    plan = make_plan(block, max_rows)
    for seed, spec in enumerate(BATCHES):
        rng = np.random.default_rng(seed)
        rows, cells = make_rows(rng, spec, block, num_layers=2)
        q, kv = make_tensors(rng, rows, cells, block, 4, 2, size, num_layers=2)
        q = torch.cat([q, torch.randn(max_rows - len(spec), 4, size)])
        plan.fill(rows)
        for layer in range(2):
            want, _ = backend.run(backend.plan(rows, "cpu"), q, kv, layer, 0.25)
            o = plan.run(q.to(device), kv.to(device), layer, 0.25).cpu()
            torch.testing.assert_close(o[: len(spec)], want, rtol=tolerance, atol=tolerance)
            assert (o[len(spec) :] == 0).all()


def test_a_refilled_torch_plan_is_a_fresh_plan():
    check_static(lambda block, rows: TorchStatic(block, 8, rows, torch.device("cpu")), TorchBackend(4))


@pytest.mark.parametrize(
    "spec", [[(2, 3, 0, 5)], [(1, 40, 0, 41)], [(1, 3, 0, 4)] * 7], ids=["a prompt", "too long", "too many"]
)
def test_rows_that_do_not_fit_are_refused(spec):
    rows, _ = make_rows(np.random.default_rng(0), spec, 4)
    with pytest.raises(ContractError, match="static plan"):
        TorchStatic(4, 8, 6, torch.device("cpu")).fill(rows)


def test_tables_of_each_layer_are_refused():
    rows, _ = make_rows(np.random.default_rng(0), [(1, 3, 0, 4)], 4, layers=2)
    with pytest.raises(ContractError, match="uniform"):
        TorchStatic(4, 8, 6, torch.device("cpu")).fill(rows)


def test_the_key_grows_by_doublings():
    backend, device = TorchBackend(4), torch.device("cpu")
    assert can_be_static(backend)
    keys = []
    for length in (1, 4, 5, 8, 9, 33):
        rows, _ = make_rows(np.random.default_rng(0), [(1, length - 1, 0, length)], 4)
        keys.append(static_key(backend, rows, 8, 2, device))
        static_plan(backend, keys[-1], 8, 64, device).fill(rows)
    assert keys == [1, 1, 2, 2, 4, 16]
