"""ServeGen's clients: per client and ten-minute window a rate and a Gamma or Weibull law of the gaps.

Each client draws from a stream named after it, so leaving clients out changes nothing for the others. In every window
a client is a stationary renewal process (its first gap is a residual one) of exactly the measured rate.
"""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from common.errors import ConfigError, TraceError
from common.rng import stream
from workloads import paths
from workloads.arrivals import NS, check_count
from workloads.config import ServeGen
from workloads.generators import draw_lengths
from workloads.transform import horizon_s
from workloads.types import Floats, Workload, plain

WINDOW_S = 600.0


@dataclass(frozen=True)
class Window:
    start_s: float
    rate: float
    law: str  # Gamma, Weibull, or empty: Poisson
    shape: float


@dataclass(frozen=True)
class Client:
    name: str
    windows: tuple[Window, ...]

    def requests(self, start_s: float, end_s: float) -> float:
        """Expected number of requests in [start, end)."""
        return sum(
            window.rate * max(0.0, min(end_s, window.start_s + WINDOW_S) - max(start_s, window.start_s))
            for window in self.windows
        )


def build_servegen(config: ServeGen, seed: int) -> Workload:
    path = paths.find(config.path)
    end = horizon_s(config)
    assert end is not None
    start_s, end_s = config.start_s, config.start_s + end
    try:
        with tarfile.open(path, "r:gz") as archive:
            clients = list(read_clients(archive, config.path, config.pool, start_s, end_s))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TraceError(f"{config.path}: not a readable .tar.gz of client rates ({error})") from None
    clients.sort(key=lambda client: (-client.requests(start_s, end_s), client.name))
    clients = clients[: config.max_clients]
    measured = sum(client.requests(start_s, end_s) for client in clients) / end
    if measured == 0:
        raise ConfigError(f"workload.start_s={start_s:g}: no client of {config.pool} is active then; choose another")
    factor = 1.0 if config.rate is None else config.rate / measured
    check_count(measured * factor * end, None)  # all clients are drawn until the end, however few requests are kept
    times = [
        client_times(client, start_s, end_s, factor, stream(seed, f"workload.arrivals.{client.name}"))
        for client in clients
    ]
    arrival = np.rint(np.sort(np.concatenate(times), kind="stable") * NS).astype(np.int64)
    if config.num_requests is not None:
        arrival = arrival[: config.num_requests]
    prompt, output, origin = draw_lengths(config, len(arrival), seed)
    why = f"ServeGen {config.pool} ({len(clients)} clients, Apache-2.0); {origin}"
    return plain(config.kind, arrival, prompt, output, config.max_output_tokens, why)


def read_clients(archive: tarfile.TarFile, file: str, pool: str, start_s: float, end_s: float) -> Iterator[Client]:
    """Clients of a pool with the windows that overlap [start, end)."""
    pools: dict[str, None] = {}
    found = False
    for member in archive:
        parts = member.name.split("/")
        if not member.isfile() or not parts[-1].endswith("-trace.csv"):
            continue
        pools[parts[-2] if len(parts) > 1 else ""] = None
        if pool not in parts[:-1]:
            continue
        handle = archive.extractfile(member)
        assert handle is not None
        found = True
        windows = tuple(_windows(handle, f"{file}:{member.name}", start_s, end_s))
        number = re.findall(r"\d+", parts[-1])
        yield Client(f"{pool}.{number[-1] if number else parts[-1]}", windows)
    if not found:
        raise TraceError(f"{file} has no pool {pool!r}; workload.pool may be: {', '.join(sorted(pools)) or 'none'}")


def _windows(handle: IO[bytes], where: str, start_s: float, end_s: float) -> Iterator[Window]:
    """Lines `start,rate,cv,law,shape,scale`; only those of the wanted time are read closely."""
    for number, line in enumerate(handle.read().splitlines(), start=1):
        head = line.partition(b",")[0]
        try:
            begin = float(head)
            if not line.strip() or begin + WINDOW_S <= start_s or begin >= end_s:
                continue
            yield _window(begin, line.decode().split(","))
        except (ValueError, IndexError):
            found = line[:60].decode(errors="replace")
            raise TraceError(
                f"{where}, row {number}: expected start,rate,cv,law,shape,scale, found {found!r}"
            ) from None


def _window(begin: float, fields: list[str]) -> Window:
    rate, law = float(fields[1] or 0), fields[3].strip()
    if not (math.isfinite(rate) and rate >= 0) or law not in ("Gamma", "Weibull", ""):
        raise ValueError
    shape = float(fields[4]) if law else 1.0
    if not 0 < shape < math.inf:
        raise ValueError
    return Window(begin, rate, law, shape)


def client_times(client: Client, start_s: float, end_s: float, factor: float, rng: np.random.Generator) -> Floats:
    """Arrival times of one client, in seconds after `start_s`."""
    parts = [np.empty(0)]
    for window in client.windows:
        begin, end = max(start_s, window.start_s), min(end_s, window.start_s + WINDOW_S)
        rate = window.rate * factor
        if rate > 0 and end > begin:
            parts.append(begin - start_s + stationary(rng, window.law, window.shape, (end - begin) * rate) / rate)
    return np.concatenate(parts)


def stationary(rng: np.random.Generator, law: str, shape: float, total: float) -> Floats:
    """Points before `total` of a stationary unit-rate renewal process."""
    points = np.array([_residual(rng, law, shape)])
    while points[-1] < total:
        size = int(total - points[-1]) + 16
        points = np.concatenate((points, points[-1] + np.cumsum(_gaps(rng, law, shape, size))))
    return points[points < total]


def _gaps(rng: np.random.Generator, law: str, shape: float, num: int) -> Floats:
    if law == "Weibull":
        return rng.weibull(shape, num) / math.gamma(1.0 + 1.0 / shape)
    return rng.standard_gamma(shape, num) / shape


def _residual(rng: np.random.Generator, law: str, shape: float) -> float:
    """The wait for the first point: a uniform part of a length-biased gap."""
    if law == "Weibull":
        biased = float(rng.standard_gamma(1.0 + 1.0 / shape)) ** (1.0 / shape) / math.gamma(1.0 + 1.0 / shape)
    else:
        biased = float(rng.standard_gamma(shape + 1.0)) / shape
    return float(biased * rng.random())
