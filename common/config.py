"""The only door to Hydra: composed configuration becomes frozen dataclasses once, and unknown keys are errors.

No `DictConfig` travels further than this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from common.cost.engine import EngineTraits, engine_traits
from common.cost.profiles import grid_beside, with_profile
from common.cost.specs import HardwareSpec, ModelSpec, from_hf_config, load_hardware, load_model
from common.errors import ConfigError
from common.metrics import Slo
from common.runtime_config import RuntimeConfig
from common.sched.lane import EngineConfig
from common.types import Rule
from workloads.config import WorkloadConfig
from workloads.config import from_mapping as load_workload

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
MAX_NUM_SEQS = 1024  # unless given: high enough that KV memory binds first
MAX_INSTANCES = 100_000
GROUPS = ("system", "workload", "model", "hardware", "cluster", "runtime", "logger", "experiment")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where results go and what is drawn."""

    name: str | None
    results: str
    figures: bool
    trace: bool
    sample_ms: float | None


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Instances of `tp` GPUs, the first `num_running` of which run from the start; a node has `gpus_per_node` GPUs.
    `tps`: GPUs of each instance where they differ (`tp` is then the most); (): all alike.
    `lost`: (seconds, instance). `lost_agents`: (seconds, name, seconds until it is back). `message_faults`: (mean extra
    delay in ms, share lost, share doubled). `models`: names in conf/model that share the GPUs, in place of `model`.
    `remap_ms`: what a drop or a load of layers pays for remapping pages, however many layers."""

    num_instances: int
    num_running: int  # from the start
    tp: int
    gpus_per_node: int
    lost: tuple[tuple[float, int], ...]
    lost_agents: tuple[tuple[float, str, float], ...]
    message_faults: tuple[float, float, float] | None
    control_ms: float
    frontend_ms: float
    host_memory_gb: float | None
    models: tuple[str, ...] = ()
    remap_ms: float = 5.0
    tps: tuple[int, ...] = ()

    @property
    def num_gpus(self) -> int:
        """Of all instances."""
        return sum(self.tps) if self.tps else self.num_instances * self.tp


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What else to record."""

    events: bool
    segments: bool
    outputs: bool


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One run, complete."""

    system: str
    system_options: Mapping[str, Any]
    workload_name: str
    workload: WorkloadConfig
    model: ModelSpec  # with several, the first
    models: tuple[ModelSpec, ...]  # of cluster.models; (): only `model`
    hardware: HardwareSpec
    cluster: ClusterConfig
    engine: EngineConfig
    kv_blocks: int | None
    gpu_memory_utilization: float
    cost_source: str
    traits: EngineTraits
    slo: Slo
    runtime: RuntimeConfig
    logger: str
    logger_options: Mapping[str, Any]
    log: LogOptions
    run: RunOptions
    seed: int
    yaml: str

    @property
    def run_name(self) -> str:
        """The results folder's name."""
        if self.run.name:
            return self.run.name
        return f"{self.system}-{self.workload_name}-{self.model.name.lower()}-s{self.seed}"


def compose(overrides: Sequence[str]) -> RunConfig:
    """Compose conf/ with command-line overrides. Raises ConfigError, one line, on anything that is not there."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", overrides=with_profile(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, overrides)) from None
    return from_composed(composed)


def from_composed(composed: Any) -> RunConfig:
    """A RunConfig from Hydra's DictConfig (composed with its `hydra` node)."""
    from omegaconf import OmegaConf

    choices = dict(composed.hydra.runtime.choices)
    _check_experiment(choices.get("experiment"), composed.hydra.searchpath)
    own = OmegaConf.masked_copy(composed, [key for key in composed if key not in ("hydra", "description")])
    tree = OmegaConf.to_container(own, resolve=True)
    assert isinstance(tree, dict)
    hardware = tree.get("hardware")
    if isinstance(hardware, dict) and "grid" in hardware:
        hardware["grid"] = grid_beside(str(choices["hardware"]), hardware["grid"], composed.hydra.searchpath)
    return build(tree, {group: choices.get(group) for group in GROUPS})  # type: ignore[arg-type]


