"""A sweep: Hydra's multirun over the configuration. Each job is one run, and a job that fails fails alone.

Jobs may run in other processes (`hydra/launcher=`), so each leaves its outcome in a file of a folder of the sweep.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from common.config import CONF, RunConfig, compose, from_composed
from common.cost.profiles import with_profile
from common.errors import ConfigError, KVPlaneError
from common.results import replacing

ALL = ("vllm", "kunserve", "infinite_llm", "memserve", "mell")  # what system=all means
LAUNCHERS = {"basic": None, "joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit",
             "ray": "ray", "ray_aws": "ray"}  # fmt: skip
"""Hydra's launchers by the plugin that they come from: hydra-<plugin>-launcher."""
BEGUN = "began and left no outcome: killed, or out of memory"


class Outcome(Protocol):
    """What a job must give back: the folder of its run, its summary and its manifest."""

    @property
    def folder(self) -> Path: ...
    @property
    def summary(self) -> dict[str, Any]: ...
    @property
    def manifest(self) -> dict[str, Any]: ...


Execute = Callable[[RunConfig, bool], Outcome]


@dataclass(frozen=True)
class Job:
    """One run of a sweep. `row` names all that was swept but the seed; without a folder it failed, `error` says why."""

    row: str
    seed: str
    folder: Path | None
    error: str | None = None

    @property
    def name(self) -> str:
        """The row, and the seed where seeds are swept."""
        return f"{self.row}, seed {self.seed}" if self.seed else self.row


@dataclass(frozen=True)
class Plan:
    """The command line of a sweep, and the keys that it sweeps with their values, as written."""

    arguments: tuple[str, ...]
    swept: dict[str, tuple[str, ...]]

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems that are swept; none where one is given."""
        return self.swept.get("system", ())

    @property
    def num_jobs(self) -> int:
        """How many runs this is."""
        number = 1
        for values in self.swept.values():
            number *= len(values)
        return number

    def row(self, overrides: Sequence[str], system: str) -> str:
        """What a job is called in a table: 'kunserve', 'vllm workload.rate=3'."""
        swept = [text for text in overrides if _key(text) in self.swept and _key(text) not in ("seed", "system")]
        return " ".join([system, *swept])


def expanded(arguments: Sequence[str]) -> list[str]:
    """Arguments with `system=all` spelled out, and measured hardware where Hydra finds it."""
    spelled = [f"system={','.join(ALL)}" if argument == "system=all" else argument for argument in arguments]
    return with_profile(spelled)


def plan(arguments: Sequence[str]) -> Plan:
    """What a command line sweeps. ConfigError where Hydra cannot read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    arguments = expanded(arguments)
    swept = {}
    for text in arguments:
        if text.startswith("-") or "=" not in text:
            continue
        try:
            [override] = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise ConfigError(f"{text}: {' '.join(str(error).split())}") from None
        if override.is_sweep_override():
            swept[override.key_or_group] = tuple(str(value) for value in override.sweep_string_iterator())
    return Plan(tuple(arguments), swept)


def run_sweep(sweep: Plan, execute: Execute, say: Callable[[str], None]) -> list[Job]:
    """Every job of the sweep, in Hydra's order; `say` gets a line when a job begins and when it ends."""
    check_launcher(sweep.arguments)
    sweep, jobs = _composable(sweep, say)
    results = next((_value(text) for text in sweep.arguments if _key(text) == "run.results"), "results/runs")
    Path(results).mkdir(parents=True, exist_ok=True)
    outcomes = Path(tempfile.mkdtemp(prefix=".sweep-", dir=results)).absolute()
    import hydra

    task = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(
        _Runner(sweep, execute, say, outcomes)
    )
    before, sys.argv = sys.argv, [sys.argv[0], *sweep.arguments, "hydra/hydra_logging=none", "hydra/job_logging=none"]
    silent = any(name.startswith("submitit") for name in _launchers(sweep.arguments))
    try:
        with watched(outcomes, sweep.num_jobs, say) if silent else nullcontext():
            _launched(task, outcomes)
        return [*jobs, *_outcomes(outcomes, sweep.num_jobs)]
    finally:
        sys.argv = before
        shutil.rmtree(outcomes, ignore_errors=True)


