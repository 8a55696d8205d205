"""Copies share links fairly, higher priority first (flow level, max-min).

A flow crosses one or two ports (the sender's egress and the receiver's ingress of one medium). Latency is paid once,
before the first byte. Rates change only when a flow starts or ends, so the next completion is known in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Port = tuple[str, int]  # (medium and direction, instance)


class LinkSpec(NamedTuple):
    """Bytes per second and nanoseconds."""

    bandwidth: float
    latency_ns: int


class Flow:
    """Bytes on their way."""

    __slots__ = (
        "done", "not_before", "num_bytes", "piece_bytes", "ports", "priority", "rate", "remaining", "sent", "start_ns",
    )  # fmt: skip

    def __init__(
        self,
        ports: tuple[Port, ...],
        num_bytes: int,
        priority: int,
        not_before: int,
        done: Callable[[int], None],
        piece_bytes: int | None = None,
    ) -> None:
        self.ports = ports
        self.num_bytes = num_bytes
        self.remaining = float(num_bytes)
        self.priority = priority
        self.not_before = not_before
        self.done = done
        self.piece_bytes = piece_bytes
        self.rate = 0.0
        self.sent = False  # every byte is out; it may still have to wait for `not_before`
        self.start_ns = 0


class Network:
    """All flows of a cluster. The owner calls `advance` with the time it was told by `next_ns`."""

    def __init__(self) -> None:
        self.bandwidth: dict[Port, float] = {}
        self._flows: list[Flow] = []
        self._now = 0

    def set_port(self, port: Port, bandwidth: float) -> None:
        """Declare a port's bandwidth in bytes per second."""
        self.bandwidth[port] = bandwidth

    def start(self, now_ns: int, flow: Flow) -> None:
        """Begin a flow; every other flow's rate may change."""
        self._progress(now_ns)
        flow.start_ns = now_ns
        self._flows.append(flow)
        self._share()

    def stop(self, now_ns: int, flow: Flow) -> None:
        """Forget a flow without calling its `done`."""
        self._progress(now_ns)
        if flow in self._flows:
            self._flows.remove(flow)
            self._share()

    def next_ns(self) -> int | None:
        """When the next flow ends or has sent its last byte if no other starts, or None."""
        best: int | None = None
        for flow in self._flows:
            end = flow.not_before if flow.sent else self._sent_ns(flow)
            if best is None or end < best:
                best = end
        return best

    def advance(self, now_ns: int) -> list[Flow]:
        """Remove and return the flows that have ended by now, in order of start. A flow that has sent all its bytes
        but may not end yet (`not_before`) leaves its bandwidth to the others."""
        sent = [flow for flow in self._flows if not flow.sent and self._sent_ns(flow) <= now_ns]
        self._progress(now_ns)
        for flow in sent:
            flow.sent = True
        ended = [flow for flow in self._flows if flow.sent and flow.not_before <= now_ns]
        if ended:
            self._flows = [flow for flow in self._flows if flow not in ended]
        if sent:
            self._share()
        return ended

    def beside(self, ports: tuple[Port, ...]) -> list[Flow]:
        """Flows with bytes to send that cross any of these ports."""
        return [flow for flow in self._flows if not flow.sent and any(port in ports for port in flow.ports)]

    def _sent_ns(self, flow: Flow) -> int:
        if flow.remaining <= 0.0:
            return self._now
        wait = flow.remaining * 1e9 / flow.rate if flow.rate > 0 else 1e18
        return self._now + int(wait + 0.999999)

    def _progress(self, now_ns: int) -> None:
        elapsed = (now_ns - self._now) / 1e9
        if elapsed > 0:
            for flow in self._flows:
                flow.remaining = max(0.0, flow.remaining - flow.rate * elapsed)
        self._now = max(self._now, now_ns)

    def _share(self) -> None:
        sending = [flow for flow in self._flows if not flow.sent]
        left = {port: self.bandwidth[port] for flow in sending for port in flow.ports}
        for priority in sorted({flow.priority for flow in sending}, reverse=True):
            _water_fill([flow for flow in sending if flow.priority == priority], left)


def _water_fill(flows: list[Flow], left: dict[Port, float]) -> None:
    """Max-min fair rates of flows over what is left of each port; reduces `left`."""
    waiting = list(flows)
    while waiting:
        users: dict[Port, int] = {}
        for flow in waiting:
            for port in flow.ports:
                users[port] = users.get(port, 0) + 1
        bottleneck = min(users, key=lambda port: (left[port] / users[port], port))
        rate = max(left[bottleneck] / users[bottleneck], 0.0)
        fixed = [flow for flow in waiting if bottleneck in flow.ports]
        for flow in fixed:
            flow.rate = rate
            for port in flow.ports:
                left[port] = max(left[port] - rate, 0.0)
        waiting = [flow for flow in waiting if bottleneck not in flow.ports]
