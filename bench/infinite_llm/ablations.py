"""What each part of Infinite-LLM does, and what its creditors pay."""

from __future__ import annotations

from bench.infinite_llm.runs import SEEDS, Row, band, draw, keep, line, measure, only, serving
from common.plots.style import PALETTE, new_figure, styled

VARIANTS: dict[str, tuple[str, ...]] = {
    "vllm_multi": ("system=vllm_multi",),
    "vllm_single": ("system=vllm_single",),
    "off": ("system.mode=off",),
    "reactive": ("system.mode=reactive",),
    "proactive": (),
    "proactive, random creditor": ("system.creditor=random",),
    "proactive, remote partials after the local one": ("system.overlap=false",),
    "proactive, moves stop decoding": ("system.move_overlap=false",),
    "proactive, no overlap at all": ("system.overlap=false", "system.move_overlap=false"),
    "proactive, 0 tokens/iteration": ("system.pace=0",),
    "proactive, 8 tokens/iteration": ("system.pace=8",),
    "proactive, 32 tokens/iteration": ("system.pace=32",),
    "proactive, 64 tokens/iteration": ("system.pace=64",),
    "debt (v1)": ("system.mode=debt",),
    "debt (v1), DGFM off": ("system.mode=debt", "system.dgfm=false"),
    "debt (v1), CPU rBlocks": ("system.mode=debt", "system.cpu_share=0.25"),
}
PACES = {0: "proactive, 0 tokens/iteration", 8: "proactive, 8 tokens/iteration", 16: "proactive",
         32: "proactive, 32 tokens/iteration", 64: "proactive, 64 tokens/iteration"}  # fmt: skip


def ablations() -> None:
    """Every variant sees the same requests at the same times; the files are rewritten after each seed."""
    rows: list[Row] = []
    for seed in SEEDS:
        for name, overrides in VARIANTS.items():
            rows.append({"variant": name, "seed": seed, **measure("ablations", *overrides, f"seed={seed}")})
        _report(rows, seed + 1)


def _report(rows: list[Row], seeds: int) -> None:
    base = only(rows, variant="vllm_multi")
    table = [{"variant": name, **line(only(rows, variant=name), base)} for name in VARIANTS]
    paid = [{"variant": name, **serving(only(rows, variant=name))} for name in VARIANTS
            if any(row["remote_served_s"] for row in only(rows, variant=name))]  # fmt: skip
    pace = [{"tokens moved per iteration": at, **line(only(rows, variant=name), base)} for at, name in PACES.items()]
    notes = [f"Llama-2-7B, 8 A100-80GB of a node, `experiment=infinite_llm/ablations`, {seeds} seeds; median "
             "(least..most) over seeds, changes seed by seed.",
             "`off` must be vllm_multi exactly. Without overlap of moves the source stands still and its blocks leave "
             "at full speed, so that row lifts the pace as well. Copies take link time here, neither SMs nor HBM "
             "bandwidth: a knee at 32 tokens cannot come from this simulator."]  # fmt: skip
    keep("ablations", "Ablations", notes, {"variants": table, "tokens moved per iteration": pace,
         "creditors": paid, "runs": rows})  # fmt: skip
    with styled():
        figure, ((left, right),) = new_figure(1, 2, 8.4, 3.0)
        reference = {row["seed"]: row for row in base}
        groups = [only(rows, variant=name) for name in PACES.values()]
        for axis, key, label in ((left, "window_tps", "tokens/s against vllm_multi, %"),
                                 (right, "mean_tpot_ms", "mean TPOT against vllm_multi, %")):  # fmt: skip
            changes = [[100 * (row[key] / reference[row["seed"]][key] - 1) for row in group] for group in groups]
            band(axis, list(PACES), changes, color=PALETTE[0])
            axis.set_xlabel("tokens moved per iteration")
            axis.set_ylabel(label)
            axis.axhline(0, color="grey", lw=0.8)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "pace")
