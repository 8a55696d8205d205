"""What the engine runs: `DecoderSpec`, one dense decoder of the Llama, Qwen2 or Qwen3 family, read from a Hugging Face
`config.json` or derived from the simulator's `ModelSpec` (then with seeded random weights)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.cost.specs import ARCHITECTURES, ModelSpec
from common.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALINGS = ("none", "linear", "llama3")
_BIASES = {"attention_bias": "attention output", "mlp_bias": "MLP"}
_SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: base, and how its frequencies are stretched for a longer context."""

    theta: float = 10000.0
    scaling: str = "none"  # one of SCALINGS
    factor: float = 1.0
    low_freq_factor: float = 1.0  # the last three: llama3 only
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rotary embedding: {name} must be positive and finite, not {getattr(self, name)}")
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(f"rotary embedding: high_freq_factor {self.high_freq_factor} must be above "
                              f"low_freq_factor {self.low_freq_factor}")  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder's sizes and switches. Raises ConfigError on sizes that no decoder can have."""

    name: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False  # the LM head is the embedding table
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head, before rotation
    rms_eps: float = 1e-6
    rope: RopeSpec = RopeSpec()
    max_position: int = 4096  # context window in tokens
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for field in (*_SIZES, "max_position"):
            if getattr(self, field) < 1:
                raise ConfigError(f"model {self.name}: {field} must be at least 1, not {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model {self.name}: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model {self.name}: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (the same for values)."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the fused query, key and value projection."""
        return self.q_size + 2 * self.kv_size

    @property
    def scale(self) -> float:
        """Factor on attention scores."""
        return 1.0 / math.sqrt(self.head_dim)


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of this name. Raises ConfigError on one that the engine does not run."""
    if name not in DTYPES:
        raise ConfigError(f"dtype {name} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where this device is absent or does not compute in this dtype."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype {name} is not supported; supported: {', '.join(DTYPES)}")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device} is not supported; supported: cpu, cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device {device} is not available here; use cpu")
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
            raise ConfigError(f"dtype {name} is not available on {torch.cuda.get_device_name(device)}; use float16")


def from_model_spec(model: ModelSpec, dtype: torch.dtype = torch.float32) -> DecoderSpec:
    """The decoder that a `conf/model` entry describes, for random weights; `dtype` overrides its bytes."""
    theta = 10000.0 if model.family == "llama" else 1000000.0
    return DecoderSpec(
        name=model.name,
        family=model.family,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        tied=model.tied_embeddings,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        rope=RopeSpec(theta=theta),
        max_position=model.max_position,
        dtype=dtype,
    )


def from_hf(folder: str | Path, dtype: torch.dtype | None = None) -> DecoderSpec:
    """The decoder of a Hugging Face folder (or its `config.json`); `dtype` overrides the stored one.

    Raises ConfigError, naming the file and the key, on whatever this engine would compute wrongly."""
    file = Path(folder)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as a Hugging Face config.json ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not a Hugging Face config.json (a JSON object is expected)")
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{file}: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    _refuse(config, file)
    try:
        spec = _spec_of(config, ARCHITECTURES[architecture], file)
        return replace(spec, dtype=dtype) if dtype else spec
    except KeyError as error:
        raise ConfigError(f"{file}: key {error.args[0]!r} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{file}: a value is not a number ({error})") from None


def _refuse(config: Mapping[str, Any], file: Path) -> None:
    """Options that change the arithmetic and are not built."""
    for key, place in _BIASES.items():
        if config.get(key):
            raise ConfigError(f"{file}: {key} true (a bias on the {place} projections) is not supported")
    windows = set(config.get("layer_types") or ()) - {"full_attention"}
    if config.get("use_sliding_window") or windows:
        raise ConfigError(f"{file}: sliding-window attention (use_sliding_window, layer_types) is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{file}: hidden_act {config['hidden_act']} is not supported; supported: silu")
    if config.get("quantization_config"):
        raise ConfigError(f"{file}: quantised weights (quantization_config) are not supported")


def _spec_of(config: Mapping[str, Any], family: str, file: Path) -> DecoderSpec:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    default_head = 128 if family == "qwen3" else hidden // heads  # as transformers has it
    max_position = int(config.get("max_position_embeddings") or (2048 if family == "llama" else 32768))
    return DecoderSpec(
        name=str(config.get("_name_or_path") or file.resolve().parent.name),
        family=family,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or default_head),
        vocab_size=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope_of(config, max_position, file),
        max_position=max_position,
        dtype=dtype_named(str(config.get("dtype") or config.get("torch_dtype") or "float32")),
    )


def _rope_of(config: Mapping[str, Any], max_position: int, file: Path) -> RopeSpec:
    """Both forms: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{file}: rope_parameters must be a mapping, not {rope!r}")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    scaling = str(rope.get("rope_type") or rope.get("type") or "default")
    scaling = "none" if scaling == "default" else scaling
    if scaling not in SCALINGS:
        raise ConfigError(f"{file}: rope scaling {scaling} is not supported; supported: {', '.join(SCALINGS)}")
    if float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(f"{file}: partial_rotary_factor is not supported; every dimension of a head is rotated")
    if scaling == "none":
        return RopeSpec(theta)
    if scaling == "linear":
        return RopeSpec(theta, scaling, float(rope["factor"]))
    return RopeSpec(
        theta,
        scaling,
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope.get("original_max_position_embeddings") or max_position),
    )
