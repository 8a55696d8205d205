"""Tiny random transformers models, saved as a user would. Import inside tests only: transformers is slow to load."""

from __future__ import annotations

import torch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def build(family, *, heads=4, kv_heads=2, head_dim=64, layers=2, tied=False, rope=None, seed=0, **more):
    """A model in eval mode whose every norm, bias and projection matters."""
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    sizes = {"vocab_size": 320, "hidden_size": heads * 32, "intermediate_size": 176, "max_position_embeddings": 512}
    config = getattr(transformers, f"{names[family]}Config")(
        **{**sizes, **more}, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, tie_word_embeddings=tied, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names[family]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


def logits(model, ids):
    """[T, vocab]"""
    with torch.no_grad():
        return model(torch.as_tensor(ids)[None]).logits[0]


def greedy(model, ids, count):
    """`count` tokens after `ids`."""
    prompt = torch.as_tensor(ids)[None]
    with torch.no_grad():  # without a mask it would take a 0 in the prompt for padding
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
                             pad_token_id=0)  # fmt: skip
    return out[0, len(ids) :].tolist()
