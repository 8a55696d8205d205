"""What fits: parameters, activation reserve, and the blocks of KV in the rest, in bytes of one GPU.

The activation reserve is a rule, not a constant, and follows what vLLM's profiling run measures, whichever is more: the
widest temporary of one layer for a full token budget (gate+up and its product, or qkv with its output) with hidden
states and residual; or the sampler over one row of logits per sequence, beside the hidden states. On top come the
runtime's own pools (CUDA context, workspaces) and, with several GPUs, the communicator's.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.cost.engine import EngineTraits
from common.cost.specs import HardwareSpec, ModelSpec
from common.errors import CapacityError, ConfigError

RUNTIME_BYTES = 600 << 20  # CUDA context, cuBLAS workspaces, captured graphs


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How one GPU's memory is divided. `block_bytes` is one block on this GPU (its share of heads and layers)."""

    usable_bytes: int
    param_bytes: int
    reserve_bytes: int
    block_bytes: int

    @property
    def kv_bytes(self) -> int:
        """What is left for KV."""
        return self.usable_bytes - self.param_bytes - self.reserve_bytes

    @property
    def num_blocks(self) -> int:
        """Whole blocks in it."""
        return max(0, self.kv_bytes // self.block_bytes)


def shard_kv_heads(model: ModelSpec, tp: int) -> int:
    """KV heads that one rank holds; below one per rank they are replicated."""
    return max(1, model.num_kv_heads // tp)


def check_tp(model: ModelSpec, tp: int) -> None:
    """Raise unless the heads divide over `tp` ranks."""
    if tp < 1 or model.num_heads % tp or (model.num_kv_heads % tp and tp % model.num_kv_heads):
        raise ConfigError(
            f"model {model.name}: {model.num_heads} heads and {model.num_kv_heads} KV heads do not divide over tp={tp}"
        )


def stage_param_bytes(
    model: ModelSpec, tp: int, num_layers: int | None = None, first: bool = True, last: bool = True
) -> int:
    """Parameters on one GPU of a stage with `num_layers` layers (default all), with embedding and head as asked."""
    layers = model.num_layers if num_layers is None else num_layers
    total = layers * model.layer_bytes + (model.embed_bytes if first else 0)
    if last:
        shared = model.tied_embeddings and first
        total += (0 if shared else model.embed_bytes) + model.hidden_size * model.dtype_bytes
    return -(-total // tp)


def activation_reserve_bytes(
    model: ModelSpec,
    tp: int,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    traits: EngineTraits | None = None,
) -> int:
    """Bytes of one GPU that neither parameters nor KV may use (the rule in the module docstring)."""
    traits = traits or EngineTraits()
    mlp = 3 * model.intermediate_size // tp
    attention = (2 * model.q_size + 2 * model.kv_size) // tp
    width = 3 * model.hidden_size + max(mlp, attention)
    layer = max_num_batched_tokens * width * model.dtype_bytes
    hidden = max_num_batched_tokens * model.hidden_size * model.dtype_bytes
    sampler = hidden + int(traits.logit_bytes * max_num_seqs * model.vocab_size)
    return max(layer, sampler) + RUNTIME_BYTES + (traits.nccl_bytes if tp > 1 else 0)


def block_bytes(model: ModelSpec, tp: int, block_size: int, num_layers: int | None = None) -> int:
    """One block of `block_size` tokens on one GPU, over a stage's layers."""
    layers = model.num_layers if num_layers is None else num_layers
    return block_size * layers * 2 * shard_kv_heads(model, tp) * model.head_dim * model.dtype_bytes


def plan_memory(
    model: ModelSpec,
    hardware: HardwareSpec,
    tp: int = 1,
    block_size: int = 16,
    gpu_memory_utilization: float = 0.9,
    activation_reserve: int | None = None,
    num_layers: int | None = None,
    first: bool = True,
    last: bool = True,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    traits: EngineTraits | None = None,
) -> MemoryPlan:
    """Divide one GPU's memory. May leave no KV at all: `kv_capacity_blocks` is the one that raises."""
    check_tp(model, tp)
    if not 0.0 < gpu_memory_utilization <= 1.0:
        raise ConfigError(f"gpu_memory_utilization must be in (0, 1], not {gpu_memory_utilization}")
    if activation_reserve is None:
        activation_reserve = activation_reserve_bytes(model, tp, max_num_batched_tokens, max_num_seqs, traits)
    return MemoryPlan(
        int(hardware.memory_bytes * gpu_memory_utilization),
        stage_param_bytes(model, tp, num_layers, first, last),
        activation_reserve,
        block_bytes(model, tp, block_size, num_layers),
    )


def kv_capacity_blocks(
    model: ModelSpec,
    hardware: HardwareSpec,
    tp: int = 1,
    block_size: int = 16,
    gpu_memory_utilization: float = 0.9,
    activation_reserve: int | None = None,
    num_layers: int | None = None,
    first: bool = True,
    last: bool = True,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    traits: EngineTraits | None = None,
) -> int:
    """Blocks of KV that one instance (or stage) holds; CapacityError when not even one fits."""
    plan = plan_memory(
        model,
        hardware,
        tp,
        block_size,
        gpu_memory_utilization,
        activation_reserve,
        num_layers,
        first,
        last,
        max_num_batched_tokens,
        max_num_seqs,
        traits,
    )
    if plan.num_blocks < 1:
        need = plan.param_bytes + plan.reserve_bytes + plan.block_bytes
        raise CapacityError(
            f"model {model.name} does not fit {hardware.name} at tp={tp}: needs {need:,} bytes per GPU "
            f"({plan.param_bytes:,} of parameters, {plan.reserve_bytes:,} of activations, one KV block), has "
            f"{plan.usable_bytes:,} at gpu_memory_utilization={gpu_memory_utilization:g}"
        )
    return plan.num_blocks
