"""System name -> policy. Options are the keys of conf/system/<name>.yaml besides `name` and `description`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common.errors import ConfigError
from common.policy import Policy
from common.sched.lane import EngineConfig
from common.types import ClusterInfo
from systems.baselines.vllm import VllmPolicy  # the default; the others are imported when they are asked for

Factory = Callable[[ClusterInfo, EngineConfig, Mapping[str, Any]], Policy]


def _vllm(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    return VllmPolicy(cluster, engine, _dispatch(options))


def _dispatch(options: Mapping[str, Any]) -> Any:
    return _choose(options, "dispatch", "least_outstanding", ("round_robin", "least_outstanding"))


def _vllm_pp(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.vllm_pp import VllmPpPolicy

    stages = options.get("stages", 2)
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ConfigError(f"system.stages={stages!r}: give a whole number of at least 1")
    return VllmPpPolicy(cluster, engine, stages, _dispatch(options))


def _static_pp(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """`vllm_pp` of any depth; null: one pipeline of all instances. bench/static_pp.py picks the best per trace."""
    stages = options.get("stages")
    return _vllm_pp(cluster, engine, {**options, "stages": len(cluster.instances) if stages is None else stages})


def _infinite_kv(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """An oracle: vllm whose executor has been given KV without limit (`system.kv=unlimited`)."""
    _choose(options, "kv", "unlimited", ("unlimited",))
    longest = -(-engine.max_model_len // engine.block_size)
    for info in cluster.instances:
        if info.kv_cells < engine.max_num_seqs * longest * info.num_layers:
            raise ConfigError(f"system=infinite_kv: instance {info.instance} has {info.kv_cells} KV cells, which is a "
                              "limit")  # fmt: skip
    return VllmPolicy(cluster, engine, _dispatch(options))


def _llumnix(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.llumnix import LlumnixConfig, LlumnixPolicy

    migrate, drain = options.get("migrate", True), options.get("drain") or []
    if not isinstance(migrate, bool):
        raise ConfigError(f"system.migrate={migrate!r}: use true or false")
    if not isinstance(drain, list | tuple) or not all(_is_drain(pair) for pair in drain):
        raise ConfigError(f"system.drain={drain!r}: give [[seconds, instance], …], or []")
    config = LlumnixConfig(
        poll_ns=max(1, int(_share(options, "poll_ms", 100, 1e6) * 1e6)),
        threshold=_share(options, "threshold", 3.0, 1e6),
        migrate=migrate,
        drain=tuple((int(seconds * 1e9), instance) for seconds, instance in drain),
    )
    return LlumnixPolicy(cluster, engine, config)


def _is_drain(pair: Any) -> bool:
    return (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], int | float) and pair[0] >= 0
            and isinstance(pair[1], int) and not isinstance(pair[1], bool))  # fmt: skip


def _infercept(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.infercept import InferCeptPolicy
    from systems.baselines.waste import Action

    names = [action.value for action in Action]
    given = options.get("actions", names)
    if not isinstance(given, list | tuple) or "discard" not in given or not set(given) <= set(names):
        raise ConfigError(f"system.actions={given!r}: give a list of {', '.join(names)}; discard must be among them")
    return InferCeptPolicy(cluster, engine, tuple(Action(name) for name in given), _dispatch(options))


def _vllm_single(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.single import SinglePolicy

    if options.get("span") != "cluster":
        raise ConfigError("system.span: vllm_single needs span=cluster")
    return SinglePolicy(cluster, engine)


def _dcp(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.dcp import DcpPolicy

    group = options.get("group")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise ConfigError(f"system.group={group!r}: give a whole number of at least 1, or null")
    return DcpPolicy(cluster, engine, group, _dispatch(options))


def _kunserve(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.kunserve.options import Options
    from systems.kunserve.policy import KunServePolicy

    if engine.prefix_caching:
        raise ConfigError("system=kunserve does not cache prefixes: use engine.prefix_caching=false")
    return KunServePolicy(cluster, engine, Options.of(options))


def _memserve(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.memserve.policy import MemServePolicy

    return MemServePolicy(cluster, engine, options)


def _pd(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """DistServe-style: prefill and decode apart, nothing cached; MemServe's PD-Basic under another name."""
    from systems.memserve.policy import MemServePolicy

    return MemServePolicy(cluster, engine, {**options, "design": "pd_basic"})


