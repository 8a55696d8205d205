"""System name -> policy, and the kinds of its options: the keys of conf/system/<name>.yaml besides `name` and
`description`. What is not of its kind is refused in one line (`common.options`): factories are given legal values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from common.errors import ConfigError
from common.options import Choice, Kind, Whole, checked, refusal, shown
from common.policy import Policy
from common.sched.dispatch import DISPATCH
from common.sched.lane import EngineConfig
from common.sched.plan import FLEET, FleetConfig
from common.types import ClusterInfo
from systems.baselines.vllm import VllmPolicy  # the default; the others are imported when they are asked for

Factory = Callable[[ClusterInfo, EngineConfig, Mapping[str, Any]], Policy]
Kinds = Mapping[str, Kind]
VLLM: Kinds = {"dispatch": DISPATCH}


def _vllm(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    return VllmPolicy(cluster, engine, **options)


def _vllm_pp(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.vllm_pp import VllmPpPolicy

    return VllmPpPolicy(cluster, engine, **options)


def _static_pp(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """`vllm_pp` of any depth; null: one pipeline of all instances. bench/static_pp.py picks the best per trace."""
    return _vllm_pp(cluster, engine, {**options, "stages": options.get("stages") or len(cluster.instances)})


def _infinite_kv(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """An oracle: vllm whose executor has been given KV without limit (`system.kv=unlimited`)."""
    longest = -(-engine.max_model_len // engine.block_size)
    for info in cluster.instances:
        if info.kv_cells < engine.max_num_seqs * longest * info.num_layers:
            raise ConfigError(f"system=infinite_kv: instance {info.instance} has {info.kv_cells} KV cells, which is a "
                              "limit")  # fmt: skip
    return VllmPolicy(cluster, engine, **{key: options[key] for key in VLLM if key in options})


def _llumnix(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.llumnix import LlumnixConfig, LlumnixPolicy

    return LlumnixPolicy(cluster, engine, LlumnixConfig.of(options))


def _infercept(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.infercept import InferCeptPolicy

    return InferCeptPolicy(cluster, engine, **options)


def _vllm_single(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.single import SinglePolicy

    if "span" not in options:
        raise ConfigError("system.span is missing: vllm_single needs span=cluster")
    return SinglePolicy(cluster, engine)


def _dcp(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from systems.baselines.dcp import DcpPolicy

    return DcpPolicy(cluster, engine, **options)


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


def _mell(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    from common.sched.pools import pooled
    from systems.mell.policy import MellConfig, make_mell

    config, fleet = MellConfig.of(options), FleetConfig.of(options)
    return pooled(cluster, fleet, lambda pool, stock: make_mell(pool, engine, config, fleet, stock))


def _overflow(name: str) -> tuple[str, ...]:
    """Rules of a packer; the first is the default."""
    return ("oracle",) if name.startswith("oracle_") else ("preempt", "reserve_max")


def _consolidating(name: str) -> Factory:
    def make(cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
        from common.sched.pools import pooled
        from systems.baselines.consolidate import make_consolidating

        overflow: Any = options.get("overflow", _overflow(name)[0])
        kind, fleet = name.removeprefix("oracle_"), FleetConfig.of(options)
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
# Kinds of options, or the module whose `OPTIONS` they are: it is imported when it is asked for.
KINDS: dict[str, Kinds | str] = {
    "vllm": VLLM,
    "vllm_pp": {"stages": Whole(1), **VLLM},
    "static_pp": {"stages": Whole(1, null=True), **VLLM},
    "infinite_kv": {"kv": Choice(("unlimited",)), **VLLM},
    "llumnix": "systems.baselines.llumnix",
    "infercept": "systems.baselines.infercept",
    "vllm_single": {"span": Choice(("cluster",))},
    "dcp": {"group": Whole(1, null=True), **VLLM},
    "kunserve": "systems.kunserve.options",
    "infinite_llm": "systems.infinite_llm.settings",
    "memserve": "systems.memserve.config",
    "pd": "systems.memserve.config",
    "mell": "systems.mell.policy",
    **{name: {"overflow": Choice(_overflow(name)), **FLEET}
       for kind in CONSOLIDATING for name in (kind, f"oracle_{kind}")},
}  # fmt: skip
# Systems that serve several models: a pool for each over one stock of GPUs.
POOLED = ("mell", *CONSOLIDATING, *(f"oracle_{kind}" for kind in CONSOLIDATING))
# Systems that are told true output lengths, and say so.
ORACLES: frozenset[str] = frozenset(f"oracle_{kind}" for kind in CONSOLIDATING)


def check_serves(name: str, num_models: int) -> None:
    """One line for a system that knows one model and is given several."""
    if num_models and name in FACTORIES and name not in POOLED:
        raise ConfigError(f"system={name} serves one model: with cluster.models use one of: {', '.join(POOLED)}")


def legal_options(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """A system's own options, each of its kind; ConfigError, one line, on a system or a value that cannot be used."""
    if name not in FACTORIES:
        raise ConfigError(f"system={shown(name)} is unknown; choose one of: {', '.join(FACTORIES)}")
    other = options.get("against")
    if other is not None and not (isinstance(other, str) and other):
        raise refusal("system.against", other, "give the name of a system (conf/system), or null")
    own = {key: value for key, value in options.items() if key != "against"}  # another run's, not the policy's
    kinds = KINDS.get(name)
    if kinds is None:  # a system of the user's own that declares nothing reads its options itself
        return own
    return checked(own, import_module(kinds).OPTIONS if isinstance(kinds, str) else kinds)


def make_policy(name: str, cluster: ClusterInfo, engine: EngineConfig, options: Mapping[str, Any]) -> Policy:
    """A fresh policy for one run."""
    own = legal_options(name, options)
    check_serves(name, len(cluster.pools))
    return FACTORIES[name](cluster, engine, own)