def build(tree: dict[str, Any], choices: Mapping[str, str | None]) -> RunConfig:
    """A RunConfig from plain mappings; `choices` are the names picked in each config group."""
    import yaml

    _check_keys(tree, choices)
    text = yaml.safe_dump(tree, sort_keys=True, allow_unicode=True)
    system = _without(tree["system"], "description", "not_for")
    model = dict(tree["model"])
    runtime = RuntimeConfig.from_mapping(_without(tree["runtime"], "description"))
    hf_config = model.pop("hf_config", None) or runtime.weights
    cluster = _cluster(_without(tree["cluster"], "description"))
    specs = _models(cluster.models, hf_config)
    if specs:
        spec = specs[0]
    elif hf_config:
        spec = from_hf_config(str(hf_config), any_dtype=runtime.weights is not None)
    else:
        spec = load_model(_without(model, "description"))
    engine, hardware = tree["engine"], load_hardware(_without(tree["hardware"], "description"))
    return RunConfig(
        system=system.pop("name"),
        system_options=system,
        workload_name=_workload_name(tree["workload"], choices.get("workload")),
        workload=load_workload(tree["workload"]),
        model=spec,
        models=specs,
        hardware=hardware,
        cluster=cluster,
        engine=_engine(engine, min(model.max_position for model in specs or (spec,))),
        kv_blocks=_optional_int("engine.kv_blocks", engine["kv_blocks"]),
        gpu_memory_utilization=_utilization(engine["gpu_memory_utilization"]),
        cost_source=_choice("cost.source", tree["cost"]["source"], ("operators", "vidur")),
        traits=engine_traits(tree["cost"]["traits"], hardware),
        slo=Slo(_maybe("slo.ttft_ms", tree["slo"]["ttft_ms"]), _maybe("slo.tpot_ms", tree["slo"]["tpot_ms"])),
        runtime=runtime,
        logger=tree["logger"]["kind"],
        logger_options=_without(tree["logger"], "kind", "description"),
        log=_log_options(tree["log"], runtime.name),
        run=_run_options(tree["run"]),
        seed=_integer("seed", tree["seed"], 0),
        yaml=text,
    )


def _check_experiment(name: str | None, folders: Sequence[str]) -> None:
    """`optional experiment` lets Hydra pass over one that is not there: the run would be another than was asked for."""
    places = (CONF, *(Path(folder.removeprefix("file://")) for folder in folders))
    if name is not None and not any((place / "experiment" / f"{name}.yaml").is_file() for place in places):
        raise ConfigError(f"experiment={name}: unknown experiment; choose one of: {', '.join(available('experiment'))}")


def of_run(folder: Path) -> RunConfig:
    """The configuration of a run, from what it left in its folder. ConfigError where this version has no such one."""
    import yaml

    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ConfigError("not a mapping")
        return build(tree, {})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ConfigError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: no configuration of this version ({error!r:.200})") from error


def _log_options(tree: Mapping[str, Any], runtime: str) -> LogOptions:
    """What a run of real processes did cannot be had by running it again: its events are logged unless told not to."""
    chosen = {**tree, "events": runtime == "dist" if tree["events"] is None else tree["events"]}
    return LogOptions(**{key: _flag(f"log.{key}", value) for key, value in chosen.items()})


def available(group: str) -> dict[str, str]:
    """Names in a config group and their one-line descriptions, for --help."""
    import yaml

    found: dict[str, str] = {}
    for path in sorted((CONF / group).rglob("*.yaml")):
        mapping = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        name = path.relative_to(CONF / group).with_suffix("").as_posix()
        found[name] = str(mapping.get("description", ""))
    return found


# ---------------------------------------------------------------- checks


def _workload_name(tree: Mapping[str, Any], chosen: str | None) -> str:
    """The chosen config's name; for a trace, the file's."""
    if tree["kind"] == "file" and tree.get("path"):
        return Path(str(tree["path"])).stem
    return chosen or str(tree["kind"])


@cache
def _base() -> dict[str, Any]:
    """conf/config.yaml as it stands, read once."""
    import yaml

    tree: dict[str, Any] = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    return tree


def _check_keys(tree: Mapping[str, Any], choices: Mapping[str, str | None]) -> None:
    """Keys added with Hydra's `+` are as unknown as mistyped ones (other groups check their own)."""
    import yaml

    base = _base()
    known = [*(key for key in base if key not in ("defaults", "hydra")), *GROUPS]
    for key, section in tree.items():
        if key not in known:
            raise ConfigError(f"{key} is unknown; known: {', '.join(known)}")
        if (key in GROUPS or isinstance(base.get(key), dict)) and not (isinstance(section, dict) and section):
            raise ConfigError(f"{key}={section!r}: this is a group of keys (see conf/)")
        if isinstance(base.get(key), dict):
            _same_keys(key, section, base[key])
    _present("", tree, [key for key in known if key != "experiment"])
    for group in ("system", "cluster", "logger"):
        file = CONF / group / f"{choices.get(group)}.yaml"
        if file.is_file():  # one of a folder of the user's own speaks for itself
            _same_keys(group, tree[group], yaml.safe_load(file.read_text(encoding="utf-8")))
    _present("runtime.", tree["runtime"], ["name"])