def check_launcher(arguments: Sequence[str]) -> None:
    """ConfigError where the launcher that is asked for is unknown or its plugin is not installed."""
    for name in _launchers(arguments):
        if name not in LAUNCHERS:
            raise ConfigError(f"hydra/launcher={name} is unknown; choose one of: {', '.join(LAUNCHERS)}")
        plugin = LAUNCHERS[name]
        if plugin and (find_spec("hydra_plugins") is None
                       or find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None):  # fmt: skip
            raise ConfigError(f"hydra/launcher={name} needs hydra-{plugin}-launcher, which is not installed: "
                              f"pip install hydra-{plugin}-launcher")  # fmt: skip


def _launchers(arguments: Sequence[str]) -> list[str]:
    return [_value(text) for text in arguments if _key(text) == "hydra/launcher"]


def _launched(task: Callable[[], object], outcomes: Path) -> None:
    """All jobs. Where a launcher gives up, as one does when a job is killed, what the others left still counts."""
    try:
        task()
    except SystemExit:
        if not _outcomes(outcomes):
            raise


def _outcomes(folder: Path, num_jobs: int = 0) -> list[Job]:
    """What the jobs left, in their order, and a failed one for those of `num_jobs` that left nothing."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    jobs = [Job(**{**one, "folder": one["folder"] and Path(one["folder"])}) for one in found]
    lost = num_jobs - len(jobs)
    return [*jobs, Job(f"{lost} more", "", None, "never began")] if lost > 0 else jobs


@contextmanager
def watched(outcomes: Path, num_jobs: int, say: Callable[[str], None], every_s: float = 0.3) -> Iterator[None]:
    """Say what becomes of jobs whose own lines go to files elsewhere: a line when one begins and when it ends."""
    over, told = threading.Event(), dict[int, str]()

    def look() -> None:
        for path in sorted(outcomes.glob("*.json")):
            number, job = int(path.stem), Job(**json.loads(path.read_text(encoding="utf-8")))
            now = " ..." if job.error == BEGUN else ": finished" if job.error is None else f": failed ({job.error})"
            if told.get(number) != now:
                told[number] = now
                say(f"[{number + 1}/{num_jobs}] {job.name}{now}")

    def watch() -> None:
        while not over.wait(every_s):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


class _Runner:
    """The task that Hydra calls once per job, here or in another process."""

    def __init__(self, sweep: Plan, execute: Execute, say: Callable[[str], None], outcomes: Path) -> None:
        self.sweep, self.execute, self.say, self.outcomes = sweep, execute, say, outcomes

    def __call__(self, composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        config = HydraConfig.get()
        overrides = [str(text) for text in config.overrides.task]
        number = int(config.job.num)
        system = dict(config.runtime.choices)["system"]
        seed = str(composed.seed) if "seed" in self.sweep.swept else ""
        job = Job(self.sweep.row(overrides, system), seed, None)
        place = f"[{number + 1}/{self.sweep.num_jobs}] {job.name}"
        self.say(f"{place} ...")
        self._leave(number, replace(job, error=BEGUN))
        begin = time.perf_counter()
        try:
            outcome = self.execute(self._configured(composed, config, job), bool(self.sweep.systems))
        except Exception as error:  # a bug of one system must not take the others along
            failed = Job(job.row, job.seed, None, _one_line(error))
            self._leave(number, failed)
            if not isinstance(error, KVPlaneError):
                _keep_traceback(composed)
            print(f"error: {job.name}: {failed.error}", file=sys.stderr)
            return
        if outcome.manifest.get("stopped") == "interrupted":
            raise KeyboardInterrupt
        self._leave(number, Job(job.row, job.seed, outcome.folder))
        summary = outcome.summary
        self.say(f"{place}: {summary.get('completed', 0):,} of {summary.get('num_requests', 0):,} finished, "
                 f"{time.perf_counter() - begin:.1f} s")  # fmt: skip

    def _leave(self, number: int, job: Job) -> None:
        """The outcome of job `number`, for the process that asked for it."""
        text = json.dumps({**asdict(job), "folder": None if job.folder is None else str(job.folder)})
        with replacing(self.outcomes / f"{number:06d}.json") as path:  # whole or not at all: another process reads it
            path.write_text(text, encoding="utf-8")

    def _configured(self, composed: Any, hydra_config: Any, job: Job) -> RunConfig:
        """The job's configuration, with a folder of its own."""
        from omegaconf import OmegaConf, open_dict

        with open_dict(composed):
            composed.run.name = self._folder(composed.run.name, hydra_config, job)
        tree = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
        with open_dict(tree):
            tree.hydra = {"runtime": {"choices": dict(hydra_config.runtime.choices)},
                          "searchpath": list(hydra_config.searchpath)}  # fmt: skip
        return from_composed(tree)

    def _folder(self, name: str | None, hydra_config: Any, job: Job) -> str:
        if self.sweep.systems:
            short = job.row.replace("/", "-").replace(" ", "-") + (f"-s{job.seed}" if job.seed else "")
            return f"{name or 'compare-' + str(dict(hydra_config.runtime.choices)['workload'])}/{short}"
        dirname = str(hydra_config.job.override_dirname)
        own = dirname.replace("/", "-") or "base"
        if name is None:
            return f"sweep/{own}"
        return f"{name}/{own}" if dirname.replace(f"run.name={name}", "") else str(name)


