"""The simulator's links: flows of bytes on the shared network, and the small messages that travel beside them.

Activations, queries and partial results are no flows. Beside copies they wait half a piece where every copy is cut in
pieces (coordinated: after each piece the link looks whether a message waits), else they run at half the bandwidth.
"""

from __future__ import annotations

from common.executors.network import Flow
from common.executors.simstate import BEFORE_LANES, DONE, SimState
from common.types import Event


class Links:
    """Owns the network; everything that sends bytes goes through here."""

    def __init__(self, state: SimState) -> None:
        self.state = state
        self.network = state.cluster.network()
        self._wake = -1
        self._hop_free: dict[tuple[int, int], int] = {}  # (src, dst) -> when the last activation has left

    # ------------------------------------------------------------ messages

    def _wire_ns(self, src: int, dst: int, num_bytes: int) -> int:
        """Time of a message on the wire, without latency."""
        cluster = self.state.cluster
        bandwidth = cluster.link(src, dst).bandwidth
        wire = int(num_bytes * 1e9 / bandwidth)
        pieces = [flow.piece_bytes for flow in self.network.beside(cluster.ports(src, dst))]
        if not pieces:
            return wire
        if None in pieces:
            return 2 * wire
        return wire + int(max(piece or 0 for piece in pieces) / 2 * 1e9 / bandwidth)

    def message_ns(self, src: int, dst: int, num_bytes: int) -> int:
        """From the first byte sent to the last received."""
        return self.state.cluster.link(src, dst).latency_ns + self._wire_ns(src, dst, num_bytes)

    def hop_ns(self, src: int, dst: int, tokens: int) -> int:
        """Activations of `tokens` tokens from one stage to the next. They leave one after the other, so no lane
        overtakes another between two stages."""
        if src == dst:
            return 0
        now = self.state.now
        wire = max(1, self._wire_ns(src, dst, tokens * self.state.cluster.hidden_bytes))
        free = max(now, self._hop_free.get((src, dst), 0)) + wire
        self._hop_free[src, dst] = free
        return free - now + self.state.cluster.link(src, dst).latency_ns

    # ------------------------------------------------------------ flows

    def send(self, flow: Flow, latency_ns: int) -> None:
        """Put a flow on the network after its latency; its `done` is called when it has ended."""
        self.state.push(self.state.now + latency_ns, DONE, BEFORE_LANES, self._starts, flow)

    def stop(self, flow: Flow) -> None:
        """Forget a flow, whether it is still waiting for its latency or half sent."""
        flow.done = _ignore
        self.network.stop(self.state.now, flow)
        self._plan_wake()

    def _starts(self, flow: Flow, _: int) -> Event | None:
        if flow.done is not _ignore:
            self.network.start(self.state.now, flow)
            self._plan_wake()
        return None

    def _plan_wake(self) -> None:
        next_ns = self.network.next_ns()
        if next_ns is not None:
            self._wake = self.state.push(max(next_ns, self.state.now), DONE, BEFORE_LANES, self._woken, None)

    def _woken(self, _: None, sequence: int) -> Event | None:
        if sequence == self._wake:
            for flow in self.network.advance(self.state.now):
                flow.done(self.state.now)
            self._plan_wake()
        return None


def _ignore(_: int) -> None:
    """A flow whose owner is gone."""