def _same_keys(section: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Keys that Hydra's `+` added or its `~` took away are named."""
    names = [name for name in known if name not in ("description", "not_for", "defaults")]
    for name in given:
        if name not in known:
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {section}.{close[0]}? " if close else ""
            raise ConfigError(f"{section}.{name} is unknown; {hint}known: {', '.join(names)}")
    _present(f"{section}.", given, names)


def _present(prefix: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    gone = next((name for name in names if name not in given), None)
    if gone is not None:
        raise ConfigError(f"{prefix}{gone} is missing; without ~{prefix}{gone} it has its default")


def _cluster(tree: dict[str, Any]) -> ClusterConfig:
    instances = _integer("cluster.num_instances", tree["num_instances"], 1)
    if instances > MAX_INSTANCES:
        raise ConfigError(f"cluster.num_instances={instances}: at most {MAX_INSTANCES:,} instances are simulated")
    running = instances if tree["num_running"] is None else _integer("cluster.num_running", tree["num_running"], 0)
    if running > instances:
        raise ConfigError(f"cluster.num_running={running} exceeds cluster.num_instances={instances}")
    tp, tps = _tp(tree["tp"], instances)
    per_node = _integer("cluster.gpus_per_node", tree["gpus_per_node"], 1)
    if tp > per_node:
        raise ConfigError(f"cluster.tp={tp} exceeds cluster.gpus_per_node={per_node}: an instance spans one node")
    lost = _lost(tree["lost"], instances)
    control = _number("cluster.control_ms", tree["control_ms"])
    frontend = _number("cluster.frontend_ms", tree["frontend_ms"])
    host = None if tree["host_memory_gb"] is None else _number("cluster.host_memory_gb", tree["host_memory_gb"])
    agents, messages = _lost_agents(tree["lost_agents"]), _message_faults(tree["message_faults"])
    models = tree["models"]
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise ConfigError(f"cluster.models={models!r}: give a list of names in conf/model, or []")
    if tps and models:
        raise ConfigError(f"cluster.tp={list(tps)} with cluster.models: instances of several models have one tp")
    return ClusterConfig(instances, running, tp, per_node, lost, agents, messages, control, frontend, host,
                         tuple(models), _number("cluster.remap_ms", tree["remap_ms"]), tps)  # fmt: skip


def _tp(value: object, instances: int) -> tuple[int, tuple[int, ...]]:
    """A number for all instances, or a list of one for each: the most, and each where they differ."""
    if not isinstance(value, list):
        return _integer("cluster.tp", value, 1), ()
    if len(value) != instances:
        raise ConfigError(f"cluster.tp={value!r}: give a number, or one for each of the {instances} instances")
    each = tuple(_integer("cluster.tp", one, 1) for one in value)
    return max(each), each if len(set(each)) > 1 else ()


def _models(names: Sequence[str], hf_config: object) -> tuple[ModelSpec, ...]:
    """The models that share a cluster: none, or at least two different ones of conf/model."""
    import yaml

    known = available("model") if names else {}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"cluster.models: unknown model {unknown}; choose from: {', '.join(known)}")
    if names and (len(names) < 2 or len(set(names)) < len(names)):
        raise ConfigError(f"cluster.models={list(names)}: give two or more different models, or [] and model=")
    if names and hf_config:
        raise ConfigError("cluster.models is for names in conf/model: leave model.hf_config and runtime.weights null")
    files = (CONF / "model" / f"{name}.yaml" for name in names)
    trees = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    return tuple(load_model(_without(tree, "description", "hf_config")) for tree in trees)


def _lost(value: object, instances: int) -> tuple[tuple[float, int], ...]:
    way_out = f"cluster.lost={value!r}: give [[seconds, instance], …] of the {instances} instances, or []"
    if not isinstance(value, list):
        raise ConfigError(way_out)
    found = []
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int) and 0 <= pair[1] < instances):
            raise ConfigError(way_out)
        found.append((_number("cluster.lost (seconds)", pair[0]), pair[1]))
    return tuple(found)


def _lost_agents(value: object) -> tuple[tuple[float, str, float], ...]:
    way_out = f"cluster.lost_agents={value!r}: give [[seconds, agent's name, seconds until it is back], …], or []"
    if not isinstance(value, list):
        raise ConfigError(way_out)
    found = []
    for triple in value:
        if not (isinstance(triple, list) and len(triple) == 3 and isinstance(triple[1], str) and triple[1]):
            raise ConfigError(way_out)
        at_s, restart_s = (_number("cluster.lost_agents (seconds)", seconds) for seconds in (triple[0], triple[2]))
        found.append((at_s, triple[1], restart_s))
    return tuple(found)


def _message_faults(value: object) -> tuple[float, float, float] | None:
    keys = ("delay_ms", "loss", "duplicate")
    if value is None:
        return None
    if not isinstance(value, dict) or any(key not in keys for key in value):
        raise ConfigError(f"cluster.message_faults={value!r}: give {{delay_ms: 0, loss: 0, duplicate: 0}}, or null")
    return (
        _number("cluster.message_faults.delay_ms", value.get("delay_ms", 0.0)),
        _number("cluster.message_faults.loss", value.get("loss", 0.0), high=1.0),
        _number("cluster.message_faults.duplicate", value.get("duplicate", 0.0), high=1.0),
    )


