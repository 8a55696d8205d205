"""python -m bench.mell.variants     everything beside the main comparison, three seeds; results/mell/variants.json.

Simulated. As `bench.mell.gpus`: what is in the file is not run again; `--only` takes a part of the keys, such as
`hybrid/`. `python -m bench.mell.studies` makes tables and figures. Seeds of the Azure trace are windows of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.mell.gpus import RATES, Case, options, run_missing

SEEDS = range(3)
FOUR = ("mell", "load_balance", "worst_fit", "best_fit")
FITS = ("best_fit", "worst_fit", "load_balance", "first_fit", "load_balance_drain", "ffd_repack")
NATIVE_RATES = {"infrequent": 13.6, "middle": 21.8, "frequent": 30.0}  # in the proportions of the paper's
LINKS = (1.25e8, 6e8, 1.25e9, 5e9, 2e10)  # bytes/s
TIMELINES = ("timeline", "timeline_7b")
HYBRID = ("hybrid", "hybrid_mid", "hybrid_busy")  # prompts take more and more of the compute
VOLUMES = {"infrequent": 1.6, "middle": 2.5, "frequent": 3.6}  # rates that ask for as much KV as the paper's bars do
LENGTHS = {1: 30.0, 20: 0.36}  # scale -> rate; x10 is the main comparison
MARKS = (0.0, 0.05, 0.1, 0.2, 0.3)
AZURE_STARTS = (0, 1000, 2000)  # s of the trace


def cases() -> Iterator[Case]:
    """All runs, most wanted first; the study is the first part of the key."""
    for seed in SEEDS:
        yield from _watermark(seed)
        yield from _scale(seed)
        yield from _hybrid(seed)
        yield from _compute(seed)
        yield from _overflow(seed)
        for name in TIMELINES:
            for system in FOUR:
                yield Case(name, "frequent", system, "", seed, ())
        yield from _azure(seed)
        yield from _lengths(seed)
        yield from _switches(seed)
        yield from _native(seed)


def _native(seed: int) -> Iterator[Case]:
    for model in ("13b", "7b"):
        for load, rate in NATIVE_RATES.items():
            for system in FOUR:
                yield Case(f"{model}_native", load, system, "", seed, (f"workload.rate={rate}",))


def _watermark(seed: int) -> Iterator[Case]:
    for mark in MARKS:
        for system in FOUR:
            yield Case("watermark", f"{mark:g}", system, "", seed, (f"system.watermark={mark}",))
        yield Case("watermark", f"{mark:g}", "mell", "compute_share=1", seed,
                   (f"system.watermark={mark}", "system.compute_share=1.0"))  # fmt: skip


def _hybrid(seed: int) -> Iterator[Case]:
    """Tokens alone hardly touch a link: both ends of the sweep say so."""
    for experiment in HYBRID:
        for link in LINKS:
            for migration in ("hybrid", "kv", "tokens") if link in (LINKS[0], LINKS[-1]) else ("hybrid", "kv"):
                yield Case(experiment, f"{link:g}", "mell", f"migration={migration}", seed,
                           (f"hardware.nic_bandwidth={link}", f"system.migration={migration}"))  # fmt: skip


def _compute(seed: int) -> Iterator[Case]:
    """All of the prefill rate for migrations, where a fifth lets no request above some 970 tokens go as tokens."""
    for link in LINKS:
        for migration in ("hybrid", "tokens") if link in (LINKS[0], LINKS[-1]) else ("hybrid",):
            yield Case("hybrid", f"{link:g}", "mell", f"migration={migration} compute_share=1", seed,
                       (f"hardware.nic_bandwidth={link}", f"system.migration={migration}",
                        "system.compute_share=1.0"))  # fmt: skip


def _overflow(seed: int) -> Iterator[Case]:
    """What the baselines do when KV outgrows a GPU; `preempt` and the first two oracles are in the main comparison."""
    for system in FITS:
        yield Case("overflow", "frequent", system, "reserve_max", seed, ("system.overflow=reserve_max",))
    for system in FITS[2:]:
        yield Case("overflow", "frequent", system, "preempt", seed, ())
        yield Case("overflow", "frequent", f"oracle_{system}", "oracle", seed, ())


def _azure(seed: int) -> Iterator[Case]:
    start = AZURE_STARTS[seed]
    for model in ("13b", "7b"):
        for name, seconds in (("azure", 300), ("azure_x10", 60)):
            for system in FOUR:
                window = f"workload.window_s=[{start},{start + seconds}]"
                yield Case(f"{model}_{name}", name, system, "", seed, (window,))


def _scale(seed: int) -> Iterator[Case]:
    for load, rate in VOLUMES.items():
        for system in FOUR:
            yield Case("scale", load, system, "", seed, (f"workload.rate={rate}",))


def _lengths(seed: int) -> Iterator[Case]:
    for scale, rate in LENGTHS.items():
        for system in FOUR:
            yield Case("lengths", f"x{scale}", system, "", seed,
                       (f"workload.length_scale={scale}", f"workload.rate={rate}"))  # fmt: skip


def _switches(seed: int) -> Iterator[Case]:
    """Of MELL."""
    for option in ("migration=off", "rules=paper", "weight_free=0", "weight_requests=0", "weight_node=0"):
        yield Case("13b_x10", "frequent", "mell", option, seed, ("workload.rate=1.1", f"system.{option}"))
    for load, rate in RATES.items():
        for on in ("true", "false"):
            yield Case("batching", load, "mell", f"batching={on}", seed,
                       (f"workload.rate={rate}", f"system.batching={on}"))  # fmt: skip


def main() -> None:
    """Run what is missing."""
    run_missing(cases(), options(__doc__, "results/mell/variants.json").parse_args(),
                lambda row: f"plan {row['plan_mean']:.1f}/{row['plan_peak']}, L2 {row['l2_mean']:.1f}",
                lambda case: () if not case.seed and case.experiment in TIMELINES else ("timeline",))  # fmt: skip


if __name__ == "__main__":
    main()
