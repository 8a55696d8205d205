"""Options of `system=infinite_llm`; the ones that no source gives are ours, and say so in conf/system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError

MODES = ("proactive", "reactive", "debt", "off")
CREDITORS = ("most_free", "random")
MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """See conf/system/infinite_llm.yaml. Times in ns."""

    mode: str = "proactive"
    dispatch: str = "least_outstanding"
    period_ns: int = 1000 * MS  # of heartbeats, renewals and, at most, plans
    lease_ns: int = 60_000 * MS
    margin_ns: int = 20_000 * MS  # a debtor that hears nothing stops using what it borrowed so long before the end
    pace: int = 16  # tokens moved per iteration of the source
    low_share: float = 0.02  # of an instance's blocks: when so few are free, borrow
    hysteresis: float = 0.02  # least gain of a move, as a share of the throughput of both ends
    horizon_iterations: int = 500  # a move must pay within so many
    verify_ns: int = 10_000 * MS  # what a move realised: over so long before the plan and after its end
    plan_limit: int | None = None  # make so many plans and no more: what one more brings is the difference of two runs
    locality: bool = False  # creditors of the same node first (always so in `debt`)
    creditor: str = "most_free"  # random: an ablation; deterministic, by request and plan
    overlap: bool = True  # False, an ablation: the executor runs remote partials after the local one, not beside it
    move_overlap: bool = True  # False, an ablation: the source stands still while its blocks move
    lend_cap: float = 0.5  # v1: share of an instance's blocks that it lends at most
    cpu_share: float = 0.0  # v1: share of the host's memory that is lent as CPU rBlocks
    dgfm: bool = True  # v1: cancel cycles of debt
    dgfm_threshold: int = 4  # v1: blocks that each debt of a cycle must have at least


def from_options(options: Mapping[str, Any]) -> Settings:
    """Settings from the keys of conf/system/infinite_llm.yaml."""
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    for name in ("period", "lease", "margin", "verify"):
        if f"{name}_ms" in given:
            given[f"{name}_ns"] = int(given.pop(f"{name}_ms") * MS)
    known = set(Settings.__dataclass_fields__)
    for key in given:
        if key not in known:
            raise ConfigError(f"system.{key} is unknown for infinite_llm")
    made = Settings(**given)
    _check_names(made)
    for key in ("locality", "overlap", "move_overlap", "dgfm"):
        if not isinstance(getattr(made, key), bool):
            raise ConfigError(f"system.{key}={getattr(made, key)!r}: use true or false")
    if isinstance(made.cpu_share, bool) or not 0 <= made.cpu_share <= 1:
        raise ConfigError(f"system.cpu_share={made.cpu_share!r}: give a number from 0 to 1")
    if not 0 < made.lend_cap <= 1 or made.dgfm_threshold < 1:
        raise ConfigError("system: need 0 < lend_cap <= 1 and dgfm_threshold >= 1")
    if made.plan_limit is not None and made.plan_limit < 0:
        raise ConfigError(f"system.plan_limit={made.plan_limit}: give a number of plans, or null")
    if made.mode == "debt" and made.creditor == "random":
        raise ConfigError("system.creditor=random is an ablation of mode=proactive and reactive, not of debt")
    if made.pace < 0 or min(made.period_ns, made.verify_ns) <= 0 or made.margin_ns + 3 * made.period_ns > made.lease_ns:
        raise ConfigError("system: need pace >= 0, verify_ms > 0 and lease_ms >= margin_ms + 3 x period_ms")
    return made


def _check_names(made: Settings) -> None:
    if made.mode not in MODES:
        raise ConfigError(f"system.mode={made.mode!r} is unknown; choose one of: {', '.join(MODES)}")
    if made.dispatch not in ("round_robin", "least_outstanding"):
        raise ConfigError(
            f"system.dispatch={made.dispatch!r} is unknown; choose one of: round_robin, least_outstanding"
        )
    if made.creditor not in CREDITORS:
        raise ConfigError(f"system.creditor={made.creditor!r} is unknown; choose one of: {', '.join(CREDITORS)}")
