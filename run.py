"""python run.py system=vllm workload=burst     run one system on one workload (Hydra overrides; -m sweeps)."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError, KVPlaneError, Stalled

if TYPE_CHECKING:
    from common.config import RunConfig
    from common.executors.sim import SimExecutor
    from common.executors.simfaults import MessageFaults
    from common.policy import Executor
    from common.record import RunRecord
    from workloads.config import WorkloadConfig

USAGE = """python run.py [key=value …]      one run; results in results/runs/<run.name>/
python run.py -m key=a,b …        a sweep: one run per combination, then one table of all
python run.py -m system=all …     vllm and the four systems side by side; seed=0,1,2 adds intervals

Common keys: system= workload= model= hardware= cluster.num_instances= cluster.tp= seed= run.name=
All keys and their defaults: conf/config.yaml. Keys of a group: conf/<group>/<name>.yaml.
"""


@dataclass(frozen=True)
class Replayed:
    """A run that has been driven to its end, and the wall and CPU seconds that it took (imports aside)."""

    record: RunRecord
    executor: SimExecutor
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Outcome:
    """What one run produced."""

    folder: Path
    summary: dict[str, Any]
    manifest: dict[str, Any]


def executor_type(config: RunConfig) -> Callable[..., SimExecutor]:
    """What makes the world of the configured runtime, imported: `(config, workload, record, **options)`."""
    runtime = config.runtime.name
    if runtime in ("local", "dist"):
        try:
            builder = import_module(f"common.build_{runtime}")
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"runtime={runtime} needs {error.name}, which is not installed: "
                "pip install -c constraints.txt '.[engine]'"
            ) from None
        made: Callable[..., SimExecutor] = getattr(builder, f"{runtime}_executor")
        return made
    from common.build import cluster_model
    from common.executors.sim import SimExecutor

    return lambda config, *args, **options: SimExecutor(cluster_model(config), *args, **options)


def make_executor(config: RunConfig, workload: Any, record: RunRecord) -> SimExecutor:
    """The world that the configured runtime carries commands out in."""
    from systems.registry import ORACLES, check_serves

    check_serves(config.system, len(config.models))
    if config.models or getattr(workload, "models", ()):
        from workloads.several import by_cluster

        workload = by_cluster(workload, config.cluster.models)
    gpus = config.cluster.num_instances
    faults = tuple((int(seconds * 1e9), instance + model * gpus) for seconds, instance in config.cluster.lost
                   for model in range(max(1, len(config.models))))  # fmt: skip
    return executor_type(config)(
        config, workload, record, oracle=config.system in ORACLES, faults=faults,
        message_faults=_message_faults(config), agent_faults=_agent_faults(config),
    )  # fmt: skip


def replay(config: RunConfig, workload: Any) -> Replayed:
    """Drive the configured policy over the configured world.

    KeyboardInterrupt leaves a record marked partial.
    """
    from common.console import Progress, stalled
    from common.driver import drive
    from common.record import RequestColumns, RunRecord
    from systems.registry import make_policy

    executor_type(config)  # imports are no part of the time
    begin, begin_cpu = time.perf_counter(), time.process_time()
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    executor = make_executor(config, workload, record)
    was_enabled = gc.isenabled()
    gc.disable()  # nothing cyclic is made per event; a tenth of the time goes otherwise
    try:
        policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
        with (
            _recorded(config, executor) as seen,
            Progress(record, workload.num_requests, _doing(config)) as progress,
            _stoppable(progress) as sampled,
        ):
            drive(policy, seen, record, _sample_ns(config, workload), sampled)
    except KeyboardInterrupt:
        record.partial, record.stopped = True, "interrupted"
        executor.abandon()
    except Stalled as error:  # every instance lost, or a policy that lost its requests: what there is, is written
        executor.abandon()
        record.partial, record.stopped = True, stalled(error, executor.report().get("lost_workers", {}))
        print(f"warning: the run stopped early: {record.stopped}", file=sys.stderr)
    except BaseException:
        executor.close()
        raise
    finally:
        if was_enabled:
            gc.enable()
    return Replayed(record, executor, time.perf_counter() - begin, time.process_time() - begin_cpu)


def _doing(config: RunConfig) -> str:
    return {"sim": "simulating", "local": "emulating"}.get(config.runtime.name, "running")


def _agent_faults(config: RunConfig) -> tuple[tuple[int, str, int], ...]:
    return tuple((int(at_s * 1e9), agent, int(for_s * 1e9)) for at_s, agent, for_s in config.cluster.lost_agents)


def _message_faults(config: RunConfig) -> MessageFaults | None:
    from common.executors.simfaults import RandomMessageFaults
    from common.rng import stream

    if config.cluster.message_faults is None:
        return None
    delay_ms, loss, duplicate = config.cluster.message_faults
    return RandomMessageFaults(stream(config.seed, "message faults"), delay_ms * 1e6, loss, duplicate)


def _sample_ns(config: RunConfig, workload: Any) -> int:
    if config.run.sample_ms is not None:
        return max(1, int(config.run.sample_ms * 1e6))
    span = int(workload.arrival_ns.max()) if workload.num_requests else 0
    return max(span // 600, 50_000_000)


@contextmanager
def _recorded(config: RunConfig, executor: SimExecutor) -> Iterator[Executor]:
    """The executor, seen through events.jsonl when log.events asks for it."""
    if not config.log.events:
        yield executor
        return
    from common.log import LOG, LogFile, Recorder

    path, at_once = Path(config.run.results) / config.run_name / LOG, config.runtime.name == "dist"
    with LogFile(path, at_once, executor.cluster.info()) as log:
        yield Recorder(executor, log.append)


@contextmanager
def _stoppable(progress: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Ctrl-C and SIGTERM end the run at the next sample, between two events, so that the record stays whole.

    A second Ctrl-C ends the process at once.
    """
    asked = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def sampled(now_ns: int) -> None:
        if asked:
            raise KeyboardInterrupt
        progress(now_ns)

    if threading.current_thread() is not threading.main_thread():
        yield sampled
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield sampled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what comes before and after the run itself as Ctrl-C does; `_stoppable` has the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def execute(config: RunConfig, quiet: bool = False) -> Outcome:
    """Run, write the results folder, print the table, draw. Raises KVPlaneError on what a user can mend."""
    from common.results import RunFolder
    from systems.registry import legal_options
    from workloads.build import build

    if config.runtime.name not in ("sim", "local", "dist"):
        raise ConfigError(f"runtime={config.runtime.name} is not built yet; use runtime=sim, local or dist")
    if config.log.outputs and config.runtime.name == "sim":
        raise ConfigError("log.outputs=true: runtime=sim makes no tokens; use runtime=local or dist")
    legal_options(config.system, config.system_options)  # before anything is built, and before older results go
    begin = time.perf_counter()
    workload = build(within_window(config.workload, config.engine.max_model_len), config.seed)
    if not workload.num_requests:
        raise ConfigError(f"workload={config.workload_name} has no requests: {dict(workload.counts)}")
    workload = served(workload, config.engine.max_model_len)
    workload_s = time.perf_counter() - begin
    executor_type(config)  # a run that cannot begin takes no older run's place
    folder = RunFolder.create(config.run.results, config.run_name, config.yaml)
    done = replay(config, workload)
    try:
        summary, manifest = _write(config, folder, workload, done, workload_s)
    finally:
        done.executor.close()
    _present(config, done.record, folder.path, summary, manifest, quiet)
    return Outcome(folder.path, summary, manifest)


