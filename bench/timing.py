"""How long something takes on a device: rotating inputs, warm-up, medians.

Calls are timed in turns over inputs that together exceed the caches (or are as large as what a model really uses).
On a CPU the clock is the CPU time of the thread: another process that takes the core away does not count.
On CUDA the turns are captured in a graph, so that what is timed is the device and not the launches; where that
fails, they run eagerly between two events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timer:
    """Medians in ns. `budget_s`: wall seconds that one measurement may take, beyond its warm-up."""

    device: torch.device
    budget_s: float = 0.03
    repeats: int = 5

    def median_ns(self, calls: Sequence[Call], eager: bool = False) -> float:
        """Median time of one call, over turns of all of them. `eager`: with launches, also on CUDA."""
        with torch.inference_mode():
            if self.device.type == "cuda":
                return self._on_cuda(calls, eager)
            for call in calls[:2]:
                call()
            return self._on_host(lambda: [call() for call in calls]) / len(calls)

    def _on_host(self, turn: Call) -> float:
        begin = time.thread_time_ns()
        turn()
        once = max(time.thread_time_ns() - begin, 1)
        inner = max(1, min(1000, int(self.budget_s * 1e9 / self.repeats / once)))
        times = []
        for _ in range(self.repeats):
            begin = time.thread_time_ns()
            for _ in range(inner):
                turn()
            times.append((time.thread_time_ns() - begin) / inner)
            if sum(times) * inner > 4e9 * self.budget_s and len(times) >= 3:
                break
        return float(median(times))

    def _on_cuda(self, calls: Sequence[Call], eager: bool) -> float:
        for call in calls[:3]:
            call()
        torch.cuda.synchronize(self.device)
        turn: Call = lambda: [call() for call in calls]  # noqa: E731
        if not eager:
            turn = captured(turn, self.device) or turn
        turn()
        torch.cuda.synchronize(self.device)
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < self.repeats or (time.perf_counter() - begin < self.budget_s and len(times) < 100):
            times.append(self._between_events(turn))
        return float(median(times)) / len(calls)

    def _between_events(self, turn: Call) -> float:
        first: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        turn()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1e6


def captured(turn: Call, device: torch.device) -> Call | None:
    """A CUDA graph of a turn, or None where it cannot be captured."""
    try:
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            turn()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph.replay


def copies_for(num_bytes: int, total_bytes: int, most: int = 64) -> int:
    """How many inputs of `num_bytes` make up `total_bytes`."""
    return max(1, min(most, -(-total_bytes // max(num_bytes, 1))))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product on random data, which is what its rate depends on."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / (Timer(device, 0.2).median_ns([lambda: torch.mm(a, b)]) * 1e-9)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read plus bytes written per second of a copy within the device."""
    a = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2.0 * num_bytes / (Timer(device, 0.2).median_ns([lambda: b.copy_(a)]) * 1e-9)
