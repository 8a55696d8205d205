"""Small runs in which each system does what it is for, on slices shaped like real traces; any runtime plays them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from common.build_local import choose_device, decoder_spec, local_cluster
from common.comm.hub import Hub
from common.config import RunConfig, compose
from common.driver import drive
from common.executors.replay import ReplayExecutor
from common.log import Line, Recorder
from common.record import RequestColumns, RunRecord
from run import make_executor, served
from systems.registry import ORACLES, make_policy
from tests.dist.pool import shared_hub
from workloads.build import build

COMMON = ("model=tiny_llama", "hardware=cpu", "run.figures=false", "run.trace=false", "workload.max_prompt_tokens=800",
          "workload.overlong=clip", "engine.max_model_len=1024")  # fmt: skip
BURST = ("workload=burst", "workload.duration_s=null", "workload.first_burst_s=0.2", "workload.length_scale=0.25")
STEADY = ("workload=poisson", "workload.length_scale=0.25")
CHATS = ("workload=sessions", "workload.think_mean_s=0.05", "workload.length_scale=0.25", "workload.system_tokens=64")


@dataclass(frozen=True)
class Story:
    """`happened`: what the run's counters must show, by name (`Play.counts`)."""

    system: str
    instances: int
    overrides: tuple[str, ...]
    happened: tuple[str, ...] = ()

    def config(self, *more: str) -> RunConfig:
        return compose([*COMMON, f"system={self.system}", f"cluster.num_instances={self.instances}", *self.overrides,
                        *more])  # fmt: skip


STORIES = {
    "kunserve": Story("kunserve", 2, (
        *BURST, "workload.rate=60", "workload.num_requests=26", "workload.burst_multiplier=4", "engine.kv_blocks=40",
        "system.poll_ms=5", "system.min_pipeline_ms=50", "system.min_serving_ms=10", "system.calm_polls=2",
        "system.restore_usage=0.6"), ("drop", "load", "hidden", "copy")),
    "infinite_llm": Story("infinite_llm", 3, (
        *STEADY, "workload.rate=40", "workload.num_requests=16", "engine.kv_blocks=34", "system.period_ms=20",
        "system.low_share=0.2", "system.pace=64"), ("attention", "copy")),
    "memserve": Story("memserve", 4, (
        *CHATS, "workload.rate=12", "workload.num_requests=20", "engine.kv_blocks=160", "engine.prefix_caching=true",
        "system.roles=1P1D"), ("copy", "cached")),
    "mell": Story("mell", 4, (
        *STEADY, "workload.rate=60", "workload.num_requests=18", "engine.kv_blocks=48", "system.epoch_ms=20",
        "system.migration=kv", "system.cooldown_s=0.2"), ("copy",)),
}  # fmt: skip
BASELINES = {
    "vllm": Story("vllm", 2, (*STEADY, "workload.rate=40", "workload.num_requests=12", "engine.kv_blocks=60")),
    "vllm_pp": Story("vllm_pp", 2, (
        *STEADY, "workload.rate=40", "workload.num_requests=12", "engine.kv_blocks=60"), ("hidden",)),
    "pd": Story("pd", 2, (*STEADY, "workload.rate=20", "workload.num_requests=8", "engine.kv_blocks=80"), ("copy",)),
    "llumnix": Story("llumnix", 2, (
        *STEADY, "workload.rate=80", "workload.num_requests=14", "engine.kv_blocks=40", "system.poll_ms=5"), ("copy",)),
    "infercept": Story("infercept", 2, (
        *STEADY, "workload.rate=60", "workload.num_requests=10", "engine.kv_blocks=30",
        "cluster.host_memory_gb=0.1")),
    "best_fit": Story("best_fit", 3, (
        *STEADY, "workload.rate=40", "workload.num_requests=10", "engine.kv_blocks=40", "system.epoch_ms=20",
        "system.cooldown_s=0.2")),
}

_PACKING = (*STEADY, "workload.rate=60", "workload.num_requests=14", "engine.kv_blocks=48", "system.epoch_ms=20",
            "system.cooldown_s=0.2")  # fmt: skip
MORE_BASELINES = {
    "dcp": Story("dcp", 2, (
        *STEADY, "workload.rate=30", "workload.num_requests=8", "engine.kv_blocks=60"), ("attention",)),
    "static_pp": Story("static_pp", 3, (
        *STEADY, "workload.rate=40", "workload.num_requests=10", "engine.kv_blocks=60"), ("hidden",)),
    **{name: Story(name, 4, _PACKING) for name in ("worst_fit", "first_fit", "load_balance", "load_balance_drain",
                                                   "ffd_repack")},
}  # fmt: skip


@dataclass
class Play:
    """A run that has ended."""

    story: Story
    executor: Any
    record: RunRecord
    policy: Any
    report: dict[str, Any] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def counts(self) -> Counter[str]:
        """What really happened: moves and remaps by kind, bytes by kind of message, prompt tokens found in a cache."""
        found: Counter[str] = Counter(self.record.moves.kind)
        found.update(kind for kind, layers in zip(self.record.remaps.kind, self.record.remaps.layers) if layers)
        traffic = getattr(getattr(self.executor, "world", None), "ordered", {})
        found.update({kind: num for kind, num in traffic.items() if kind != "copies"})
        found["cached"] = int(sum(self.record.requests.cached_tokens))
        return found


@cache
def workload_of(story: Story, *more: str) -> Any:
    config = story.config(*more)
    return served(build(config.workload, config.seed), config.engine.max_model_len)


def play(story: Story, runtime: str, *more: str, hub: Hub | None = None, wrap: Any = None, sink: Any = None) -> Play:
    """Run a story. `wrap`: around the policy; `sink`: of the event log."""
    config = story.config(f"runtime={runtime}", *more)
    workload = workload_of(story, *[one for one in more if one.startswith("workload.")])
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    if runtime == "dist":
        from common.build_dist import dist_executor

        executor: Any = dist_executor(config, workload, record, hub=hub or shared_hub(),
                                      oracle=config.system in ORACLES)  # fmt: skip
    else:
        executor = make_executor(config, workload, record)
    policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
    made = Play(story, executor, record, policy)
    try:
        seen = executor if sink is None else Recorder(executor, sink)
        drive(policy if wrap is None else wrap(policy, executor), seen, record, sample_ns=20_000_000)
        made.report, made.tokens = executor.report(), executor.outputs() or {}
    finally:
        executor.close()
    return made


def replay(story: Story, lines: Iterable[Line], *more: str) -> RunRecord:
    """A fresh policy over a log; ContractError at the first command that is another than the recorded one."""
    config = story.config("runtime=dist", *more)
    info = local_cluster(config, decoder_spec(config, choose_device(config).dtype)).info()
    record = RunRecord(RequestColumns.empty(0))
    drive(make_policy(config.system, info, config.engine, config.system_options), ReplayExecutor(lines), record)
    return record
