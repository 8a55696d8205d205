"""Models, cards, memory and links: against published numbers, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from common.cost import transfer
from common.cost.engine import engine_traits
from common.cost.memory import kv_capacity_blocks, plan_memory, stage_param_bytes
from common.cost.specs import HardwareSpec, ModelSpec, from_hf_config, load_hardware, load_model
from common.errors import CapacityError, ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
HARDWARE = [
    "a100-40g",
    "a100-80g",
    "a100-80g-2024",
    "a800-80g",
    "h100-80g",
    "h800-80g",
    "h200-141g",
    "l40s",
    "rtx4090",
    "rtxpro6000",
    "cpu",
]


def model(name: str) -> ModelSpec:
    return load_model(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()))


def card(name: str) -> HardwareSpec:
    return load_hardware(yaml.safe_load((CONF / "hardware" / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-7b", 6.738),
        ("llama2-13b", 13.016),
        ("llama2-70b", 68.977),
        ("llama3-8b", 8.030),
        ("llama3.1-8b", 8.030),
        ("llama3.1-70b", 70.554),
        ("llama3.1-405b", 405.853),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-14b", 14.770),
        ("qwen2.5-72b", 72.706),
        ("qwen3-8b", 8.191),
        ("qwen3-14b", 14.768),
        ("qwen3-32b", 32.762),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, billions: float) -> None:
    assert model(name).num_params / 1e9 == pytest.approx(billions, abs=5e-4)


def test_kv_bytes_per_token() -> None:
    assert model("llama2-13b").kv_bytes_per_token == 819_200
    assert model("llama3.1-8b").kv_bytes_per_token == 131_072
    assert model("qwen2.5-14b").kv_bytes_per_token == 192 << 10


def test_tied_embeddings_are_counted_once() -> None:
    tiny = model("tiny_qwen3")
    assert tiny.head_bytes == 0
    layers = tiny.num_layers * tiny.layer_bytes
    assert tiny.param_bytes == layers + tiny.embed_bytes + tiny.hidden_size * tiny.dtype_bytes


def test_every_config_loads_and_says_what_it_is() -> None:
    for path in sorted((CONF / "model").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        assert values["description"] and values["hf_config"] is None
        load_model(values)
    assert sorted(HARDWARE) == sorted(p.stem for p in (CONF / "hardware").glob("*.yaml"))
    for name in HARDWARE:
        assert card(name).description and card(name).provenance
    assert card("h200-141g").derived_from == "h100-80g" and card("h100-80g").derived_from is None


def test_hf_config(tmp_path: Path) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    loaded = from_hf_config(str(tmp_path))
    assert loaded.num_params == model("qwen3-32b").num_params and loaded.qk_norm
    assert load_model({"hf_config": str(path)}) == loaded
    path.write_text(json.dumps({**config, "architectures": ["MixtralForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"MixtralForCausalLM.*LlamaForCausalLM"):
        from_hf_config(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        from_hf_config(str(path))


def test_bad_mappings_are_named() -> None:
    values = yaml.safe_load((CONF / "model" / "llama2-7b.yaml").read_text())
    with pytest.raises(ConfigError, match="unknown key 'num_experts'"):
        load_model({**values, "num_experts": 8})
    with pytest.raises(ConfigError, match="num_layers"):
        load_model({**values, "num_layers": 0})
    hardware = yaml.safe_load((CONF / "hardware" / "l40s.yaml").read_text())
    with pytest.raises(ConfigError, match="mem_bandwidth"):
        load_hardware({**hardware, "mem_bandwidth": -1})
    del hardware["peak_flops"]
    with pytest.raises(ConfigError, match="peak_flops"):
        load_hardware(hardware)


def test_memory_is_counted_in_bytes() -> None:
    llama, a100 = model("llama2-13b"), card("a100-80g")
    plan = plan_memory(llama, a100, tp=2)
    assert plan.block_bytes == 16 * 819_200 // 2
    assert plan.num_blocks * plan.block_bytes <= plan.kv_bytes < (plan.num_blocks + 1) * plan.block_bytes
    halves = stage_param_bytes(llama, 1, 20, last=False) + stage_param_bytes(llama, 1, 20, first=False)
    assert halves == llama.param_bytes


def test_kv_blocks_are_near_what_vllm_found() -> None:
    blocks = kv_capacity_blocks(model("llama3.1-8b"), card("rtx4090"))
    assert blocks == pytest.approx(2588, rel=0.03)  # vLLM 0.19's own count on this card


# What vLLM's start-up logs say on H100 (79.18 GiB) at 8,192 tokens and 1,024 sequences, its defaults there: model, tp,
# traits, share of memory, GiB of KV. llm-d/llm-d-benchmark, Apache-2.0: 0.11 to 0.16 sort all logits, 0.19 does not.
LOGS = [
    ("llama3.1-8b", 1, "vllm-sync", 0.9, 51.38), ("qwen3-14b", 1, "vllm-sync", 0.95, 41.94),
    ("llama3.1-8b", 1, "vllm-async", 0.95, 58.11), ("qwen2.5-7b", 1, "vllm-async", 0.95, 58.53),
    ("llama3.1-8b", 2, "vllm-async", 0.95, 75.22 - 7.51 - 1.89 - 2.07),
    ("llama3.1-8b", 4, "vllm-async", 0.95, 75.22 - 3.77 - 1.89 - 2.13),
    ("qwen2.5-7b", 2, "vllm-async", 0.95, 75.22 - 7.12 - 2.21 - 2.06),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tp", "traits", "share", "kv_gib"), LOGS)
def test_kv_memory_is_near_what_start_up_logs_say(name, tp, traits, share, kv_gib) -> None:
    plan = plan_memory(
        model(name), card("h100-80g"), tp, gpu_memory_utilization=share, max_num_batched_tokens=8192,
        max_num_seqs=1024, traits=engine_traits(traits),
    )  # fmt: skip
    assert plan.kv_bytes / 2**30 == pytest.approx(kv_gib, rel=0.012)


def test_a_model_that_does_not_fit_says_so() -> None:
    with pytest.raises(CapacityError, match=r"Llama-2-70B does not fit a100-80g at tp=1: needs 1[34]\d,"):
        kv_capacity_blocks(model("llama2-70b"), card("a100-80g"))
    assert kv_capacity_blocks(model("llama2-70b"), card("a100-80g"), tp=2) > 1500
    with pytest.raises(ConfigError, match="tp=3"):
        kv_capacity_blocks(model("llama2-70b"), card("a100-80g"), tp=3)
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        kv_capacity_blocks(model("llama2-7b"), card("a100-80g"), gpu_memory_utilization=1.5)


def test_links_have_latency_and_bandwidth() -> None:
    link = transfer.Link(1e9, 500)
    assert link.transfer_ns(0) == 0 and link.transfer_ns(1) == 501 and link.transfer_ns(1000) == 1500
    llama, a100 = model("llama2-13b"), card("a100-80g")
    assert transfer.hop_ns(llama, link, 1) == 500 + 10240
    assert transfer.swap_ns(llama, a100, 100, tp=2) < transfer.swap_ns(llama, a100, 100)
    cold, warm = (transfer.load_ns(a100, llama.param_bytes, source) for source in ("disk", "peer"))
    assert cold > warm
    assert transfer.startup_ns(a100, llama.param_bytes) == a100.startup_ns + cold
