"""The policy's end of all workers: gives orders in one global order, waits for answers, notices who is gone."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from common.comm import messages as say
from common.comm.join import Door, join_groups, store_of, under_torchrun
from common.comm.worker import start_worker
from common.errors import ConfigError, ContractError, KVPlaneError

HOST = "127.0.0.1"
WORKER: Callable[[dict[str, str]], None] = start_worker
FORKS = get_context("forkserver")  # one process imports torch, and all workers of this machine are forked from it
FORKS.set_forkserver_preload(["common.comm.worker"])


class Timeouts(NamedTuple):
    """In seconds, as `conf/runtime/dist.yaml` names them."""

    start_s: float = 60.0
    reply_s: float = 60.0
    transfer_s: float = 60.0
    heartbeat_s: float = 20.0


class Process(Protocol):
    """A worker's, however it was started."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None: ...

    def kill(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


class Launcher(Protocol):
    """Starts workers elsewhere than on this machine (`common.comm.ray_launch`)."""

    host: str  # where workers find this process

    def start(self, environments: Mapping[int, Mapping[str, str]], teams: Sequence[Sequence[int]]) -> dict[int, Any]:
        """A `Process` for each rank, with these variables; those of a team on one node."""

    def gone(self) -> dict[int, str]:
        """Who has ended, and how, as far as it is known; asked often."""

    def close(self) -> None:
        """Give everything back."""


class Gone(Exception):
    """A worker is gone, and an answer will not come."""


def _readable(connections: list[Connection], timeout_s: float) -> list[Any]:
    """Those that have something, waiting at most so long: exactly, as `wait` rounds up to whole milliseconds and what
    is due next would be late by half of one. Beyond 1,024 descriptors only `wait` can."""
    try:
        return select.select(connections, [], [], timeout_s)[0]
    except ValueError:
        return wait(connections, timeout_s)


class Hub:
    """Starts the workers (or meets those of torchrun), and ends them: one for each rank of each instance, in order."""

    def __init__(
        self, num_workers: int, timeouts: Timeouts | None = None, backend: str = "gloo", piece_bytes: int = 1 << 18,
        tps: Sequence[int] = (), launcher: Launcher | None = None,
    ) -> None:  # fmt: skip
        """`tps`: workers of each instance; (): one. `launcher`: of processes; None: torchrun's, or our own forks. The
        hub closes it."""
        self._launcher = launcher
        self.num_workers = num_workers
        tps = tuple(tps) or (1,) * num_workers
        assert sum(tps) == num_workers, f"instances of {tps} ranks on {num_workers} workers"
        self.teams = tuple(tuple(range(end - tp + 1, end + 1)) for tp, end in zip(tps, accumulate(tps)))
        self.instance_of = {rank: index for index, team in enumerate(self.teams) for rank in team}
        self.timeouts = timeouts or Timeouts()
        self.backend, self.piece_bytes = backend, piece_bytes
        self.lost: dict[int, str] = {}  # rank -> how it was noticed
        self.processes: dict[int, Process] = {}
        self.beats: dict[int, say.Beat] = {}  # what each has sent and received, by its own last word
        self.arrived: Callable[[int, int], None] | None = None  # told (rank, sequence) of each answer that comes
        self._connections: dict[int, Connection] = {}
        self._answers: dict[tuple[int, int], Any] = {}
        self._void: set[tuple[int, int]] = set()  # answers that nobody waits for any more
        self._heard: dict[int, float] = {}
        self._looked = time.monotonic()
        self._sequence = 0
        self._closed = False
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ life

    def _open(self) -> None:
        world_size, start_s = self.num_workers + 1, self.timeouts.start_s
        if self._launcher is None and under_torchrun():
            store, _, found = store_of(start_s)
            host = os.environ["MASTER_ADDR"]
            if found != world_size:
                raise ConfigError(f"runtime=dist: torchrun started {found} processes; {len(self.teams)} instances of "
                                  f"{self.num_workers} ranks and the policy need {world_size} (cluster.num_instances, "
                                  "cluster.tp)")  # fmt: skip
        else:
            host = HOST if self._launcher is None else self._launcher.host
            store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
            extra = {"MASTER_ADDR": host, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world_size),
                     "KVPLANE_START_S": str(start_s)}  # fmt: skip
            each = {rank: {**extra, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(1, world_size)}
            if self._launcher is not None:
                self.processes = self._launcher.start(each, self.teams)
            else:
                self._fork(each)
        self._store = store
        door = Door(store, host)
        self._admit(door)
        door.close()
        try:
            self._peers = join_groups(store, 0, world_size, self.backend, start_s, self.timeouts.transfer_s,
                                      self.teams)  # fmt: skip
        except RuntimeError as error:
            raise KVPlaneError(f"runtime=dist: process groups: {str(error).splitlines()[0]}") from None
        self._heard = dict.fromkeys(self._connections, time.monotonic())

    def _fork(self, each: Mapping[int, Mapping[str, str]]) -> None:
        """Daemons: whatever goes wrong, this process can end."""
        for rank, extra in each.items():
            process = FORKS.Process(target=WORKER, args=({**os.environ, **extra},), name=f"worker {rank}",
                                    daemon=True)  # fmt: skip
            process.start()
            self.processes[rank] = process

    def _admit(self, door: Door) -> None:
        start_s = self.timeouts.start_s
        deadline = time.monotonic() + start_s
        terms = say.Terms(self.backend, start_s, self.timeouts.transfer_s, self.timeouts.heartbeat_s / 4,
                          self.piece_bytes, self.teams)  # fmt: skip
        while len(self._connections) < self.num_workers:
            self._ask_launcher()
            for rank, process in self.processes.items():
                if process.exitcode is not None:
                    raise KVPlaneError(f"worker {rank} ended with code {process.exitcode} before it was up")
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self.num_workers + 1)) - set(self._connections))
                raise KVPlaneError(f"workers {missing} did not come within {start_s:g} s; see runtime.start_timeout_s")
            came = door.admit(0.2, self.timeouts.heartbeat_s)
            if came is not None:
                self._connections[came[0]] = came[1]
                came[1].send(terms)

    def close(self) -> None:
        """End all workers; kill those that do not within two seconds."""
        if self._closed:
            return
        self._closed = True
        for rank in list(self._connections):
            self.post((rank, say.Exit()))
        deadline = time.monotonic() + 2.0
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        for connection in self._connections.values():
            connection.close()
        if self._launcher is not None:
            self._launcher.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    # ------------------------------------------------------------ orders

    def alive(self, *ranks: int) -> bool:
        """Are these there, as far as is known?"""
        return not any(rank in self.lost for rank in ranks)

    def post(self, *orders: tuple[int, Any]) -> int:
        """Tell workers something, all ends of one transfer at once. What is for a worker that is gone is dropped; the
        others must be able to do without it."""
        self._sequence += 1
        for rank, order in orders:
            if rank not in self.lost:
                try:
                    self._connections[rank].send((self._sequence, order))
                except OSError:
                    self.lose(rank, self._how_it_ended(rank))
        return self._sequence

    def answer(self, rank: int, sequence: int) -> Any:
        """What a worker answered; waits for it. Gone if the worker is."""
        deadline = time.monotonic() + self.timeouts.reply_s
        while (rank, sequence) not in self._answers:
            if rank in self.lost:
                raise Gone(rank)
            left = deadline - time.monotonic()
            if left <= 0:
                raise KVPlaneError(f"worker {rank} (instance {self.instance_of[rank]}) has not answered for "
                                   f"{self.timeouts.reply_s:g} s; see runtime.reply_timeout_s")  # fmt: skip
            self.drain(left)
        return self._answers.pop((rank, sequence))

    def ask(self, rank: int, order: Any) -> Any:
        """`post` and `answer`."""
        return self.answer(rank, self.post((rank, order)))

    def ready(self, rank: int, sequence: int) -> bool:
        """Would `answer` return or raise at once?"""
        return (rank, sequence) in self._answers or rank in self.lost

    def forget(self, rank: int, sequence: int) -> None:
        """Nobody will ask for this answer."""
        if self._answers.pop((rank, sequence), self) is self and rank not in self.lost:
            self._void.add((rank, sequence))

    @property
    def unclaimed(self) -> int:
        """Answers that are kept or still looked out for."""
        return len(self._answers) + len(self._void)

    def drain(self, timeout_s: float = 0.0) -> None:
        """Take what has come, waiting for it at most so long. Raises what a worker raised."""
        ranks = {connection: rank for rank, connection in self._connections.items() if rank not in self.lost}
        for connection in _readable(list(ranks), min(timeout_s, self.timeouts.heartbeat_s / 4)):
            self._take(ranks[connection], connection)
        self._look()

    def _take(self, rank: int, connection: Connection) -> None:
        try:
            came = connection.recv()
        except BlockingIOError:
            self.lose(rank, f"hung: the rest of a message did not come for {self.timeouts.heartbeat_s:g} s")
            return
        except (EOFError, OSError):
            self.lose(rank, self._how_it_ended(rank))
            return
        self._heard[rank] = time.monotonic()
        if isinstance(came, say.Beat):
            self.beats[rank] = came
            return
        if came.beat is not None:
            self.beats[rank] = came.beat
        if came.error is not None:
            text = f"worker {rank} (instance {self.instance_of[rank]}): {came.error}"
            raise ContractError(text) if came.contract else KVPlaneError(text)
        if (rank, came.sequence) in self._void:
            self._void.remove((rank, came.sequence))
            return
        self._answers[rank, came.sequence] = came.value
        if self.arrived is not None:
            self.arrived(rank, came.sequence)

    def _how_it_ended(self, rank: int) -> str:
        """Of a worker whose connection is closed."""
        process = self.processes.get(rank)
        if isinstance(process, FORKS.Process):  # its end is told a moment after that of its connection
            process.join(0.2)
            if process.exitcode is not None and process.exitcode < 0:
                return f"killed by {signal.Signals(-process.exitcode).name}"
        return "its connection is closed"

    def _look(self) -> None:
        """Who has been silent for too long is hung. Where nobody listened for a while, nobody is blamed for it."""
        for rank, how in self._ask_launcher().items():
            if rank not in self.lost and not self._closed:
                self.lose(rank, how)
        now, limit = time.monotonic(), self.timeouts.heartbeat_s
        if now - self._looked > limit / 2:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now
        for rank, heard in self._heard.items():
            if rank not in self.lost and now - heard > limit:
                self.lose(rank, f"hung: silent for {limit:g} s")

    def _ask_launcher(self) -> dict[int, str]:
        """Who is gone, as the launcher knows it."""
        return {} if self._launcher is None else self._launcher.gone()

    def lose(self, rank: int, how: str) -> None:
        """Give a worker up, and with it all ranks of its instance. What cannot be reached must not go on: it is killed,
        if it is ours."""
        if rank in self.lost:
            return
        self.lost[rank] = how
        self._void = {(other, sequence) for other, sequence in self._void if other != rank}
        process = self.processes.get(rank)
        if process is not None and process.exitcode is None:
            process.kill()
        with suppress(OSError):
            self._connections[rank].close()  # one that is not ours ends when it reads this
        for other in self.teams[self.instance_of[rank]]:
            self.lose(other, f"worker {rank} of its instance is gone: {how}")