def _engine(tree: Mapping[str, Any], window: int) -> EngineConfig:
    names = tuple(rule.value for rule in Rule)
    rule = Rule(_choice("engine.scheduler", tree["scheduler"], names))
    longest = _optional_int("engine.max_model_len", tree["max_model_len"]) or window
    budget = _optional_int("engine.max_num_batched_tokens", tree["max_num_batched_tokens"])
    if budget is None:
        defaults = {Rule.PREFILL_FIRST: max(longest, 2048), Rule.PREFILL_FIRST_LEGACY: 4096}
        budget = defaults.get(rule, 2048)
    given = _optional_int("engine.max_num_seqs", tree["max_num_seqs"])
    seqs = min(MAX_NUM_SEQS, budget) if given is None else given
    if rule in (Rule.CHUNKED, Rule.SARATHI) and budget < seqs:
        raise ConfigError(
            f"engine.max_num_batched_tokens={budget} must be at least engine.max_num_seqs={seqs}: "
            "every running request takes a token"
        )
    watermark = tree["watermark"]
    if watermark is None:
        watermark = 0.0 if rule is Rule.CHUNKED else 0.01
    watermark = _number("engine.watermark", watermark, high=0.9)
    return EngineConfig(
        block_size=_integer("engine.block_size", tree["block_size"], 1),
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        rule=rule,
        prefix_caching=_flag("engine.prefix_caching", tree["prefix_caching"]),
        watermark=watermark,
        max_leap=_optional_int("engine.max_leap", tree["max_leap"]),
        max_model_len=longest,
    )


def _run_options(tree: Mapping[str, Any]) -> RunOptions:
    sample_ms = _maybe("run.sample_ms", tree["sample_ms"])
    if sample_ms is not None and sample_ms <= 0:
        raise ConfigError(f"run.sample_ms={sample_ms:g}: give a period above 0 ms, or null")
    name = None if tree["name"] is None else str(tree["name"])
    return RunOptions(name, str(tree["results"]), _flag("run.figures", tree["figures"]),
                      _flag("run.trace", tree["trace"]), sample_ms)  # fmt: skip


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r}: use true or false")
    return value


def _without(tree: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


def _integer(key: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{key}={value!r}: give a whole number of at least {low}")
    return value


def _optional_int(key: str, value: object) -> int | None:
    return None if value is None else _integer(key, value, 1)


def _number(key: str, value: object, low: float = 0.0, high: float = 1e9) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{key}={value!r}: give a number from {low:g} to {high:g}")
    return float(value)


def _utilization(value: object) -> float:
    share = _number("engine.gpu_memory_utilization", value, high=1.0)
    if not share:
        raise ConfigError(f"engine.gpu_memory_utilization={value!r}: give a share above 0, up to 1")
    return share


def _maybe(key: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ConfigError(f"{key}={value!r}: give a number, or null")
    return float(value)


def _choice(key: str, value: object, names: Sequence[str]) -> str:
    if value not in names:
        raise ConfigError(f"{key}={value!r} is unknown; choose one of: {', '.join(names)}")
    return str(value)


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message on one line, led by the override at fault where it can be told."""
    text = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    if unknown:
        key = unknown.group(1) or unknown.group(2)
        given = next((o for o in overrides if o.lstrip("+~").split("=")[0].endswith(key)), key)
        close = get_close_matches(key.split(".")[-1], _keys_near(key, overrides), n=1)
        hint = f"; did you mean {'.'.join([*key.split('.')[:-1], close[0]])}?" if close else ""
        return f"{given}: there is no such key{hint} (keys: conf/config.yaml and conf/<group>/<name>.yaml)"
    for group in GROUPS:
        for override in overrides:
            if override.startswith(f"{group}=") and (f"'{group}/" in text or "Could not find" in text):
                name = override.split("=", 1)[1]
                if name not in available(group):
                    return f"{override}: unknown {group}; choose one of: {', '.join(available(group))}"
    return text


def _keys_near(key: str, overrides: Sequence[str]) -> list[str]:
    """Keys beside a mistyped one, from the group file or section that it belongs to."""
    import yaml

    group = key.split(".")[0]
    files = [CONF / "config.yaml"]
    if group in GROUPS:
        chosen = next((o.split("=", 1)[1] for o in overrides if o.startswith(f"{group}=")), None)
        files = [CONF / group / f"{chosen}.yaml"] if chosen else sorted((CONF / group).glob("*.yaml"))
    found: list[str] = []
    for file in files:
        if file.is_file():
            tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            section = tree if group in GROUPS or "." not in key else tree.get(group, {})
            found += [str(name) for name in section or {}]
    return found