def _composable(sweep: Plan, say: Callable[[str], None]) -> tuple[Plan, list[Job]]:
    """The sweep without the systems that its other keys do not fit, and those as failed jobs.

    Hydra would end the whole sweep with a traceback. A key that fits no system at all is raised, as one line.
    """
    firsts = [_first(text) for text in sweep.arguments
              if "=" in text and _key(text) != "system"
              and (_key(text) == "hydra.searchpath" or not _key(text).startswith("hydra"))]  # fmt: skip
    given = [text for text in sweep.arguments if _key(text) == "system"]
    failed: list[Job] = []
    last: ConfigError | None = None
    for choice in [f"system={name}" for name in sweep.systems] or given or [""]:
        try:
            compose([*firsts, choice] if choice else firsts)
        except ConfigError as error:
            if "no such key" not in str(error) and "unknown" not in str(error):
                continue  # a bad value fails its own job only
            last = error
            failed.append(Job(_value(choice), "", None, str(error)))
    names = [name for name in sweep.systems if name not in [job.row for job in failed]]
    if last is not None and not names:
        raise last
    for job in failed:
        print(f"error: {job.row}: {job.error}", file=sys.stderr)
    if not failed:
        return sweep, []
    arguments = [text for text in sweep.arguments if _key(text) != "system"]
    return Plan((*arguments, f"system={','.join(names)}"), {**sweep.swept, "system": tuple(names)}), failed


def _first(override: str) -> str:
    """The first value of a simple sweep, to check its key: `a=1,2` is `a=1`."""
    key, value = override.split("=", 1)
    return override if any(mark in value for mark in "[{('\"") else f"{key}={value.split(',')[0]}"


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _value(override: str) -> str:
    return override.split("=", 1)[-1]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, KVPlaneError) else f"{type(error).__name__}: {text}"


def _keep_traceback(composed: Any) -> None:
    """Where a bug of ours was raised goes into the job's folder, not onto the screen."""
    folder = Path(str(composed.run.results)) / str(composed.run.name)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