def _infinite_llm(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.infinite_llm.policy import InfiniteLlmPolicy
    from systems.infinite_llm.settings import from_options

    return InfiniteLlmPolicy(cluster, engine, from_options(options))


def _choose(options: Mapping[str, Any], key: str, default: str, names: tuple[str, ...]) -> Any:
    value = options.get(key, default)
    if value not in names:
        raise ConfigError(f"system.{key}={value!r} is unknown; choose one of: {', '.join(names)}")
    return value


def _share(options: Mapping[str, Any], key: str, default: float, high: float = 1.0) -> float:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise ConfigError(f"system.{key}={value!r}: give a number from 0 to {high:g}")
    return float(value)


def _fleet(options: Mapping[str, Any]) -> Any:
    from common.sched.plan import FleetConfig

    return FleetConfig(
        epoch_ns=max(1, int(_share(options, "epoch_ms", 500, 1e6) * 1e6)),
        cooldown_ns=int(_share(options, "cooldown_s", 10, 1e6) * 1e9),
        min_instances=int(_share(options, "min_instances", 1, 1e5)),
        watermark=_share(options, "watermark", 0.05, 0.9),
    )


def _mell(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from common.sched.pools import pooled
    from systems.mell.bins import Weights
    from systems.mell.policy import MellConfig, make_mell

    batching = options.get("batching", True)
    if not isinstance(batching, bool):
        raise ConfigError(f"system.batching={batching!r}: use true or false")
    config = MellConfig(
        rules=_choose(options, "rules", "repaired", ("repaired", "paper")),
        migration=_choose(options, "migration", "hybrid", ("hybrid", "kv", "tokens", "off")),
        batching=batching,
        weights=Weights(*(_share(options, f"weight_{name}", 1.0, 1e6) for name in ("free", "requests", "node"))),
        link_share=_share(options, "link_share", 0.5),
        compute_share=_share(options, "compute_share", 0.2),
    )
    fleet = _fleet(options)
    return pooled(cluster, fleet, lambda pool, stock: make_mell(pool, engine, config, fleet, stock))


def _consolidating(name: str) -> Factory:
    def make(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
        from common.sched.pools import pooled
        from systems.baselines.consolidate import make_consolidating

        oracle = name.startswith("oracle_")
        rules = ("oracle",) if oracle else ("preempt", "reserve_max")
        overflow = _choose(options, "overflow", rules[0], rules)
        kind, fleet = name.removeprefix("oracle_"), _fleet(options)
        return pooled(
            cluster, fleet, lambda pool, stock: make_consolidating(kind, pool, engine, fleet, overflow, stock)
        )

    return make


CONSOLIDATING = ("best_fit", "worst_fit", "first_fit", "load_balance", "load_balance_drain", "ffd_repack")
FACTORIES: dict[str, Factory] = {
    "vllm": _vllm,
    "vllm_pp": _vllm_pp,
    "static_pp": _static_pp,
    "infinite_kv": _infinite_kv,
    "llumnix": _llumnix,
    "infercept": _infercept,
    "vllm_single": _vllm_single,
    "dcp": _dcp,
    "kunserve": _kunserve,
    "infinite_llm": _infinite_llm,
    "memserve": _memserve,
    "pd": _pd,
    "mell": _mell,
    **{name: _consolidating(name) for kind in CONSOLIDATING for name in (kind, f"oracle_{kind}")},
}
# Systems that serve several models: a pool for each over one stock of GPUs.
POOLED = ("mell", *CONSOLIDATING, *(f"oracle_{kind}" for kind in CONSOLIDATING))
# Systems that are told true output lengths, and say so.
ORACLES: frozenset[str] = frozenset(f"oracle_{kind}" for kind in CONSOLIDATING)


def check_serves(name: str, num_models: int) -> None:
    """One line for a system that knows one model and is given several."""
    if num_models and name in FACTORIES and name not in POOLED:
        raise ConfigError(f"system={name} serves one model: with cluster.models use one of: {', '.join(POOLED)}")


def make_policy(name: str, cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """A fresh policy for one run."""
    if name not in FACTORIES:
        raise ConfigError(f"system={name} is unknown; choose one of: {', '.join(FACTORIES)}")
    check_serves(name, len(cluster.pools))
    return FACTORIES[name](cluster, engine, options)
