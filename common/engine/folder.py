"""Parameters of a Hugging Face folder: safetensors, in one file or sharded, mapped and read layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.engine.layout import LayerLayout, LayerWeights
from common.engine.spec import DecoderSpec, from_hf
from common.engine.weights import Staging
from common.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_STORED = ("F32", "BF16", "F16")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class FolderSource:
    """A folder with `config.json` and safetensors. Names, shapes and dtypes are checked at once, from the headers;
    values are read when asked for. Raises ConfigError naming the file and the tensor."""

    def __init__(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        self.folder = Path(folder)
        self.spec = from_hf(self.folder, dtype)
        self.layout = LayerLayout(self.spec)
        self._staging = Staging(self.layout)
        self._file_of = _locate(self.folder)
        self._open: dict[str, Any] = {}
        for name, shape in _expected(self.spec):
            self._check(name, shape)

    def layer_into(self, index: int, slab: torch.Tensor) -> None:
        """Fill `slab` with layer `index`, transposing to [in, out] and converting the dtype on the way."""
        assert 0 <= index < self.spec.num_layers
        self._fill(self.layout.views(self._staging.host_slab(slab)), index)
        self._staging.finish(slab)

    def embedding(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._read(EMBEDDING).to(self.layout.dtype)

    def head(self) -> torch.Tensor:
        """[vocab, hidden]."""
        return self._read(EMBEDDING if self.spec.tied else HEAD).to(self.layout.dtype)

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return self._read(NORM).to(self.layout.dtype)

    def _fill(self, weights: LayerWeights, index: int) -> None:
        spec, prefix = self.spec, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        sizes = [spec.q_size, spec.kv_size, spec.kv_size]
        for letter, part in zip("qkv", torch.split(weights.qkv, sizes, dim=1)):
            part.copy_(self._read(f"{attention}{letter}_proj.weight").t())
        if weights.qkv_bias is not None:
            for letter, part in zip("qkv", torch.split(weights.qkv_bias, sizes)):
                part.copy_(self._read(f"{attention}{letter}_proj.bias"))
        if weights.q_norm is not None and weights.k_norm is not None:
            weights.q_norm.copy_(self._read(f"{attention}q_norm.weight"))
            weights.k_norm.copy_(self._read(f"{attention}k_norm.weight"))
        weights.o.copy_(self._read(f"{attention}o_proj.weight").t())
        for word, part in zip(("gate", "up"), weights.gate_up.chunk(2, dim=1)):
            part.copy_(self._read(f"{mlp}{word}_proj.weight").t())
        weights.down.copy_(self._read(f"{mlp}down_proj.weight").t())
        weights.input_norm.copy_(self._read(f"{prefix}input_layernorm.weight"))
        weights.post_norm.copy_(self._read(f"{prefix}post_attention_layernorm.weight"))

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle(self._file_of[name]).get_tensor(name)
        return tensor

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise ConfigError(f"{path}: shard is missing, although {INDEX} names it")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path}: cannot be read as safetensors ({error})") from None
        return self._open[file]

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        file = self._file_of.get(name)
        if file is None:
            raise ConfigError(f"{self.folder}: tensor {name} is missing from the safetensors")
        try:
            header = self._handle(file).get_slice(name)
        except SafetensorError:
            raise ConfigError(f"{self.folder / file}: tensor {name} is missing, although {INDEX} names it") from None
        found = tuple(header.get_shape())
        if found != shape:
            raise ConfigError(
                f"{self.folder / file}: tensor {name} is {list(found)}, but config.json says {list(shape)}"
            )
        if header.get_dtype() not in _STORED:
            raise ConfigError(f"{self.folder / file}: tensor {name} is stored as {header.get_dtype()}; "
                              f"supported: {', '.join(_STORED)}")  # fmt: skip


def _locate(folder: Path) -> dict[str, str]:
    """File of every tensor, by the index or from the only file's header."""
    index = folder / INDEX
    if index.is_file():
        try:
            return {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index}: not a safetensors index (a weight_map is expected)") from None
    single = folder / SINGLE
    if not single.is_file():
        raise ConfigError(f"{folder}: neither {SINGLE} nor {INDEX} is there; other weight formats are not read")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{single}: cannot be read as safetensors ({error})") from None


def _expected(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that will be read, with its shape in the file ([out, in])."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    rows = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
    yield EMBEDDING, (spec.vocab_size, hidden)
    for index in range(spec.num_layers):
        prefix = f"model.layers.{index}."
        for letter, size in rows.items():
            yield f"{prefix}self_attn.{letter}_proj.weight", (size, hidden)
            if spec.qkv_bias:
                yield f"{prefix}self_attn.{letter}_proj.bias", (size,)
        if spec.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", (spec.head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (spec.head_dim,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, spec.q_size)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield NORM, (hidden,)
    if not spec.tied:
        yield HEAD, (spec.vocab_size, hidden)
