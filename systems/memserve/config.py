"""Options of `system=memserve`: designs, roles, transfer modes, policies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.errors import ConfigError
from common.options import (
    LEAST_PERIOD_MS,
    MOST_SECONDS,
    Choice,
    Group,
    Kind,
    Number,
    Switch,
    Whole,
    checked,
    refusal,
    share,
    shown,
    time_s,
)
from systems.memserve.node import ORDERS


class Design(NamedTuple):
    """What is cached where (Table 4). `split`: prefill and decode are different instances. `back`: step 5."""

    split: bool
    prefill_caches: bool
    decode_caches: bool
    back: bool


DESIGNS = {
    "colocated": Design(False, False, False, False),
    "colocated_caching": Design(False, True, True, False),
    "pd_basic": Design(True, False, False, False),
    "pd_caching_1": Design(True, True, False, False),
    "pd_caching_2": Design(True, True, True, False),
    "pd_caching_3": Design(True, True, True, True),
}
MODES = ("by_layer", "by_request", "by_request_agg")
POLICIES = ("round_robin", "least_load", "session", "prompt_tree_longest", "prompt_tree_cost", "mooncake",
            "sglang_router")  # fmt: skip
EVICTIONS = tuple(ORDERS)
ROLES = {"P": "prefill", "D": "decode", "C": "both"}
FORM = "give the form 1P2D (P, D, or C for both in one), a list of prefill, decode and both, or null"


class Roles:
    """Of instances; whether they fit the cluster is told later (`Options.role_of`)."""

    def read(self, name: str, value: Any) -> str | Sequence[str] | None:
        """As given."""
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch("([0-9]{1,6}[PDC])+", value) and re.search("[1-9]", value):
            return value
        if isinstance(value, list | tuple) and all(isinstance(role, str) and role in ROLES.values() for role in value):
            return value
        raise refusal(name, value, FORM)


LINK = Number(0.001)  # GB/s
OPTIONS: dict[str, Kind] = {
    "design": Choice(tuple(DESIGNS)),
    "roles": Roles(),
    "transfer": Choice(MODES),
    "communicators": Whole(1),
    "ordered": Switch(),
    "policy": Choice(POLICIES),
    "fetch": Switch(),
    "guard_s": time_s(null=True),
    "decode_slack": Whole(),
    "tree_ttl_s": time_s(),
    "local_ttl_s": time_s(null=True),
    "eviction": Choice(EVICTIONS),
    "swap": Switch(),
    "swap_low": share(),
    "swap_high": share(),
    "heartbeat_s": Number(LEAST_PERIOD_MS / 1e3, MOST_SECONDS, zero=True),
    "timeout_s": time_s(),
    "restart": Switch(),
    "balancing_threshold": Number(),
    "router_match": share(),
    "router_abs": Whole(),
    "router_rel": Number(),
    "planner": Group({"base_ms": Number(), "token_us": Number(), "pair_ns": Number(), "link_gb_s": LINK,
                      "swap_gb_s": LINK}),
}  # fmt: skip


def num_calls(mode: str, num_blocks: int, num_layers: int, communicators: int) -> int:
    """Network calls of a transfer: 2L per block (K and V of each layer) unless blocks are aggregated; communicators
    issue them side by side."""
    calls = num_blocks if mode == "by_request_agg" else 2 * num_layers * num_blocks
    return -(-calls // communicators)


@dataclass(frozen=True, slots=True)
class Planner:
    """What policies plan with: exec(x, y) = base + token * n + pair * n * (y + n / 2), n = x - y new tokens; wires."""

    base_ms: float = 8.0
    token_us: float = 20.0
    pair_ns: float = 1.0
    link_gb_s: float = 400.0
    swap_gb_s: float = 128.0

    def exec_ns(self, tokens: int, cached: int) -> int:
        """A prefill of `tokens`, the first `cached` of them there already."""
        new = tokens - cached
        return int(self.base_ms * 1e6 + self.token_us * 1e3 * new + self.pair_ns * new * (cached + new / 2))

    def send_ns(self, num_bytes: int) -> int:
        """Eq. 2's left side."""
        return int(num_bytes / self.link_gb_s)

    def swap_ns(self, num_bytes: int) -> int:
        """Between HBM and DRAM."""
        return int(num_bytes / self.swap_gb_s)


@dataclass(frozen=True, slots=True)
class Options:
    """Everything of conf/system/memserve.yaml."""

    design: str = "pd_caching_3"
    roles: str | Sequence[str] | None = None
    transfer: str = "by_request_agg"
    communicators: int = 1
    ordered: bool = False
    policy: str = "prompt_tree_cost"
    fetch: bool = True
    guard_s: float | None = None
    decode_slack: int = 4
    tree_ttl_s: float = 120.0
    local_ttl_s: float | None = None
    eviction: str = "lru"
    swap: bool = True
    swap_low: float = 0.1
    swap_high: float = 0.2
    heartbeat_s: float = 1.0
    timeout_s: float = 3.0
    restart: bool = False
    balancing_threshold: float = 1.2
    router_match: float = 0.5
    router_abs: int = 32
    router_rel: float = 1.1
    planner: Planner = Planner()

    @property
    def revives(self) -> bool:
        """Is there a manager that starts dead instances anew?"""
        return self.restart and self.heartbeat_s > 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """From conf/system/memserve.yaml, checked."""
        values = checked(options, OPTIONS)
        if "planner" in values:
            values["planner"] = Planner(**values["planner"])
        return cls(**values)

    def role_of(self, num_instances: int) -> list[str]:
        """Role by instance: `1P2D` (repeated over the cluster), a list of prefill | decode | both, or halves."""
        split = DESIGNS[self.design].split
        OPTIONS["roles"].read("system.roles", self.roles)
        if self.roles is None:
            half = max(1, num_instances // 2)
            roles = ["prefill"] * half + ["decode"] * (num_instances - half) if split else ["both"] * num_instances
        elif isinstance(self.roles, str):
            parts = re.findall("([0-9]+)([PDC])", self.roles)
            once = [ROLES[kind] for num, kind in parts for _ in range(min(int(num), num_instances))]
            roles = [once[index % len(once)] for index in range(num_instances)]
        else:
            roles = [str(role) for role in self.roles]
        bad = len(roles) != num_instances or any(role not in ROLES.values() for role in roles)
        if bad or (not split and set(roles) != {"both"}):
            raise ConfigError(f"system.roles={shown(self.roles)} does not fit {num_instances} instances of "
                              f"{self.design}")  # fmt: skip
        if "both" not in roles and len(set(roles)) < 2:
            raise ConfigError(f"system.roles={shown(self.roles)}: {self.design} needs prefill and decode instances "
                              f"among these {num_instances}, or both in one")  # fmt: skip
        return roles
