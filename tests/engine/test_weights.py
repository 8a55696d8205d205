"""Slabs and the sources that fill them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.folder import FolderSource
from common.engine.head import Head
from common.engine.layout import ALIGN, LayerLayout
from common.engine.scratch import Scratch
from common.engine.spec import DecoderSpec
from common.engine.weights import MemorySource, RandomSource
from common.errors import ConfigError
from tests.engine.dense import DenseRun

torch.set_num_threads(1)
PLAIN = DecoderSpec("plain", "llama", 3, 64, 176, 4, 2, 16, 100)
FULL = DecoderSpec("full", "qwen3", 3, 64, 100, 4, 1, 32, 100, tied=True, qkv_bias=True, qk_norm=True)


def slab_of(source, index):
    slab = torch.zeros(source.layout.num_bytes, dtype=torch.uint8)
    source.layer_into(index, slab)
    return slab


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [PLAIN, FULL], ids=lambda spec: spec.name)
def test_tensors_lie_apart_aligned_and_inside_the_slab(spec, dtype):
    layout = LayerLayout(spec, dtype)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    weights = layout.views(slab)
    for number, name in enumerate(layout.shapes, 1):
        view = getattr(weights, name)
        assert view.shape == layout.shapes[name] and view.stride(-1) == 1
        assert layout.offsets[name] % ALIGN == 0 == layout.num_bytes % ALIGN
        view.fill_(number)
    for number, name in enumerate(layout.shapes, 1):  # none has overwritten another
        assert (getattr(weights, name) == number).all()
    moved = layout.views(slab.clone())
    assert torch.equal(moved.down, weights.down)
    assert (weights.qkv_bias is None) != spec.qkv_bias and (weights.q_norm is None) != spec.qk_norm


def test_rows_that_would_alias_in_a_cpu_cache_are_a_line_apart():
    spec = DecoderSpec("aliasing", "llama", 2, 64, 1024, 4, 2, 16, 100)
    views = [LayerLayout(spec, dtype).views(torch.zeros(1 << 20, dtype=torch.uint8)) for dtype in
             (torch.float32, torch.bfloat16)]  # fmt: skip
    assert [view.gate_up.stride() for view in views] == [(2064, 1), (2048, 1)]
    assert all(view.down.is_contiguous() and view.qkv.is_contiguous() for view in views)


@pytest.mark.parametrize("vocab", [100, 640, 641, 1500])
def test_a_head_in_panels_is_the_whole_head(vocab):
    generator = torch.Generator().manual_seed(0)
    table, x = torch.randn(vocab, 48, generator=generator), torch.randn(5, 48, generator=generator)
    assert torch.allclose(Head(table)(x), x @ table.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [100, 640, 641, 1500, 1920])
def test_the_likeliest_token_is_the_first_of_the_greatest_logits(vocab):
    generator = torch.Generator().manual_seed(1)
    table, x = torch.randint(-1, 2, (vocab, 4), generator=generator).float(), torch.eye(4).repeat(9, 1)
    x[:9] = torch.randn(9, 4, generator=generator)  # ties in the other rows
    logits, tokens = Head(table)(x), torch.tensor([row.tolist().index(row.max()) for row in Head(table)(x)])
    found = Head(table).likeliest(x)
    assert torch.equal(found[0], logits) and torch.equal(found[1], tokens)
    for at in (0, vocab // 2, vocab - 1):
        table[at] = 9.0
        assert Head(table).likeliest(torch.ones(3, 4))[1].tolist() == [at] * 3
        table[at] = -9.0
    x[1, 0] = float("nan")
    assert Head(table).likeliest(x)[0][1].isnan().any()


def test_scratch_is_kept_and_grows():
    scratch = Scratch(torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        first = scratch.room("a", 3, 4)
    first.fill_(1)
    assert scratch.room("a", 2, 2).data_ptr() == first.data_ptr() != scratch.room("b", 3, 4).data_ptr()
    grown = scratch.room("a", 5, 7)
    assert grown.shape == (5, 7) and grown.is_contiguous()
    assert scratch.room("a", 3, 4).data_ptr() == grown.data_ptr()


@pytest.mark.parametrize("spec", [PLAIN, FULL], ids=lambda spec: spec.name)
def test_random_layers_depend_on_seed_and_index_only(spec):
    first, again = RandomSource(spec, seed=3), RandomSource(spec, seed=3)
    slabs = [slab_of(first, index) for index in range(3)]
    assert all(torch.equal(slab_of(again, index), slabs[index]) for index in (2, 0, 1, 0))
    assert not torch.equal(slabs[0], slabs[1])
    assert not torch.equal(slab_of(RandomSource(spec, seed=4), 0), slabs[0])
    assert torch.equal(first.embedding(), again.embedding())
    assert torch.equal(first.head(), first.embedding()) == spec.tied
    low = RandomSource(spec, seed=3, dtype=torch.bfloat16)
    narrow = low.layout.views(slab_of(low, 1)).gate_up
    assert torch.equal(narrow, first.layout.views(slabs[1]).gate_up.bfloat16())


def test_random_models_are_healthy_and_say_something():
    spec = DecoderSpec("deep", "llama", 12, 128, 352, 8, 2, 16, 500, tied=True)
    run = DenseRun(RandomSource(spec))
    ids = torch.randint(0, 500, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = run.extend(ids)
    assert 0.5 < logits.std() < 5
    first, second = logits.topk(2).values.T
    assert (first - second).median() > 0.1
    assert len(set(logits.argmax(-1).tolist())) > 32
    last = DenseRun(RandomSource(spec)).extend([*ids[:10], (ids[10] + 1) % 500, *ids[11:]])[-1]
    assert (last - logits[-1]).abs().max() > 0.05  # an early token still matters through attention


def test_host_memory_gives_back_what_it_was_given():
    source = RandomSource(FULL, seed=1)
    kept = MemorySource(source)
    for index in (1, 2, 0):
        assert torch.equal(slab_of(kept, index), slab_of(source, index))
        assert torch.equal(kept.slab(index), slab_of(source, index))
    assert torch.equal(kept.embedding(), source.embedding()) and kept.head() is kept.embedding()
    assert torch.equal(kept.final_norm(), source.final_norm())
    wide = torch.full((source.layout.num_bytes + 100,), 7, dtype=torch.uint8)
    kept.layer_into(0, wide)
    assert (wide[-100:] == 7).all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from tests.engine import hf

    folder = tmp_path_factory.mktemp("model")
    model = hf.build("qwen2")
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="200KB")
    return folder


@pytest.fixture
def one(saved, tmp_path):
    return shutil.copytree(saved / "one", tmp_path / "one")


@pytest.fixture
def many(saved, tmp_path):
    return shutil.copytree(saved / "many", tmp_path / "many")


def rewrite(folder, change):
    """Saves a folder's single file again after `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        FolderSource(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_layer_holds_the_files_tensors_transposed_and_fused(one):
    source = FolderSource(one)
    weights, file = source.layout.views(slab_of(source, 1)), load_file(one / "model.safetensors")
    parts = [file[f"model.layers.1.self_attn.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(weights.qkv, torch.cat(parts).t())
    parts = [file[f"model.layers.1.mlp.{word}_proj.weight"] for word in ("gate", "up")]
    assert torch.equal(weights.gate_up, torch.cat(parts).t())
    half = FolderSource(one, torch.float16)
    assert torch.equal(half.layout.views(slab_of(half, 1)).qkv, weights.qkv.half())
    assert half.head().dtype == torch.float16 == half.spec.dtype


def test_a_missing_shard_is_named(many):
    file = sorted(many.glob("*.safetensors"))[1]
    file.unlink()
    assert f"{file}: shard is missing" in refusal(many)


def test_a_missing_tensor_is_named(one, many):
    rewrite(one, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    assert f"{one}: tensor model.layers.1.self_attn.k_proj.bias is missing" in refusal(one)
    index = many / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    names["model.norm.weight"] = names["model.layers.0.mlp.up_proj.weight"]
    index.write_text(json.dumps({"weight_map": names}))
    assert f"{many / names['model.norm.weight']}: tensor model.norm.weight is missing" in refusal(many)


def test_a_wrong_shape_or_dtype_is_named(one):
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(one, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    assert f"{one / 'model.safetensors'}: tensor {name} is [3, 5], but config.json says [256, 128]" in refusal(one)
    rewrite(one, lambda tensors: tensors.update({name: torch.zeros(256, 128, dtype=torch.int8)}))
    assert f"tensor {name} is stored as I8; supported: F32" in refusal(one)


def test_folders_that_hold_no_weights(one, many):
    (many / "model.safetensors.index.json").write_text("{}")
    assert "not a safetensors index" in refusal(many)
    (one / "model.safetensors").write_bytes(b"no")
    assert "cannot be read as safetensors" in refusal(one)
    (one / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(one)