def _write(
    config: RunConfig, folder: Any, workload: Any, done: Replayed, workload_s: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results folder's files; summary and manifest."""
    from common.metrics import summarize
    from common.spanning import gpus_per_instance

    record, engine = done.record, done.executor.report()
    summary = {**summarize(record, config.slo, gpus_per_instance(config)), **_context(workload, record)}
    facts = {
        "system": config.system,
        "workload": config.workload_name,
        "model": " + ".join(model.name for model in config.models) or config.model.name,
        "hardware": config.hardware.name,
        "hardware_derived_from": config.hardware.derived_from,
        "num_instances": config.cluster.num_instances,
        "tp": list(config.cluster.tps) or config.cluster.tp,
        "runtime": config.runtime.name,
        **({"engine": engine} if engine else {}),
        "seed": config.seed,
        "workload_s": workload_s,
        "simulate_cpu_s": done.cpu_seconds,
        "provenance": workload.provenance,
        "partial": record.partial,
        "stopped": record.stopped,
    }
    manifest = folder.write(record, summary=summary, facts=facts, simulate_s=done.seconds,
                            log_segments=config.log.segments, outputs=_outputs(config, done.executor))  # fmt: skip
    return summary, manifest


def _outputs(config: RunConfig, executor: SimExecutor) -> str | None:
    """The generated ids of each request, a JSON line each, where there are tokens and they are asked for."""
    outputs = executor.outputs() if config.log.outputs else None
    if outputs is None:
        return None
    return "".join(json.dumps({"request_id": key, "tokens": ids}) + "\n" for key, ids in sorted(outputs.items()))


def within_window(workload: WorkloadConfig, max_model_len: int) -> WorkloadConfig:
    """Prompts that this server cannot take are overlong too where those are cut or an error; with `reject` it is the
    server that turns them away, with a reason."""
    if workload.overlong == "reject":
        return workload
    most = max(1, max_model_len - 1)
    return replace(workload, max_prompt_tokens=min(workload.max_prompt_tokens or most, most))


def served(workload: Any, max_model_len: int) -> Any:
    """True outputs as this server gives them: they stop at the context window, and are then counted as clipped."""
    import numpy as np

    from workloads.types import add_counts

    room = np.where(workload.prompt_tokens < max_model_len, max_model_len - workload.prompt_tokens, 1 << 40)
    over = workload.output_tokens > room
    if not over.any():
        return workload
    # What stood at the workload's own limit has been counted where it was cut to that.
    counted = workload.counts.get("clipped_output", 0) > 0
    clipped = int((over & ~(counted & (workload.output_tokens == workload.max_output_tokens))).sum())
    counts = add_counts(workload.counts, clipped_output=clipped)
    return replace(workload, output_tokens=np.minimum(workload.output_tokens, room), counts=counts)


def _context(workload: Any, record: RunRecord) -> dict[str, Any]:
    counts = {f"workload_{key}": value for key, value in workload.counts.items() if value}
    return {**counts, "num_events": record.num_events, "num_commands": record.num_commands,
            "num_iterations": record.num_iterations}  # fmt: skip


def _present(
    config: RunConfig, record: RunRecord, path: Path, summary: dict[str, Any], manifest: dict[str, Any], quiet: bool
) -> None:
    """Trace, figures, external logger and the console table; none of them changes the results."""
    if config.run.trace:
        from common.perfetto import write_trace

        write_trace(record, path / "trace.json")
    figures: list[Path] = []
    if config.run.figures:
        from common.plots import draw_run

        figures = draw_run(path)
    if config.logger != "none":
        from common.loggers import log_run

        log_run(config.logger, path, options=config.logger_options)
    if not quiet:
        from common.console import lost_workers, refusals, summary_table

        print(summary_table(summary, config.run_name, config.runtime.name, manifest))
        for line in refusals(record.requests.reasons.values()):
            print(line)
        for line in lost_workers(manifest.get("engine", {}).get("lost_workers", {}), summary):
            print(line)
        if "engine" in manifest:
            print("engine: " + ", ".join(f"{key} {value}" for key, value in manifest["engine"].items()
                                         if not isinstance(value, dict)))  # fmt: skip
        if config.hardware.derived_from:
            print(f"note: {config.hardware.name} is derived from {config.hardware.derived_from}, not measured")
        left = {key: value for key, value in summary.items() if key.startswith("workload_")}
        if left:
            print("input: " + ", ".join(f"{value:,} {key[9:].replace('_', ' ')}" for key, value in left.items()))
        print(f"results: {path}" + (f"   figure: {figures[0]}" if figures else ""))


def _other(config: RunConfig, arguments: list[str]) -> RunConfig | None:
    """The run that this one is to be seen beside (`system.against`), composed before this one is made: a mistyped name
    must not cost a run."""
    other = config.system_options.get("against")
    if not isinstance(other, str) or other in ("", config.system):
        return None
    if config.runtime.name == "dist" and _under_torchrun():
        print(f"note: torchrun's workers serve one run: system={other} is for another (or system.against=null)")
        return None
    from common.config import compose
    from common.options import refusal, shortened

    mine = ("system=", "+system.", "system.", "run.name=")
    rest = [argument for argument in arguments if not argument.startswith(mine)]
    name = f"{config.run.name}-{other}" if config.run.name else None
    try:
        return compose([*rest, f"system={other}", *([f"run.name={name}"] if name else [])])
    except ConfigError as error:
        raise refusal("system.against", other, shortened(str(error), 100)) from None


def _beside(name: str, other: RunConfig, outcome: Outcome) -> Outcome:
    """Make the other run, of the system of this name, and print both. Gives the last one."""
    from common.console import comparison_table
    from common.runs import load_run

    second = execute(other, quiet=True)
    if second.manifest.get("partial"):
        return second
    runs = [load_run(folder) for folder in (outcome.folder, second.folder)]
    print()
    print(comparison_table(runs))
    if other.run.figures:
        from common.plots import draw_comparison

        paths = draw_comparison(runs, outcome.folder / f"beside-{name}")
        print(f"beside {name}: {', '.join(str(path) for path in paths if path.suffix == '.png')}")
    return second


def _under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def help_text() -> str:
    """--help: every system, workload, model and hardware, one line each."""
    from common.config import available

    lines = [USAGE]
    for group in ("system", "workload", "model", "hardware", "experiment"):
        found = available(group)
        if found:
            lines.append(f"{group}:")
            lines += [f"  {name:<16} {text}" for name, text in found.items()]
    return "\n".join(lines)


def _sweep(arguments: list[str]) -> None:
    """Every job of a multirun, and where several systems or settings ran, one comparison of them."""
    from common.sweep import plan, run_sweep

    jobs = run_sweep(plan(arguments), execute, lambda line: print(line, file=sys.stderr, flush=True))
    failed = [job for job in jobs if job.error]
    done = [(job.row, job.folder) for job in jobs if job.folder is not None]
    if len({row for row, _ in done}) > 1:
        from common.comparison import present

        print(present(done, tuple(f"{job.name}: {job.error}" for job in failed)))
    if failed:
        raise ConfigError(f"{len(failed)} of the sweep's jobs failed: {failed[0].error}")


def _run(arguments: list[str]) -> int:
    """One run, and what it is to be seen beside."""
    from common.config import compose

    config = compose(arguments)
    other = _other(config, arguments)
    outcome = execute(config)
    if other is not None and not outcome.manifest.get("partial"):
        outcome = _beside(config.system_options["against"], other, outcome)
    if not outcome.manifest.get("partial"):
        return 0
    print(f"stopped early: partial results in {outcome.folder}", file=sys.stderr)
    return 130 if outcome.manifest["stopped"] == "interrupted" else 1


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run stalled, 2 the user can mend it (one line on stderr), 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if os.environ.get("RANK", "0") != "0" and "runtime=dist" in arguments:  # torchrun's: an instance's worker
        from common.comm.worker import main as work

        work()
    try:
        if any(argument in ("-h", "--help") for argument in arguments):
            print(help_text())
        elif any(argument in ("-m", "--multirun") for argument in arguments):
            if "runtime=dist" in arguments and _under_torchrun():
                raise ConfigError("runtime=dist under torchrun is one run; start a sweep's runs one by one (-m outside "
                                  "of torchrun, or Hydra's submitit launcher: docs/distributed.md)")  # fmt: skip
            _sweep(arguments)
        else:
            if "system=all" in arguments:
                raise ConfigError("system=all: several systems are a sweep: python run.py -m system=all …")
            with _terminable():
                return _run(arguments)
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing further is written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output (`| head`) has seen enough; results are written before it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
