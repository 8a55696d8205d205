"""Throughput and latency over the request rate, by spread of lengths; and over the number of instances."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bench.infinite_llm.runs import SEEDS, SYSTEMS, Row, band, draw, keep, line, measure, only, tokens_each
from common.plots.style import DASHES, PALETTE, new_figure, styled

MIXES = (0, 1, 2)
RATES = (2.0, 5.0, 8.0, 11.0)
SPREADS = (0.3, 1.0, 2.0)
MEMORY_RATES = (1.0, 2.0, 3.0)
TIGHT_RATES = (0.5, 1.0, 1.5)
THREE = ("vllm_multi", "vllm_single", "proactive")
TWO = ("vllm_multi", "proactive")
INSTANCES = (2, 4, 8, 16, 32)
COLOURS = dict(zip(("vllm_multi", "vllm_single", "proactive"), PALETTE))


class Axis(NamedTuple):
    """What a table goes by: its column, the option that sets it, its values, and what one is called."""

    key: str
    option: str
    values: tuple[float, ...]
    label: str


BY_MIX = Axis("mix", "workload.trace", MIXES, "mix {}")
BY_SPREAD = Axis("cv", "workload.lengths.prompt.cv", SPREADS, "coefficient of variation {}")


def rates() -> None:
    """Throughput-latency curves of mixes 0-2 (mean 6K tokens; spread rising)."""
    notes = ["Llama-2-7B, 8 A100-80GB of a node, 200 requests of `workload=long_context`, mixes 0-2 (coefficient of "
             "variation of prompts 0.3, 1, 2; replies of mean 373), 3 seeds; median (least..most) over seeds.",
             "Prompts of mean 6K and short replies: prefill saturates at about 9 requests/s, before memory is "
             "short."]  # fmt: skip
    _over_rates("rates", "Throughput and latency over the request rate", notes, BY_MIX, RATES, THREE)


def spread_curves() -> None:
    """The same where memory binds: replies of mean 1,500 tokens; vllm_multi and vllm_single beside it."""
    notes = ["Llama-2-7B, 8 A100-80GB of a node, 200 requests: prompts of mean 6K by their coefficient of variation, "
             "replies of mean 1,500 (ours), 3 seeds; median (least..most) over seeds. From about 2.5 requests/s on "
             "every instance's memory is full."]  # fmt: skip
    _over_rates("spread", "Where memory binds: throughput and latency by spread", notes, BY_SPREAD, MEMORY_RATES, THREE)


def tight() -> None:
    """Where the longest prompts fill most of an instance: the memory that others hold keeps them waiting."""
    notes = ["Llama-2-13B, 8 instances of one A100-80GB, which hold "
             f"{tokens_each('tight', 'system=vllm'):,} tokens each; 120 requests: prompts of mean 6K, at most 45K, by "
             "their coefficient of variation, replies of mean 1,500 (ours), 3 seeds; median (least..most) over "
             "seeds."]  # fmt: skip
    _over_rates("tight", "Where a prompt fills most of an instance", notes, BY_SPREAD, TIGHT_RATES, TWO)


def _over_rates(
    name: str, title: str, notes: list[str], by: Axis, at: tuple[float, ...], systems: tuple[str, ...]
) -> None:
    """Run an experiment over an axis, rates and seeds; its tables and its figure."""
    rows = [{by.key: value, "rate": rate, "system": system, "seed": seed,
             **measure(name, *SYSTEMS[system], f"{by.option}={value}", f"workload.rate={rate}", f"seed={seed}")}
            for value in by.values for rate in at for seed in SEEDS for system in systems]  # fmt: skip
    tables = {by.label.format(value): _lines(only(rows, **{by.key: value}), at, systems) for value in by.values}
    low = [_worst(rows, by.key, value, at) for value in by.values]
    keep(name, title, notes, {"all rates": low, **tables, "runs": rows})
    _curves(name, rows, by.key, by.values, at, systems, by.label)


def _worst(rows: list[Row], key: str, value: float, at: tuple[float, ...]) -> Row:
    """Proactive against vllm_multi over all rates and seeds of one spread: is it ever below by more than 1%?"""
    out: Row = {key: value}
    for what, label in (("window_tps", "tokens/s"), ("output_throughput", "tokens / duration"),
                        ("normal_ms", "latency")):  # fmt: skip
        changes = [_changes(only(rows, **{key: value}, rate=rate), what) for rate in at]
        out |= {f"{label}: medians of rates, %": ", ".join(f"{np.median(values):+.1f}" for values in changes),
                f"{label}: all runs, %":
                f"{min(map(min, changes)):+.1f}..{max(map(max, changes)):+.1f}"}  # fmt: skip
    return out


def _changes(rows: list[Row], key: str) -> list[float]:
    """Proactive against vllm_multi in %, seed by seed."""
    base = {row["seed"]: row[key] for row in only(rows, system="vllm_multi")}
    return [100 * (row[key] / base[row["seed"]] - 1) for row in only(rows, system="proactive")]


def _lines(rows: list[Row], at: tuple[float, ...], systems: tuple[str, ...]) -> list[Row]:
    return [{"requests/s": rate, "system": name, **line(only(rows, rate=rate, system=name),
                                                       only(rows, rate=rate, system="vllm_multi"))}
            for rate in at for name in systems]  # fmt: skip


def _curves(name: str, rows: list[Row], key: str, values: tuple[float, ...], at: tuple[float, ...],
            systems: tuple[str, ...], title: str) -> None:  # fmt: skip
    with styled():
        figure, axes = new_figure(3, len(values), 3.1 * len(values), 6.6)
        for column, value in enumerate(values):
            for index, system in enumerate(systems):
                mine = [only(rows, **{key: value}, rate=rate, system=system) for rate in at]
                for axis, what, scale in ((axes[0], "window_tps", 1), (axes[1], "normal_ms", 1),
                                          (axes[2], "p99_ttft_ms", 1e-3)):  # fmt: skip
                    band(axis[column], at, [[row[what] * scale for row in group] for group in mine],
                         color=COLOURS[system], ls=DASHES[index], label=system)  # fmt: skip
            axes[0][column].set_title(title.format(value))
            axes[2][column].set_xlabel("requests/s")
        for axis, label in zip(axes, ("output tokens/s", "latency per output token, ms", "P99 TTFT, s")):
            axis[0].set_ylabel(label)
        axes[0][0].legend()
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        draw(figure, name)


def instances() -> None:
    """2 to 32 instances at one load per instance, which fills them."""
    rows = [{"instances": num, "system": name, "seed": seed,
             **measure("instances", *SYSTEMS[name], f"cluster.num_instances={num}",
                       f"workload.rate={0.125 * num}", f"workload.num_requests={15 * num}", f"seed={seed}")}
            for num in INSTANCES for seed in SEEDS for name in TWO]  # fmt: skip
    table = [{"instances": num, "system": name, "KV in use, %": _used(only(rows, instances=num, system=name)),
              **line(only(rows, instances=num, system=name), only(rows, instances=num, system="vllm_multi"))}
             for num in INSTANCES for name in TWO]  # fmt: skip
    notes = ["Llama-2-13B, instances of one A100-80GB, 0.125 requests/s and 15 requests per instance, prompts of mean "
             "6K (at most 45K) and coefficient of variation 1.5, replies of mean 1,500, 3 seeds; median (least..most) "
             "over seeds. KV in use is over the whole run, its tail included."]  # fmt: skip
    keep("instances", "2 to 32 instances", notes, {"instances": table, "runs": rows})
    with styled():
        figure, axes = new_figure(1, 3, 11.0, 3.0)
        for axis, key, label in zip(axes[0], ("window_tps", "output_throughput", "normal_ms"),
                                    ("output tokens/s", "tokens / duration", "latency per output token")):  # fmt: skip
            changes = [_changes(only(rows, instances=num), key) for num in INSTANCES]
            band(axis, list(INSTANCES), changes, color=PALETTE[0])
            axis.axhline(0, color="grey", lw=0.8)
            axis.set_xscale("log", base=2)
            axis.set_xticks(INSTANCES, [str(num) for num in INSTANCES])
            axis.set_xlabel("instances")
            axis.set_ylabel(f"{label}:\nproactive against vllm_multi, %")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        draw(figure, "instances")


def _used(rows: list[Row]) -> str:
    return f"{100 * sum(row['kv_utilisation'] for row in rows) / len(rows):.0f}"
