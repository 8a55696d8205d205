"""Options of `system=infinite_llm`; the ones that no source gives are ours, and say so in conf/system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError
from common.options import Choice, Kind, Number, Switch, Whole, checked, period_ms, share, shown, time_ms
from common.sched.dispatch import DISPATCH

MODES = ("proactive", "reactive", "debt", "off")
CREDITORS = ("most_free", "random")
MS = 1_000_000
OPTIONS: dict[str, Kind] = {
    "mode": Choice(MODES),
    "dispatch": DISPATCH,
    "pace": Whole(),
    "period_ms": period_ms(),
    "lease_ms": time_ms(),
    "margin_ms": time_ms(),
    "low_share": share(),
    "hysteresis": Number(high=1e6),
    "horizon_iterations": Whole(1),
    "verify_ms": period_ms(),
    "plan_limit": Whole(null=True),
    "locality": Switch(),
    "creditor": Choice(CREDITORS),
    "overlap": Switch(),
    "move_overlap": Switch(),
    "lend_cap": Number(0.0, 1.0, above=True),
    "cpu_share": share(),
    "dgfm": Switch(),
    "dgfm_threshold": Whole(1),
}


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
    """Settings from the keys of conf/system/infinite_llm.yaml, checked."""
    given = checked(options, OPTIONS)
    for name in ("period", "lease", "margin", "verify"):
        if f"{name}_ms" in given:
            given[f"{name}_ns"] = int(given.pop(f"{name}_ms") * MS)
    made = Settings(**given)
    if made.mode == "debt" and made.creditor == "random":
        raise ConfigError("system.creditor=random is an ablation of mode=proactive and reactive, not of debt")
    if made.margin_ns + 3 * made.period_ns > made.lease_ns:
        times = ((key, getattr(made, f"{key}_ns") / MS) for key in ("lease", "margin", "period"))
        told = ", ".join(f"system.{key}_ms={shown(value)}" for key, value in times)
        raise ConfigError(f"{told}: need lease_ms >= margin_ms + 3 x period_ms")
    return made
