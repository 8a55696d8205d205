"""The ablation ladder (Fig. 14), the smallest micro-batch, and the error of the cost model (Fig. 15)."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.kunserve.runs import bubbles, claim, draw, keep, medians, new_figure, numbers, simulate, spread, styled
from common.build import cluster_model
from common.config import compose
from common.cost.estimate import HELD_OUT, batches, features, fit
from common.plots.style import PALETTE

SEEDS = range(5)
RUNGS = {
    "vllm": ("system=vllm",),
    "drop": ("system=kunserve", "system.exchange=recompute", "system.lookahead=token_count"),
    "drop, uncoordinated exchange": (
        "system=kunserve",
        "system.exchange=uncoordinated",
        "system.lookahead=token_count",
    ),
    "+ exchange": ("system=kunserve", "system.lookahead=token_count"),
    "+ lookahead, literal": ("system=kunserve", "system.lookahead=literal", "system.min_tokens=2048"),
    "+ lookahead": ("system=kunserve",),
}
VARIANTS: tuple[tuple[str, bool, bool], ...] = (
    ("full", True, True), ("no prefix term", True, False), ("no attention", False, False),
)  # fmt: skip


IDLE = "stages idle 60-90 s, %"  # the second half of the burst, and its queue


def _rung(options: tuple[str, ...], seed: int) -> dict[str, Any]:
    """One run's numbers, and its bubbles in the burst."""
    found = simulate("ladder", *options, f"seed={seed}")
    return {**numbers(found), IDLE: bubbles(found, 60, 90)}


def ladder() -> None:
    """Each step on LongBench lengths, every seed; signs against the paper's."""
    found = {name: [_rung(options, seed) for seed in SEEDS] for name, options in RUNGS.items()}
    rows = [{"step": name, "seed": seed, **row} for name, many in found.items() for seed, row in zip(SEEDS, many)]
    middle: list[dict[str, Any]] = [{"step": name, **medians(many)} for name, many in found.items()]

    def step(before: str, after: str, key: str) -> str:
        """Change of a number, seed by seed."""
        changes = [100 * (b[key] / a[key] - 1) for a, b in zip(found[before], found[after])]
        return f"{key} {spread(changes, '+.0f')}%"

    def steps(before: str, after: str, *keys: str) -> str:
        return ", ".join(step(before, after, key) for key in keys)

    _plot_ladder(rows)
    tails = ("p99_ttft_ms", "p999_ttft_ms")
    med = {str(row["step"]): row for row in middle}
    claims = [
        claim("drop: P99/P999 TTFT 11.7/10.3x better, TPOT +21-31.9%",
              steps("vllm", "drop", *tails, "p50_tpot_ms", "p99_tpot_ms"),
              "opposite sign: computing the KV of everything that runs again, 5.7K tokens a request, takes the "
              "prefill speed "
              "that the burst needs; what the paper's rung does with running requests is not said. The next "
              "line is drop "
              "with an exchange"),
        claim("the same", "drop with uncoordinated exchange: "
              + steps("vllm", "drop, uncoordinated exchange", *tails, "p50_tpot_ms", "p99_tpot_ms"),
              "sign agrees; the floor (prompts of 5.7K tokens at 60% of prefill speed) bounds the factor"),
        claim("+ exchange: P99/P999 TTFT 1.5/1.4x, TPOT -5%; 1.3 s of stall",
              steps("drop", "+ exchange", *tails, "p50_tpot_ms") + "; over uncoordinated: "
              + steps("drop, uncoordinated exchange", "+ exchange", *tails, "p50_tpot_ms", "mean_stall_ms"),
              f"against recompute it is the whole gain, mean stall {med['+ exchange']['mean_stall_ms']:,.0f} ms; "
              "priority of activations over KV alone matters little on 200 Gbps"),
        claim("+ lookahead: TPOT P99/P999 -10.6/-9.7%, throughput +20%, bubbles 21.9 -> 8.3%",
              steps("+ exchange", "+ lookahead", "p99_tpot_ms", "p999_tpot_ms", "output_tokens_per_s", *tails)
              + f"; stages idle {med['+ exchange'][IDLE]:.1f} -> "
              f"{med['+ lookahead'][IDLE]:.1f}%",
              "prompts wait for compute, not for bubbles: output tokens come at the rate of arrivals, and the run ends "
              "with its slowest request"),
        claim("the same, halved to 2,048 tokens only (the paper's rule)",
              steps("+ exchange", "+ lookahead, literal", "p99_tpot_ms", "p999_tpot_ms", "output_tokens_per_s", *tails)
              + f"; stages idle {med['+ lookahead, literal'][IDLE]:.1f}%",
              "see restore, where the difference is that of a collapse"),
    ]  # fmt: skip
    keep("ladder", "Ablation ladder", ["memory_longbench, 5 seeds; changes are medians (and ranges) over seeds "
    "of the "
         "change against the step before."], {"medians": middle, "claims": claims, "runs": rows})  # fmt: skip


