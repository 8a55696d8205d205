"""What is run and what it runs on: `ModelSpec` (a dense decoder) and `HardwareSpec` (one card), as plain numbers.

Both are read from YAML mappings (`conf/model`, `conf/hardware`); a model also from a Hugging Face `config.json`.
All sizes are bytes of the whole model; a tensor-parallel rank holds 1/tp of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from common.errors import ConfigError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A dense decoder-only transformer with grouped-query attention and a gated MLP."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position: int = 4096  # context window in tokens
    dtype_bytes: int = 2
    family: str = "llama"

    def __post_init__(self) -> None:
        for field in (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
            "max_position",
            "dtype_bytes",
        ):
            if int(getattr(self, field)) < 1:
                raise ConfigError(f"model {self.name}: {field} must be at least 1, not {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model {self.name}: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.family not in ARCHITECTURES.values():
            raise ConfigError(
                f"model {self.name}: unknown family {self.family!r}; supported: {', '.join(ARCHITECTURES.values())}"
            )

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (the same for values)."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer: projections, gated MLP, two norms, biases and q/k norms."""
        qkv = self.q_size + 2 * self.kv_size
        weights = self.hidden_size * (qkv + self.q_size + 3 * self.intermediate_size)
        return weights + 2 * self.hidden_size + qkv * self.qkv_bias + 2 * self.head_dim * self.qk_norm

    @property
    def num_params(self) -> int:
        """All parameters; the final norm included."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * self.layer_params + tables + self.hidden_size

    @property
    def layer_bytes(self) -> int:
        """Parameters of one decoder layer."""
        return self.layer_params * self.dtype_bytes

    @property
    def embed_bytes(self) -> int:
        """The token embedding table."""
        return self.vocab_size * self.hidden_size * self.dtype_bytes

    @property
    def head_bytes(self) -> int:
        """The LM head; 0 when it shares the embedding table."""
        return 0 if self.tied_embeddings else self.embed_bytes

    @property
    def param_bytes(self) -> int:
        """The whole model."""
        return self.num_params * self.dtype_bytes

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.kv_size * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.num_layers * self.kv_bytes_per_token_layer

    def hidden_bytes(self, tokens: int) -> int:
        """Hidden states that hop between pipeline stages."""
        return tokens * self.hidden_size * self.dtype_bytes

    def query_bytes(self, tokens: int) -> int:
        """Queries of one layer that travel to remote KV."""
        return tokens * self.q_size * self.dtype_bytes

    def partial_bytes(self, tokens: int) -> int:
        """Partial attention that comes back: outputs and one fp32 log-sum-exp per head."""
        return tokens * (self.q_size * self.dtype_bytes + 4 * self.num_heads)


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """One card and the links around it. Bandwidths are bytes/s in one direction."""

    name: str
    memory_bytes: int
    peak_flops: float  # dense bf16 with fp32 accumulation, at the highest clock the card runs at
    mem_bandwidth: float
    nvlink_bandwidth: float  # between GPUs of one node; PCIe where the card has no NVLink
    nvlink_latency_ns: int
    pcie_bandwidth: float  # host <-> device
    pcie_latency_ns: int
    nic_bandwidth: float  # between nodes, per GPU
    nic_latency_ns: int
    host_memory_bytes: int  # host DRAM per GPU that KV may be swapped to
    disk_bandwidth: float
    grid: str  # the measured efficiency grid under common/cost/grids
    derived_from: str | None = None  # the sibling whose grid is scaled, when this card has no tables of its own
    provenance: str = ""
    startup_ns: int = 20_000_000_000  # process, CUDA context, graph capture; parameters are loaded on top
    dtype_bytes: int = 2  # of the elements that the grid's operators were measured with
    host_ns: int | None = None  # host time of an iteration, where an engine was measured (cost.traits=profile) ...
    host_per_seq_ns: int | None = None  # ... and of each request in it
    host_per_chunk_ns: int | None = None  # ... and of each piece of a prompt in it
    wake_share: float | None = None  # so much longer takes an iteration of an instance that has been idle ...
    wake_after_ns: int | None = None  # ... for longer than this
    description: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value <= 0 and "latency" not in field.name:
                raise ConfigError(f"hardware {self.name}: {field.name} must be positive, not {value}")


def _build(cls: type[_T], kind: str, mapping: Mapping[str, Any]) -> _T:
    """A dataclass from a mapping; unknown and missing keys are errors."""
    hints = get_type_hints(cls)
    name = mapping.get("name", "?")
    unknown = sorted(set(mapping) - set(hints))
    if unknown:
        raise ConfigError(f"{kind} {name}: unknown key {unknown[0]!r}")
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        hint = hints[key]
        if hint in (int, float) and not _is_number(value, hint):
            what = "a whole number" if hint is int else "a number"
            raise ConfigError(f"{kind}.{key}={value!r} is not {what} ({kind} {name})")
        try:
            values[key] = hint(value) if hint in (int, float, str) and value is not None else value
        except (TypeError, ValueError):
            raise ConfigError(f"{kind} {name}: {key} must be {hint.__name__}, not {value!r}") from None
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{kind} {name}: {str(error).split(') ')[-1]}") from None


def _is_number(value: object, hint: type) -> bool:
    """Numbers, and texts of them; a fraction or a truth value is not cut down to a whole number in silence."""
    if isinstance(value, bool):
        return False
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return isfinite(number) and (hint is float or number.is_integer())


def load_model(mapping: Mapping[str, Any]) -> ModelSpec:
    """A model from a `conf/model` mapping; `hf_config: PATH` overrides its numbers."""
    values = {key: value for key, value in mapping.items() if key not in ("description", "hf_config")}
    path = mapping.get("hf_config")
    if path:
        return from_hf_config(str(path))
    return _build(ModelSpec, "model", values)


def load_hardware(mapping: Mapping[str, Any]) -> HardwareSpec:
    """A card from a `conf/hardware` mapping."""
    return _build(HardwareSpec, "hardware", mapping)


def from_hf_config(path: str, any_dtype: bool = False) -> ModelSpec:
    """A model from a Hugging Face `config.json` (or the folder that holds one). `any_dtype`: the type it is stored in
    does not matter, as the engine chooses its own."""
    file = Path(path)
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
    return _spec_of(config, ARCHITECTURES[architecture], file, any_dtype)


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _refuse_other_kinds(config: Mapping[str, Any], file: Path) -> None:
    """What a dense decoder with full attention does not have, whatever architecture the file names."""
    for key in EXPERTS:
        if config.get(key) not in (None, 0, 1):
            raise ConfigError(f"{file}: {key}={config[key]!r}: only dense models are supported, no mixtures of experts")
    kinds = config.get("layer_types") or []
    other = next((kind for kind in kinds if kind != "full_attention"), None) if isinstance(kinds, list) else kinds
    if config.get("use_sliding_window") or other is not None:
        key = "use_sliding_window" if config.get("use_sliding_window") else f"layer_types has {other!r}"
        raise ConfigError(f"{file}: {key}: only full attention is supported")


def _spec_of(config: Mapping[str, Any], family: str, file: Path, any_dtype: bool) -> ModelSpec:
    if config.get("quantization_config"):
        raise ConfigError(f"{file}: quantised weights (quantization_config) have no measured operators; use bf16")
    _refuse_other_kinds(config, file)
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        name = str(config.get("_name_or_path") or file.resolve().parent.name)
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        if DTYPE_BYTES.get(dtype) != 2 and not any_dtype:
            raise ConfigError(f"{file}: dtype {dtype} has no measured operators; supported: bfloat16, float16")
        return ModelSpec(
            name=name,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
            qk_norm=family == "qwen3",
            max_position=int(config.get("max_position_embeddings") or 4096),
            dtype_bytes=2,
            family=family,
        )
    except KeyError as error:
        raise ConfigError(f"{file}: key {error.args[0]!r} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{file}: a size is not a positive whole number ({error})") from None
