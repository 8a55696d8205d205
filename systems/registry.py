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


FACTORIES: dict[str, Factory] = {
    "vllm": _vllm, "kunserve": _kunserve, "memserve": _memserve, "pd": _pd,
    "infinite_llm": _infinite_llm,
}
ORACLES: frozenset[str] = frozenset()  # systems that are told true output lengths, and say so


def make_policy(name: str, cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """A fresh policy for one run."""
    if name not in FACTORIES:
        raise ConfigError(f"system={name} is unknown; choose one of: {', '.join(FACTORIES)}")
    return FACTORIES[name](cluster, engine, options)
