"""Configurations: every form that is read, and one clear line for each that is not."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
import yaml

from common.cost.specs import load_model
from common.engine.spec import DecoderSpec, RopeSpec, check_device, dtype_named, from_hf, from_model_spec
from common.errors import ConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONF = pathlib.Path(__file__).resolve().parents[2] / "conf" / "model"


def read(folder, **changes):
    """The spec of CONFIG with changes; a change to None removes the key."""
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return from_hf(folder)


def test_sizes_and_defaults(tmp_path):
    spec = read(tmp_path)
    assert (spec.family, spec.num_layers, spec.head_dim, spec.qkv_size) == ("llama", 2, 16, 128)
    assert (spec.dtype, spec.rms_eps, spec.tied, spec.qkv_bias, spec.qk_norm) == (
        torch.bfloat16, 1e-5, False, False, False)  # fmt: skip
    assert read(tmp_path, num_key_value_heads=None).num_kv_heads == 4
    assert read(tmp_path, architectures=["Qwen2ForCausalLM"]).qkv_bias
    qwen3 = read(tmp_path, architectures=["Qwen3ForCausalLM"])
    assert qwen3.qk_norm and qwen3.head_dim == 128  # transformers' default, not hidden / heads
    assert from_hf(tmp_path, torch.float32).dtype == torch.float32


def test_old_and_new_forms_of_rotary_options_agree(tmp_path):
    old = read(tmp_path, rope_scaling={**LLAMA3, "original_max_position_embeddings": 1024}, torch_dtype="float32")
    new = read(tmp_path, rope_theta=None, torch_dtype=None, dtype="float32", rope_parameters={
        **LLAMA3, "original_max_position_embeddings": 1024, "rope_theta": 500000.0})  # fmt: skip
    assert old == new and old.rope == RopeSpec(500000.0, "llama3", 8.0, 1.0, 4.0, 1024)
    assert read(tmp_path, rope_scaling={"type": "linear", "factor": 4}).rope == RopeSpec(500000.0, "linear", 4.0)
    assert read(tmp_path, rope_scaling={"type": "default"}).rope == RopeSpec(500000.0)
    assert read(tmp_path, rope_scaling=LLAMA3).rope.original_max_position == 4096
    assert read(tmp_path, rope_theta=None).rope == RopeSpec(10000.0)


BAD = [
    ({"architectures": ["MistralForCausalLM"]}, "architecture MistralForCausalLM is not supported; supported: Llama"),
    ({"use_sliding_window": True}, "sliding-window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act gelu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope scaling yarn is not supported; supported: none, lin"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "key 'factor' is missing"),
    ({"rope_theta": -5.0}, "theta must be positive and finite, not -5.0"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be positive"),
    ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor 4.0 must be above low_freq_factor 4.0"),
    ({"rope_parameters": "llama3"}, "rope_parameters must be a mapping"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"torch_dtype": "float64"}, "dtype float64 is not supported; supported: float32"),
    ({"hidden_size": None}, "key 'hidden_size' is missing"),
    ({"hidden_size": "wide"}, "not a number"),
    ({"num_attention_heads": 0}, "not a number"),
    ({"num_key_value_heads": 3}, "not a multiple"),
    ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ({"head_dim": 15}, "head_dim 15 is odd"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words[:24] for _, words in BAD])
def test_what_would_be_computed_wrongly_is_refused_in_one_line(tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        from_hf(tmp_path / "config.json")


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_model_of_the_suite_is_a_decoder(file):
    model = load_model(yaml.safe_load(file.read_text()))
    spec = from_model_spec(model, torch.bfloat16)
    assert (spec.q_size, spec.kv_size, spec.tied) == (model.q_size, model.kv_size, model.tied_embeddings)


def test_devices_and_dtypes():
    check_device(torch.device("cpu"), torch.bfloat16)
    assert dtype_named("float16") is torch.float16
    with pytest.raises(ConfigError, match="dtype float64 is not supported"):
        check_device(torch.device("cpu"), torch.float64)
    with pytest.raises(ConfigError, match="device meta is not supported"):
        check_device(torch.device("meta"), torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device cuda is not available here"):
            check_device(torch.device("cuda"), torch.float32)


def test_a_spec_is_frozen():
    spec = DecoderSpec("m", "llama", 1, 8, 8, 2, 1, 4, 10)
    with pytest.raises(AttributeError):
        spec.num_layers = 2
