"""The longest context that can be served, and throughput by context length, with the arithmetic beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.infinite_llm.runs import SYSTEMS, Row, draw, keep, simulate
from common.build import cluster_model
from common.config import compose
from common.plots.style import DASHES, PALETTE, new_figure, styled
from common.predictions import Tokens

MODELS = (("llama2-7b", 1), ("llama2-13b", 2), ("llama2-70b", 4))
NUM_GPUS = 32
LENGTHS = (1_000, 16_000, 64_000, 256_000, 1_000_000, 2_000_000)
STEP_NS = 2_000_000_000
THREE = ("vllm_multi", "vllm_single", "proactive")


def shape(model: str, tp: int) -> tuple[str, ...]:
    """32 GPUs as instances of `tp`."""
    return f"model={model}", f"cluster.tp={tp}", f"cluster.num_instances={NUM_GPUS // tp}", "engine.max_num_seqs=1024"


def arithmetic(model: str, tp: int) -> Row:
    """What memory allows: a token's KV, an instance's tokens, the pool's, and vllm_single's."""
    config = compose(["experiment=infinite_llm/contexts", *shape(model, tp)])
    built = cluster_model(config)
    info, size = built.instances[0], built.block_size
    token = info.cell_bytes * info.num_layers // size
    weights = info.num_layers * info.layer_param_bytes
    each = info.kv_cells // info.num_layers * size
    one = cluster_model(compose(["experiment=infinite_llm/contexts", "system=vllm_single", *shape(model, tp)]))
    share = one.instances[0].num_layers // len(one.instances)
    memory = config.hardware.memory_bytes * config.gpu_memory_utilization * tp
    return {"model": model, "instances": len(built.instances), "KV of a token, KiB": token / 1024,
            "memory of an instance, GB": memory / 1e9, "layers' weights, GB": weights / 1e9,
            "tokens of one instance": each, "tokens of the pool": each * len(built.instances),
            "pool / one": len(built.instances), "2,000K / one": 2_000_000 / each,
            "tokens of vllm_single": one.instances[0].kv_cells // share * size}  # fmt: skip


def reply(context: int) -> int:
    """Tokens of reply: enough that the first of a batch still decodes when the last has been prefilled."""
    return 256 if context <= 16_000 else 2048


def bound_tps(facts: Row, system: str, batch: int, context: int, bandwidth: float) -> float:
    """Tokens/s if all weights and all KV were read once per token at the bandwidth of all GPUs: never exceeded."""
    kv = batch * (context + reply(context) / 2) * facts["KV of a token, KiB"] * 1024
    copies = 1 if system == "vllm_single" else facts["instances"]
    weights = facts["layers' weights, GB"] * 1e9 * copies
    return float(batch * bandwidth * NUM_GPUS / (weights + kv))


def fits(facts: Row, system: str, context: int) -> int:
    """Requests of this length that memory holds at once."""
    tokens = -(-(context + reply(context)) // 16) * 16
    if system == "vllm_multi":
        return int(facts["tokens of one instance"] // tokens) * int(facts["instances"])
    pool = "tokens of vllm_single" if system == "vllm_single" else "tokens of the pool"
    return int(facts[pool] // tokens)


def contexts() -> None:
    """As many requests of one length as fit, all at once: the best rate at which they decode."""
    facts = [arithmetic(model, tp) for model, tp in MODELS]
    rows: list[Row] = []
    for (model, tp), known in zip(MODELS, facts):
        limit = known["tokens of one instance"] - reply(known["tokens of one instance"])
        for context in sorted({*LENGTHS, limit, limit + 16}):
            for system in THREE:
                rows.append(_best(model, tp, known, system, context))
    table = [{key: value for key, value in row.items() if key != "tpot_ms"} for row in rows]
    notes = ["4 nodes of 8 A100-80GB. As many requests of one length as memory holds arrive at once, with 256 "
             "tokens of reply (2,048 above 16K); the rate is the highest over any 2 s. One run each: nothing "
             "is random. 0: not servable. The odd lengths are the longest request "
             "of one instance, and a block more.",
             "`bound` is the arithmetic, which nothing exceeds: weights (of every instance; vllm_single has one copy) "
             "and all KV, read once per token at 2.04 TB/s by all GPUs."]  # fmt: skip
    keep("contexts", "Context length and throughput", notes, {"arithmetic": facts, "throughput": table})
    _plot(rows)


def _best(model: str, tp: int, facts: Row, system: str, context: int) -> Row:
    batch = fits(facts, system, context)
    row: Row = {"model": model, "context": context, "system": system, "requests": batch, "tokens/s": 0.0,
                "slowest TTFT, s": "", "bound, tokens/s": ""}  # fmt: skip
    if not batch:
        return row
    config = compose(["experiment=infinite_llm/contexts", *shape(model, tp)])
    record = simulate("contexts", *SYSTEMS[system], *shape(model, tp), f"workload.prompt_tokens={context}",
                      f"workload.num_requests={batch}", "workload.rate=100000",
                      f"workload.output_tokens={reply(context)}")  # fmt: skip
    made, every = Tokens(record), tuple(range(config.cluster.num_instances))
    rates = [made.per_second(every, at, at + STEP_NS) for at in range(0, record.end_ns - STEP_NS, STEP_NS)]
    first = np.array(record.requests.first_token_ns)
    done = int((np.array(record.requests.finish_ns) >= 0).sum())
    if done < batch:
        raise SystemExit(f"{model} {system} {context}: {done} of {batch} requests were served")
    bandwidth = config.hardware.mem_bandwidth
    print(model, system, context, batch, f"{max(rates):.0f} tokens/s", flush=True)
    return {**row, "tokens/s": max(rates), "slowest TTFT, s": float(first.max()) / 1e9,
            "bound, tokens/s": bound_tps(facts, system, batch, context, bandwidth)}  # fmt: skip


def _plot(rows: list[Row]) -> None:
    with styled():
        figure, axes = new_figure(1, len(MODELS), 10.5, 3.4)
        for axis, (model, tp) in zip(axes[0], MODELS):
            for index, system in enumerate(THREE):
                mine = [row for row in rows if row["model"] == model and row["system"] == system and row["tokens/s"]]
                axis.plot([row["context"] for row in mine], [row["tokens/s"] for row in mine], marker="o", ms=3,
                          color=PALETTE[index], ls=DASHES[index], label=system)  # fmt: skip
            mine = [row for row in rows if row["model"] == model and row["system"] == "proactive" and row["tokens/s"]]
            axis.plot([row["context"] for row in mine], [row["bound, tokens/s"] for row in mine], color="grey", lw=0.8,
                      ls=":", label="bound of proactive's batch")  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{model}, {NUM_GPUS // tp} instances of TP{tp}")
            axis.set_xlabel("context, tokens")
        axes[0][0].set_ylabel("output tokens/s of 32 A100-80GB")
        axes[0][0].legend(fontsize=7)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "contexts")


def capacity() -> None:
    """Requests at and over the limit of one instance and of the pool: served or refused, to the last block."""
    rows: list[Row] = []
    facts = [arithmetic(model, tp) for model, tp in MODELS]
    for (model, tp), known in zip(MODELS, facts):
        each, pool, output = known["tokens of one instance"], known["tokens of the pool"], 16
        tries = (("vllm_multi", each - output), ("vllm_multi", each + 1), ("proactive", each + 1),
                 ("proactive", min(2_000_000, pool - output)), ("proactive", pool - output),
                 ("proactive", pool + 1))  # fmt: skip
        for system, prompt in tries:
            found = _alone(model, tp, system, prompt, output)
            rows.append({"model": model, "system": system, "prompt": prompt, **found})
    notes = ["4 nodes of 8 A100-80GB; one request on an otherwise empty cluster, 16 tokens of reply. The pool is "
             "served to the last token of its last block; one token more is refused."]  # fmt: skip
    keep("capacity", "The longest context", notes, {"arithmetic": facts, "requests": rows})
    with styled():
        figure, axes = new_figure(1, 1, 6.0, 3.2)
        axis, place = axes[0][0], np.arange(len(facts))
        bars = (("tokens of one instance", "one instance (vllm_multi)"), ("tokens of the pool", "pool (proactive)"),
                ("tokens of vllm_single", "vllm_single"))  # fmt: skip
        for index, (key, label) in enumerate(bars):
            axis.bar(place + 0.27 * (index - 1), [row[key] / 1e3 for row in facts], 0.27, label=label,
                     color=PALETTE[index])  # fmt: skip
        for index, row in enumerate(facts):
            axis.annotate(f"{row['pool / one']}x", (index, row["tokens of the pool"] / 1e3), ha="center", va="bottom")
        axis.axhline(2000, color="grey", lw=0.8, ls=":")
        axis.set_yscale("log")
        axis.set_ylim(top=60_000)
        axis.set_xticks(place, [f"{row['model']}\n{row['instances']} instances" for row in facts])
        axis.set_ylabel("longest context, K tokens")
        axis.set_title("dotted: 2,000K")
        axis.legend(fontsize=7, loc="upper left")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "capacity")


def _alone(model: str, tp: int, system: str, prompt: int, output: int) -> dict[str, Any]:
    record = simulate("contexts", *SYSTEMS[system], *shape(model, tp), f"workload.prompt_tokens={prompt}",
                      "workload.num_requests=1", f"workload.output_tokens={output}")  # fmt: skip
    done = record.requests
    if done.finish_ns[0] < 0:
        return {"served": "refused", "TTFT, s": "", "TPOT, ms": ""}
    return {"served": "served", "TTFT, s": (done.first_token_ns[0] - done.arrival_ns[0]) / 1e9,
            "TPOT, ms": (done.finish_ns[0] - done.first_token_ns[0]) / 1e6 / (output - 1)}  # fmt: skip
