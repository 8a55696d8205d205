"""System name -> policy. Options are the keys of conf/system/<name>.yaml besides `name` and `description`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common.errors import ConfigError
from common.policy import Policy
from common.sched.lane import EngineConfig
from common.types import ClusterInfo

Factory = Callable[[ClusterInfo, EngineConfig, Mapping[str, Any]], Policy]


def _vllm(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.vllm import VllmPolicy

    dispatch = options.get("dispatch", "least_outstanding")
    if dispatch not in ("round_robin", "least_outstanding"):
        raise ConfigError(f"system.dispatch={dispatch!r} is unknown; choose one of: round_robin, least_outstanding")
    return VllmPolicy(cluster, engine, dispatch)


def _vllm_single(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.single import SinglePolicy

    if options.get("span") != "cluster":
        raise ConfigError("system.span: vllm_single needs span=cluster")
    return SinglePolicy(cluster, engine)


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
    return make_mell(cluster, engine, config, _fleet(options))


def _consolidating(name: str) -> Factory:
    def make(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
        from systems.baselines.consolidate import make_consolidating

        oracle = name.startswith("oracle_")
        rules = ("oracle",) if oracle else ("preempt", "reserve_max")
        overflow = _choose(options, "overflow", rules[0], rules)
        return make_consolidating(name.removeprefix("oracle_"), cluster, engine, _fleet(options), overflow)

    return make


CONSOLIDATING = ("best_fit", "worst_fit", "first_fit", "load_balance", "load_balance_drain", "ffd_repack")
FACTORIES: dict[str, Factory] = {
    "vllm": _vllm,
    "vllm_single": _vllm_single,
    "kunserve": _kunserve,
    "infinite_llm": _infinite_llm,
    "memserve": _memserve,
    "pd": _pd,
    "mell": _mell,
    **{name: _consolidating(name) for kind in CONSOLIDATING for name in (kind, f"oracle_{kind}")},
}
# Systems that are told true output lengths, and say so.
ORACLES: frozenset[str] = frozenset(f"oracle_{kind}" for kind in CONSOLIDATING)


def make_policy(name: str, cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """A fresh policy for one run."""
    if name not in FACTORIES:
        raise ConfigError(f"system={name} is unknown; choose one of: {', '.join(FACTORIES)}")
    return FACTORIES[name](cluster, engine, options)
