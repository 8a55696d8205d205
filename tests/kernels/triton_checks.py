"""What the Triton kernels must do, on whatever device can run them.

`test_triton` runs this module in its own process with TRITON_INTERPRET=1 (which must be set before triton is
imported), and each check in-process where there is a GPU.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from common.kernels import cache, triton_cache
from common.kernels.reference import TorchBackend
from common.kernels.triton_paged import TritonBackend, choose_splits
from tests.kernels.case import make_rows, make_tensors

DECODE = [(1, 0, 0, 1), (1, 9, 0, 10), (1, 9, 0, 0), (1, 3, 8, 4), (1, 70, 8, 59), (1, 5, 0, 30)]
PREFILL = [(5, 0, 0, 5), (5, 7, 0, 12), (6, 2, 4, 9), (4, 20, 4, 6), (3, 0, 8, 3), (2, 7, 0, 0), (3, 6, 8, 4)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def compare(device, spec, block, heads, size, dtype=torch.float32, splits=None, banded=False, layer=1, seed=0):
    """Triton against the reference, on the same rows; NaN in every slot that holds no key."""
    rng = np.random.default_rng(seed)
    rows, cells = make_rows(rng, spec, block, layers=2 if banded else None, num_layers=2)
    q, kv = make_tensors(rng, rows, cells, block, *heads, size, num_layers=2, dtype=dtype)
    judge = TorchBackend(block)
    true_o, true_lse = judge.run(judge.plan(rows, "cpu"), q, kv, layer, size**-0.5)
    ours = TritonBackend(block, num_splits=splits)
    o, lse = ours.run(ours.plan(rows, device), q.to(device), kv.to(device), layer, size**-0.5)
    assert o.dtype == dtype and lse.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(o.float().cpu(), true_o.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.cpu(), true_lse, rtol=tolerance, atol=tolerance)


def check_decode(device):
    for heads, size in (((4, 2), 64), ((2, 2), 64), ((8, 1), 128)):
        compare(device, DECODE, 4, heads, size, splits=1)


def check_decode_with_splits(device):
    compare(device, [(1, 199, 0, 200), (1, 3, 0, 4), (1, 9, 0, 0)], 16, (4, 2), 64, splits=4)


def check_prefill(device):
    for heads, size in (((4, 2), 64), ((2, 2), 128)):
        compare(device, PREFILL, 4, heads, size)


def check_prefill_of_several_tiles(device):
    compare(device, [(70, 30, 0, 100), (1, 40, 0, 41), (66, 0, 0, 66)], 16, (2, 1), 64)


def check_mixed_rows_in_fp16_with_tables_of_each_layer(device):
    compare(device, DECODE[:3] + PREFILL[:4], 4, (4, 2), 64, dtype=torch.float16, banded=True)


def check_odd_head_and_block_sizes(device):
    compare(device, DECODE[:2] + PREFILL[:2], 5, (3, 1), 48)


def check_strided_queries(device):
    rng = np.random.default_rng(1)
    rows, cells = make_rows(rng, DECODE[:2] + PREFILL[:2], 4)
    q, kv = make_tensors(rng, rows, cells, 4, 4, 2, 64)
    fused = torch.cat([q, torch.full_like(q, float("nan"))], dim=1).to(device)
    ours = TritonBackend(4)
    plan = ours.plan(rows, device)
    for one, other in zip(ours.run(plan, fused[:, :4], kv.to(device), 0, 0.1),
                          ours.run(plan, q.to(device), kv.to(device), 0, 0.1)):  # fmt: skip
        assert torch.equal(one, other)


def check_half_precision_error(device):
    """At most twice the error of plain torch in the same precision, both against fp64."""
    from tests.kernels.test_reference import plain_attention

    rng = np.random.default_rng(2)
    rows, cells = make_rows(rng, [(1, 99, 0, 100), (20, 30, 0, 50)], 16)
    q, kv = make_tensors(rng, rows, cells, 16, 4, 2, 64, dtype=torch.float16)
    judge, ours = TorchBackend(16), TritonBackend(16)
    true_o, _ = judge.run(judge.plan(rows, "cpu"), q.double(), kv.double(), 0, 0.125)
    o, _ = ours.run(ours.plan(rows, device), q.to(device), kv.to(device), 0, 0.125)
    plain = torch.cat([plain_attention(rows, row, q, kv, 0.125) for row in range(2)])
    assert (o.cpu().double() - true_o).abs().max() <= 2 * (plain.double() - true_o).abs().max() + 1e-5


def check_static_plans(device):
    """Refilled in place, with one split and with several."""
    from common.kernels.static import TritonStatic
    from tests.kernels.test_static import check_static

    for splits in (1, 4):
        check_static(lambda block, rows, n=splits: TritonStatic(block, n, rows, 8, torch.device(device)),
                     TorchBackend(4), device, size=32)  # fmt: skip


def check_cache(device):
    torch.manual_seed(0)
    for heads, size, block in ((2, 64, 4), (3, 48, 5)):
        kv = torch.randn(6, 2, block, heads, size)
        fused = torch.randn(4, 3 * heads, size)
        slots = torch.tensor([block * 3 + 1, -1, 0, block * 6 - 1])
        expected = kv.clone()
        cache.write_kv(expected, fused[:, :heads], fused[:, heads : 2 * heads], slots)
        mine, fused = kv.to(device), fused.to(device)
        triton_cache.write_kv(mine, fused[:, :heads], fused[:, heads : 2 * heads], slots.to(device))
        assert torch.equal(mine.cpu(), expected)
        cells, others = torch.tensor([4, 0]).to(device), torch.tensor([2, 5]).to(device)
        buffer = torch.empty(2, *kv.shape[1:], device=device)
        triton_cache.copy_cells(mine, cells, buffer, None)
        assert torch.equal(buffer, mine[cells])
        triton_cache.copy_cells(buffer, None, mine, others)
        assert torch.equal(mine[others], buffer)
        target = torch.zeros_like(mine)
        triton_cache.copy_cells(mine, cells, target, others)
        assert torch.equal(target[others], buffer) and not target[cells].any()
        triton_cache.copy_cells(mine, cells[:0], target, others[:0])


def check_choice_of_splits(device):
    assert choose_splits(programs=1, longest=100, num_sms=108) == 1
    assert choose_splits(programs=8, longest=100_000, num_sms=108) == 16
    assert choose_splits(programs=8, longest=2_100, num_sms=108) == 8
    assert choose_splits(programs=1, longest=1 << 20, num_sms=132) == 32
    assert choose_splits(programs=4096, longest=1 << 20, num_sms=132) == 1


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CHECKS:
        started = time.perf_counter()
        CHECKS[name]("cpu")
        print(f"{name} {time.perf_counter() - started:.1f} s", flush=True)
