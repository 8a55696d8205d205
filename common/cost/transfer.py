"""Times of moving bytes: links with latency and bandwidth, hops, swaps, parameter loads and start-up.

A link's bandwidth is the wire's times `LINK_EFFICIENCY`, what large point-to-point copies reach; sharing and
priority are the executor's. All times are integer nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.cost.specs import HardwareSpec, ModelSpec

LINK_EFFICIENCY = 0.78  # measured: 232 of 300 GB/s for 55 MB between two A100s (docs/cost-model.md)
Source = Literal["peer", "host", "disk"]


@dataclass(frozen=True, slots=True)
class Link:
    """A directed link: `bandwidth` in bytes/s, one-way latency in ns."""

    bandwidth: float
    latency_ns: int

    def wire_ns(self, num_bytes: int) -> int:
        """Time that the bytes occupy the link."""
        return -int(-num_bytes * 1e9 // self.bandwidth)

    def transfer_ns(self, num_bytes: int) -> int:
        """Latency and wire time of a lone copy; no bytes, no time."""
        return self.latency_ns + self.wire_ns(num_bytes) if num_bytes > 0 else 0


def nvlink(hardware: HardwareSpec) -> Link:
    """Between GPUs of one node."""
    return Link(hardware.nvlink_bandwidth * LINK_EFFICIENCY, hardware.nvlink_latency_ns)


def pcie(hardware: HardwareSpec) -> Link:
    """Between one GPU and its host."""
    return Link(hardware.pcie_bandwidth * LINK_EFFICIENCY, hardware.pcie_latency_ns)


def nic(hardware: HardwareSpec) -> Link:
    """Between nodes, per GPU."""
    return Link(hardware.nic_bandwidth * LINK_EFFICIENCY, hardware.nic_latency_ns)


def disk(hardware: HardwareSpec) -> Link:
    """From local storage; 1 ms to open and seek."""
    return Link(hardware.disk_bandwidth, 1_000_000)


def hop_ns(model: ModelSpec, link: Link, tokens: int) -> int:
    """Hidden states of `tokens` tokens to the next pipeline stage."""
    return link.transfer_ns(model.hidden_bytes(tokens))


def swap_ns(model: ModelSpec, hardware: HardwareSpec, tokens: int, tp: int = 1) -> int:
    """KV of `tokens` tokens between HBM and host DRAM; each of `tp` GPUs moves its share over its own PCIe."""
    return pcie(hardware).transfer_ns(-(-tokens * model.kv_bytes_per_token // tp))


def load_ns(hardware: HardwareSpec, num_bytes: int, source: Source, link: Link | None = None) -> int:
    """Parameters of one GPU from a peer (over `link`, default NVLink), host memory or disk."""
    if source == "peer":
        return (link or nvlink(hardware)).transfer_ns(num_bytes)
    if source == "host":
        return pcie(hardware).transfer_ns(num_bytes)
    return max(disk(hardware).transfer_ns(num_bytes), pcie(hardware).transfer_ns(num_bytes))


def startup_ns(hardware: HardwareSpec, param_bytes: int, source: Source = "disk") -> int:
    """A cold instance: process, CUDA context and graph capture, then its parameters."""
    return hardware.startup_ns + load_ns(hardware, param_bytes, source)
