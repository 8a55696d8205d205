"""Memory-time that each way of handling a preempted request wastes, in tokens of KV x ns (InferCept, section 4).

    discard   T_fwd(C) (C + C_other)     computed again: its own memory and everybody else's wait for it
    preserve  T_wait C                   its memory stands still
    swap      2 T_swap(C) C              its memory stands still on the way out and on the way in

InferCept charges a swap the whole batch's memory, because its batch stands still meanwhile; here transfers run beside
the batch, as its own overlapped swaps do. T_fwd is the fitted form of `common.cost.estimate`, T_swap PCIe's rate behind
what is under way there.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from common.errors import ConfigError


class Action(StrEnum):
    """What becomes of a victim's KV."""

    DISCARD = "discard"
    PRESERVE = "preserve"
    SWAP = "swap"


class Rates(NamedTuple):
    """`alpha` (ns per pair of tokens), `beta` (ns per token), `gamma` (ns per chunk in a batch); PCIe in ns per token
    and per copy."""

    alpha: float
    beta: float
    gamma: float
    swap_token_ns: float
    swap_latency_ns: float

    @classmethod
    def of(cls, extra: Mapping[str, float], token_bytes: float) -> Rates:
        """From `ClusterInfo.extra`."""
        try:
            alpha, beta = extra["cost_alpha"], extra["cost_beta"]
            gamma = extra["cost_gamma"] - extra["cost_lambda"]
            return cls(alpha, beta, gamma, token_bytes * 1e9 / extra["pcie_bandwidth"], extra["pcie_latency_ns"])
        except KeyError as error:
            raise ConfigError(f"system=infercept plans with estimates and has no {error.args[0]}: "
                              "use cost.source=operators") from None  # fmt: skip

    def forward_ns(self, tokens: int) -> float:
        """To compute that many tokens anew, as a chunk in a running batch."""
        return self.alpha * (tokens * tokens + tokens) / 2 + self.beta * tokens + self.gamma

    def swap_ns(self, tokens: int, before: int = 0) -> float:
        """One way, behind `before` tokens under way."""
        return self.swap_latency_ns + self.swap_token_ns * (tokens + before)

    def wastes(self, tokens: int, others: int, wait_ns: float, under_way: int) -> dict[Action, float]:
        """Of a victim with `tokens` of KV beside `others` of the batch, if it could go on after `wait_ns`."""
        swap_ns = self.swap_ns(tokens, under_way) + self.swap_ns(tokens)
        return {
            Action.DISCARD: self.forward_ns(tokens) * (tokens + others),
            Action.PRESERVE: wait_ns * tokens,
            Action.SWAP: swap_ns * tokens,
        }
