"""The policy's end of all workers: gives orders in one global order, waits for answers, notices who is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from common.comm import messages as say
from common.comm.join import Door, join_groups, store_of, under_torchrun
from common.errors import ConfigError, ContractError, KVPlaneError

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]


class Gone(Exception):
    """A worker is gone, and an answer will not come."""


class Hub:
    """Starts the workers (or meets those of torchrun), and ends them. Instance i is worker i + 1."""

    def __init__(
        self, num_workers: int, start_s: float = 60.0, reply_s: float = 60.0, transfer_s: float = 60.0,
        backend: str = "gloo",
    ) -> None:  # fmt: skip
        self.num_workers = num_workers
        self.reply_s = reply_s
        self.lost: dict[int, str] = {}  # rank -> how it was noticed
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._connections: dict[int, Connection] = {}
        self._answers: dict[tuple[int, int], Any] = {}
        self._sequence = 0
        self._closed = False
        try:
            self._open(start_s, transfer_s, backend)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ life

    def _open(self, start_s: float, transfer_s: float, backend: str) -> None:
        world_size = self.num_workers + 1
        if under_torchrun():
            store, _, found = store_of(start_s)
            host = os.environ["MASTER_ADDR"]
            if found != world_size:
                raise ConfigError(f"runtime=dist: torchrun started {found} processes; {self.num_workers} instances and "
                                  f"the policy need {world_size} (cluster.num_instances)")  # fmt: skip
        else:
            store, host = TCPStore(HOST, 0, world_size, is_master=True, wait_for_workers=False), HOST
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            extra = {"MASTER_ADDR": HOST, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world_size),
                     "KVPLANE_START_S": str(start_s), "KVPLANE_TRANSFER_S": str(transfer_s),
                     "KVPLANE_BACKEND": backend, "PYTHONPATH": path}  # fmt: skip
            for rank in range(1, world_size):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", "common.comm.worker"], env={**os.environ, **extra, **ranks}
                )
        self._store = store
        door = Door(store, host)
        self._admit(door, start_s)
        door.close()
        try:
            self._peers = join_groups(store, 0, world_size, backend, start_s, transfer_s)
        except RuntimeError as error:
            raise KVPlaneError(f"runtime=dist: process groups: {str(error).splitlines()[0]}") from None

    def _admit(self, door: Door, start_s: float) -> None:
        deadline = time.monotonic() + start_s
        while len(self._connections) < self.num_workers:
            for rank, process in self.processes.items():
                if process.poll() is not None:
                    raise KVPlaneError(f"worker {rank} ended with code {process.returncode} before it was up")
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self.num_workers + 1)) - set(self._connections))
                raise KVPlaneError(f"workers {missing} did not come within {start_s:g} s; see runtime.start_timeout_s")
            came = door.admit(0.2)
            if came is not None:
                self._connections[came[0]] = came[1]

    def close(self) -> None:
        """End all workers; kill those that do not within two seconds."""
        if self._closed:
            return
        self._closed = True
        for rank in list(self._connections):
            self.post((rank, say.Exit()))
        deadline = time.monotonic() + 2.0
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for connection in self._connections.values():
            connection.close()
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
                    self._lose(rank, "its connection is closed")
        return self._sequence

    def answer(self, rank: int, sequence: int) -> Any:
        """What a worker answered; waits for it. Gone if the worker is."""
        deadline = time.monotonic() + self.reply_s
        while (rank, sequence) not in self._answers:
            if rank in self.lost:
                raise Gone(rank)
            left = deadline - time.monotonic()
            if left <= 0:
                raise KVPlaneError(f"worker {rank} (instance {rank - 1}) has not answered for {self.reply_s:g} s; see "
                                   "runtime.reply_timeout_s")  # fmt: skip
            self.drain(left)
        return self._answers.pop((rank, sequence))

    def ask(self, rank: int, order: Any) -> Any:
        """`post` and `answer`."""
        return self.answer(rank, self.post((rank, order)))

    def drain(self, timeout_s: float = 0.0) -> None:
        """Take what has come. Raises what a worker raised."""
        ranks = {connection: rank for rank, connection in self._connections.items() if rank not in self.lost}
        for ready in wait(list(ranks), timeout_s):
            connection: Any = ready
            rank = ranks[connection]
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                self._lose(rank, "its connection is closed")
                continue
            if answer.error is not None:
                text = f"worker {rank} (instance {rank - 1}): {answer.error}"
                raise ContractError(text) if answer.contract else KVPlaneError(text)
            self._answers[rank, answer.sequence] = answer.value

    def _lose(self, rank: int, how: str) -> None:
        self.lost[rank] = how
        process = self.processes.get(rank)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGKILL)  # what cannot be reached must not go on
