"""Products by oneDNN: those of torch.mm within rounding, whatever the rows, gaps and biases; without it, just those."""

import pytest
import torch

from common.engine import products
from common.engine.head import Head
from common.engine.products import Products, on_grid, onednn
from common.engine.sampler import greedy
from common.engine.scratch import Scratch

CPU = torch.device("cpu")
needs_onednn = pytest.mark.skipif(onednn() is None, reason="oneDNN's products are not to be had here")


def make(dtype: torch.dtype = torch.float32) -> Products:
    return Products(Scratch(CPU, dtype), CPU, dtype)


def draw(*shape: int, gap: int = 0) -> torch.Tensor:
    """With a NaN between the rows: nobody may let it through."""
    full = torch.randn(*shape[:-1], shape[-1] + gap, generator=torch.Generator().manual_seed(3))
    full[..., shape[-1] :] = float("nan")
    return full[..., : shape[-1]]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.fixture(params=["onednn", "torch"])
def either(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(products, "onednn", lambda: None)
    elif onednn() is None:
        pytest.skip("oneDNN's products are not to be had here")


@pytest.mark.parametrize("gap", [0, 16, 48])
@pytest.mark.parametrize("rows", [1, 4, 6, 64, 131, 150, 700])
def test_products_are_exact_within_rounding(either, rows, gap):
    x, weight, bias, total = draw(rows, 512), draw(512, 1024, gap=gap), draw(1024), draw(rows, 1024)
    exact = x.double() @ weight.double()
    assert error(make().times(x, weight, "a"), exact) < 2e-6
    assert error(make().times(x, weight, "a", bias), exact + bias.double()) < 2e-6
    assert error(make().add(total.clone(), x, weight), exact + total.double()) < 2e-6


@needs_onednn
def test_a_row_has_the_same_bits_however_many_others_there_are():
    x, weight, mine = draw(256, 512), draw(512, 1024, gap=16), make()
    whole = mine.times(x, weight, "a")
    head, table = Head(weight.t()), weight.t()
    logits = head(x)
    assert error(logits, x.double() @ table.double().t()) < 2e-6
    for rows in (5, 63, 64, 100, 250):
        assert torch.equal(mine.times(x[:rows], weight, "b"), whole[:rows])
        assert torch.equal(head(x[:rows]), logits[:rows])


@needs_onednn
def test_kernels_are_compiled_for_few_numbers_of_rows(monkeypatch):
    seen, real = set(), onednn()
    monkeypatch.setattr(products, "onednn", lambda: lambda x, weight: (seen.add(len(x)), real(x, weight))[1])
    mine, weight = make(), draw(512, 512)
    for rows in range(1, 2049):
        mine.times(draw(rows, 512), weight, "a")
    assert len(seen) < 60 and min(seen) == 4
    assert all(on_grid(rows) == rows for rows in seen)


def test_small_weights_other_types_and_cut_columns_are_left_to_torch(monkeypatch):
    def refuse(x, weight):
        raise AssertionError("not to be called")

    monkeypatch.setattr(products, "onednn", lambda: refuse)
    x, wide = draw(64, 512), draw(512, 2048)
    assert torch.equal(make().times(x, draw(512, 64), "a"), x @ draw(512, 64))
    assert torch.equal(make().times(x, wide[:, :1024], "a"), x @ wide[:, :1024])
    edge = draw(512, 1040)[:, 16:]  # its last row ends with the storage
    assert torch.equal(make().times(x, edge, "a"), x @ edge)
    half = make(torch.bfloat16)
    assert half.times(x.bfloat16(), wide.bfloat16(), "a").dtype == torch.bfloat16


def test_a_large_head_takes_the_first_of_the_greatest_logits(either):
    table, x = torch.zeros(3000, 128), torch.ones(6, 128)
    table[[7, 1500, 2999]] = 1.0
    logits, tokens = Head(table).likeliest(x)
    assert tokens.tolist() == [7] * 6 == greedy(logits).tolist()
    x[2, 0] = float("nan")
    assert Head(table).likeliest(x)[0][2].isnan().any()


def test_a_torch_without_the_op_is_no_error(monkeypatch):
    onednn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", None, raising=False)
    try:
        assert onednn() is None
    finally:
        onednn.cache_clear()
