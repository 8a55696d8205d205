"""The decoder computes what transformers computes: same logits, same greedy tokens, from the same folder."""

from __future__ import annotations

import pytest
import torch

from common.engine.folder import FolderSource
from tests.engine.dense import DenseRun

torch.set_num_threads(1)
IDS = torch.randint(0, 320, (90,), generator=torch.Generator().manual_seed(1)).tolist()
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
CASES = {
    "llama": {"family": "llama", "kv_heads": 4},
    "llama, tied, one KV head of 8": {"family": "llama", "heads": 8, "kv_heads": 1, "tied": True},
    "llama, llama3 scaling, heads of 128": {"family": "llama", "head_dim": 128, "rope": "llama3", "kv_heads": 1},
    "llama, linear scaling": {"family": "llama", "rope": LINEAR},
    "qwen2": {"family": "qwen2", "kv_heads": 1},
    "qwen2, tied, heads of 128": {"family": "qwen2", "kv_heads": 4, "tied": True, "head_dim": 128},
    "qwen3, heads of 128": {"family": "qwen3", "head_dim": 128, "heads": 8, "kv_heads": 1},
    "qwen3, tied, llama3 scaling": {"family": "qwen3", "kv_heads": 1, "tied": True, "rope": "llama3"},
}


def worst(ours, theirs):
    """Largest difference, relative to the largest logit."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name, tmp_path):
    from tests.engine import hf

    options = dict(CASES[name])
    if options.get("rope") == "llama3":
        options["rope"] = hf.LLAMA3
    model = hf.build(**options)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if options.get("tied") else "200KB")
    run = DenseRun(FolderSource(tmp_path))
    assert worst(run.extend(IDS), hf.logits(model, IDS)) <= 1e-5

    run, ours = DenseRun(FolderSource(tmp_path)), []
    row = run.extend(IDS[:20])[-1]
    for _ in range(12):
        ours.append(row.argmax().item())
        row = run.extend(ours[-1:])[-1]
    assert ours == hf.greedy(model, IDS[:20], 12)
    assert len(set(ours)) > 3  # a model that repeats itself would prove little


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_at_every_ratio_of_heads_and_head_size(family, ratio, head_dim, tmp_path):
    from tests.engine import hf

    model = hf.build(family, heads=8, kv_heads=8 // ratio, head_dim=head_dim, seed=ratio)
    model.save_pretrained(tmp_path)
    assert worst(DenseRun(FolderSource(tmp_path)).extend(IDS), hf.logits(model, IDS)) <= 1e-5


def test_a_long_prompt_in_one_piece_equals_transformers(tmp_path):
    """More rows than the MLP takes at once, weights whose rows are padded, a vocabulary of several panels."""
    from tests.engine import hf

    model = hf.build("llama", layers=1, vocab_size=1300, intermediate_size=512, max_position_embeddings=1024)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 1300, (600,), generator=torch.Generator().manual_seed(2)).tolist()
    assert worst(DenseRun(FolderSource(tmp_path)).extend(ids), hf.logits(model, ids)) <= 1e-5


def test_a_sharded_folder_has_several_files_and_both_forms_load_alike(tmp_path):
    from tests.engine import hf

    model = hf.build("qwen2")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (DenseRun(FolderSource(tmp_path / name)).extend(IDS) for name in ("one", "many"))
    assert torch.equal(one, many)


def test_bfloat16_errs_no_more_than_twice_as_much_as_transformers_does(tmp_path):
    from tests.engine import hf

    model = hf.build("llama")
    model.save_pretrained(tmp_path)
    exact = hf.logits(model, IDS)
    ours = DenseRun(FolderSource(tmp_path, torch.bfloat16)).extend(IDS).float()
    theirs = hf.logits(model.bfloat16(), IDS).float()
    assert (ours - exact).pow(2).mean() <= 4 * (theirs - exact).pow(2).mean()