def _plot_ladder(rows: list[dict[str, Any]]) -> None:
    """Each rung's seeds, and their median."""
    with styled():
        figure, axes = new_figure(2, 2, 9.5, 6.4, sharex=True)
        shown = ("p99_ttft_ms", "p99_tpot_ms", "mean_stall_ms", IDLE)
        for axis, key in zip(axes.flat, shown):
            for place, name in enumerate(RUNGS):
                values = [row[key] for row in rows if row["step"] == name and np.isfinite(row[key])]
                if values and (place or key in shown[:2]):  # nothing stalls, and no stage idles, before the drop
                    axis.plot([place] * len(values), values, "o", ms=4, color=PALETTE[0])
                    axis.plot([place - 0.3, place + 0.3], [np.median(values)] * 2, color=PALETTE[1])
            axis.set_title({"mean_stall_ms": "mean stall of who ran at a drop, ms"}.get(key, key))
            axis.set_yscale("linear" if key == IDLE else "log")
            axis.set_xlim(-0.5, len(RUNGS) - 0.5)
            axis.set_xticks(range(len(RUNGS)), [name.replace(" ", "\n") for name in RUNGS], fontsize=7)
        axes[0][0].plot([], [], "o", ms=4, color=PALETTE[0], label="one seed")
        axes[0][0].plot([], [], color=PALETTE[1], label="median")
        axes[0][0].legend()
        draw(figure, "ladder")


def min_tokens() -> None:
    """MIN tokens of Fig. 11: the least that a micro-batch is halved to."""
    rows: list[dict[str, Any]] = []
    shown = ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms", "output_tokens_per_s", "stages idle, %")
    for experiment in ("memory_burst", "burst"):
        for rule, least in (("on", 128), ("on", 256), ("on", 512), ("on", 1024), ("literal", 512), ("literal", 2048)):
            for seed in SEEDS:
                options = (f"system.lookahead={rule}", f"system.min_tokens={least}", f"seed={seed}")
                row = numbers(simulate(experiment, "system=kunserve", *options))
                rows.append({"experiment": experiment, "lookahead": rule, "min_tokens": least,
                             "seed": seed, **{key: row[key] for key in shown}})  # fmt: skip
    keep("min_tokens", "The least micro-batch", ["on: halved until every lane has a part, not below MIN tokens "
         "(default 256); literal: down to MIN tokens, as the paper."], {"runs": rows})  # fmt: skip


def errors(model: str, hardware: str, tp: int) -> list[dict[str, Any]]:
    """Relative errors on held-out batches, apart for those without and with a prefix."""
    config = compose([f"model={model}", f"hardware={hardware}", f"cluster.tp={tp}"])
    cost = cluster_model(config).cost(config.model.num_layers, True, True)
    held = batches()[HELD_OUT - 1 :: HELD_OUT]
    times = np.array([cost.iteration_ns(batch, 0, 0, 1) for batch in held], float)
    after = np.array([any(prefix for _, prefix in batch) for batch in held])
    rows = []
    for name, attention, prefix in VARIANTS:
        found = fit(cost, attention, prefix)
        weights = [*([found.alpha] if attention else []), found.beta, found.gamma, found.gamma - found.lam]
        error = np.abs(np.array([features(batch, attention, prefix) for batch in held]) @ weights - times) / times
        row = {"model": model, "hardware": hardware, "cost model": name}
        for label, some in (("no prefix", ~after), ("with prefix", after)):
            row |= {f"{label}: mean %": 100 * error[some].mean(), f"{label}: most %": 100 * error[some].max()}
        rows.append(row)
    return rows


def cost() -> None:
    """Fig. 15."""
    rows = [*errors("qwen2.5-14b", "a800-80g", 1), *errors("qwen2.5-72b", "h800-80g", 4)]
    _plot_cost(rows)
    full, bare = rows[0], rows[2]
    big, no_prefix, none = rows[3:]
    mean = "with prefix: mean %"
    claims = [
        claim("< 5% error",
              f"14B: {full['no prefix: mean %']:.1f}% mean, {full['no prefix: most %']:.1f}% most without "
              f"prefix; {full['with prefix: mean %']:.1f} and {full['with prefix: most %']:.1f}% with",
              "the target is our simulator's tables of measured operators, whose steps between tile sizes no "
              "such form "
              "follows"),
        claim("without attention up to 48% (no prefix), 74% (prefix)",
              f"14B: up to {bare['no prefix: most %']:.0f}% and {bare['with prefix: most %']:.0f}%",
              "their batches are not known; ours have at most 4,096 new tokens and 8,192 tokens of prefix"),
        claim("not shown: 72B",
              f"TP4, mean with prefix: {big[mean]:.1f}%; without the prefix term {no_prefix[mean]:.1f}%, without "
              f"attention {none[mean]:.1f}%", "there the terms of attention win next to nothing: 64 heads over 4 GPUs "
              "beside linear layers of 72B are a small share of an iteration at such lengths"),
    ]  # fmt: skip
    keep("cost", "Error of the paper's cost model", ["Least squares on relative errors; every fifth batch held out."],
         {"held-out error": rows, "claims": claims})  # fmt: skip


def _plot_cost(rows: list[dict[str, Any]]) -> None:
    """Mean (bars) and worst (marks) error of each form, without and with a prefix."""
    with styled():
        figure, axes = new_figure(1, 2, 9.5, 3.4)
        for axis, model in zip(axes[0], dict.fromkeys(row["model"] for row in rows)):
            some = [row for row in rows if row["model"] == model]
            for index, (label, shift) in enumerate((("no prefix", -0.2), ("with prefix", 0.2))):
                at = np.arange(len(some)) + shift
                axis.bar(at, [row[f"{label}: mean %"] for row in some], 0.36, color=PALETTE[index],
                         label=f"{label}, mean")  # fmt: skip
                axis.plot(at, [row[f"{label}: most %"] for row in some], "_", ms=14, color="#222222",
                          label=None if index else "worst batch")  # fmt: skip
            axis.axhline(5, color="#999999", lw=0.8, ls=":", label="the paper's 5%")
            axis.set_xticks(range(len(some)), [row["cost model"] for row in some])
            axis.set_title(f"{model}: error on held-out batches, %")
            axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
        axes[0][0].legend(loc="upper left", ncols=2)
        draw(figure, "cost")
