"""The engine and transformers on the same folder of weights, prompts and lengths: what `bench.cpu_engine` compares."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import compose
from common.driver import drive
from common.engine.layout import LayerLayout
from common.engine.spec import DecoderSpec
from common.engine.weights import ParameterSource, RandomSource
from common.record import RequestColumns, RunRecord

PAGE = 32
Replies = list[list[int]]


@dataclass(frozen=True)
class Load:
    """Equal requests, all there at time 0."""

    num: int = 64
    prompt: int = 64
    output: int = 32

    @property
    def new_tokens(self) -> int:
        """Tokens generated, all told."""
        return self.num * self.output


@dataclass(frozen=True)
class Timing:
    """One round of one engine: wall and CPU seconds, and what it said."""

    wall_s: float
    cpu_s: float
    replies: Replies


def timed(serve: Callable[[], Replies]) -> Timing:
    """Run once. CPU seconds near the wall's say that one thread was at work, and nobody in its way."""
    wall, cpu = time.perf_counter(), time.process_time()
    replies = serve()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu, replies)


# ------------------------------------------------------------ ours


class Ours:
    """`run.py runtime=local system=vllm` in fp32 on the CPU; a new executor for each run."""

    def __init__(self, load: Load, *model: str) -> None:
        """`model`: overrides that say which (`runtime.weights=FOLDER`, or sizes)."""
        from workloads.types import plain

        blocks = load.num * (-(-(load.prompt + load.output) // 16))
        self.load = load
        self.config = compose([
            "runtime=local", "runtime.device=cpu", "runtime.dtype=float32", *model, "system=vllm",
            "hardware=cpu", "cluster.num_instances=1", f"engine.kv_blocks={blocks}",
            "engine.max_num_seqs=256",
        ])  # fmt: skip
        zeros, ones = np.zeros(load.num, np.int64), np.ones(load.num, np.int64)
        self.workload = plain("equal", zeros, load.prompt * ones, load.output * ones, load.output, "bench")

    def executor(self) -> Any:
        """An engine with its weights loaded, and nothing served yet."""
        from run import make_executor

        return make_executor(self.config, self.workload, RunRecord(RequestColumns.empty(self.load.num)))

    def serve(self, executor: Any) -> Replies:
        """The whole loop, to the last request."""
        from systems.registry import make_policy

        config = self.config
        policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
        drive(policy, executor, executor.record)
        return [executor.reply(index) for index in range(self.load.num)]

    def prompts(self) -> list[list[int]]:
        """Ids of the prompts, for the others."""
        executor = self.executor()
        found = [list(executor.known(index)) for index in range(self.load.num)]
        executor.close()
        return found

    def once(self) -> Timing:
        """One round."""
        executor = self.executor()
        timing = timed(lambda: self.serve(executor))
        executor.close()
        return timing


# ------------------------------------------------------------ theirs


def hf_model(source: ParameterSource) -> Any:
    """A transformers Llama with a source's weights."""
    transformers: Any = import_module("transformers")
    spec = source.spec
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads, num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, max_position_embeddings=spec.max_position, tie_word_embeddings=spec.tied,
        rms_norm_eps=spec.rms_eps, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    layout = LayerLayout(spec)
    slab = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    weights = layout.views(slab)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(source.embedding())
        model.lm_head.weight.copy_(source.head())
        model.model.norm.weight.copy_(source.final_norm())
        for index, layer in enumerate(model.model.layers):
            source.layer_into(index, slab)
            q, k, v = torch.split(weights.qkv, [spec.q_size, spec.kv_size, spec.kv_size], dim=1)
            gate, up = weights.gate_up.chunk(2, dim=1)
            attention, mlp = layer.self_attn, layer.mlp
            for module, value in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v),
                                  (attention.o_proj, weights.o), (mlp.gate_proj, gate), (mlp.up_proj, up),
                                  (mlp.down_proj, weights.down)):  # fmt: skip
                module.weight.copy_(value.t())
            layer.input_layernorm.weight.copy_(weights.input_norm)
            layer.post_attention_layernorm.weight.copy_(weights.post_norm)
    return model


class Theirs:
    """transformers on a folder: `generate` with a static batch, or `generate_batch`."""

    def __init__(self, folder: Path, load: Load, prompts: list[list[int]]) -> None:
        transformers: Any = import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses an optional package
        self.load, self.prompts = load, prompts
        self._config_type = transformers.ContinuousBatchingConfig
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # nobody ends early: no end token, so no check for it either
        self.greedy = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=load.output, eos_token_id=None, bos_token_id=None, pad_token_id=0
        )

    def static(self) -> Replies:
        """One batch, from the first prompt to the last token."""
        ids = torch.tensor(self.prompts)
        out = self.model.generate(ids, generation_config=self.greedy, attention_mask=torch.ones_like(ids))
        return [row[self.load.prompt :] for row in out.tolist()]

    def continuous(self, batch_tokens: int, num_blocks: int | None = None) -> Replies:
        """Continuous batching; with KV for all requests unless `num_blocks` says how much."""
        blocks = self.load.num * (-(-(self.load.prompt + self.load.output) // PAGE) + 1)
        config = self._config_type(
            page_size=PAGE, num_blocks=num_blocks or max(128, blocks), max_batch_tokens=batch_tokens,
            allow_block_sharing=False,
        )  # fmt: skip
        found = self.model.generate_batch(
            inputs=self.prompts, generation_config=deepcopy(self.greedy), continuous_batching_config=config
        )  # the copy: it writes into what it is given
        return [list(one.generated_tokens) for one in found.values()]

    def gap(self, ids: list[int], one: int, other: int) -> float:
        """By how much the logit of the best token after `ids` exceeds the lesser of two others', in fp64."""
        exact = deepcopy(self.model).double()
        with torch.no_grad():
            logits = exact(torch.tensor([ids])).logits[0, -1]
        return float(logits.max() - torch.minimum(logits[one], logits[other]))


def folder_of(spec: DecoderSpec, seed: int, folder: Path) -> None:
    """Write random weights as a transformers user would."""
    transformers: Any = import_module("transformers")
    transformers.logging.disable_progress_bar()
    hf_model(RandomSource(spec, seed)).save_pretrained(folder)
