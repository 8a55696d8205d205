"""How the processes of a run find each other: env:// rendezvous, as torchrun sets it, then a connection each to the
policy process (orders and answers) and torch.distributed between workers (tensors).

Orders are pickled. The connection is opened with a secret that only the rendezvous store knows; run this on a network
that you trust, like torch.distributed itself."""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from common.comm.peers import Peers
from common.errors import KVPlaneError

WHERE = "kvplane/control"


def under_torchrun() -> bool:
    """Was this process started by torchrun, or by a policy process in its way?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def store_of(timeout_s: float) -> tuple[Any, int, int]:
    """The store that env:// names, this process's rank, and how many there are."""
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise KVPlaneError(f"runtime=dist: no rendezvous: {str(error).splitlines()[0]}") from None
    return store, rank, world_size


class Door:
    """Where workers come in; the policy's side."""

    def __init__(self, store: Any, host: str) -> None:
        self._socket = socket.create_server((host, 0))
        self._key = secrets.token_bytes(32)
        store.set(WHERE, json.dumps([host, self._socket.getsockname()[1], self._key.hex()]))

    def admit(self, timeout_s: float, send_s: float) -> tuple[int, Connection] | None:
        """(rank, connection) of the next worker; None if nobody came, or somebody who does not know the secret. A
        send that the other side does not take for `send_s`, or the rest of a message that does not come for so long,
        is an OSError."""
        self._socket.settimeout(timeout_s)
        try:
            accepted, _ = self._socket.accept()
        except TimeoutError:
            return None
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _seconds(max(1.0, timeout_s)))
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _seconds(send_s))
        connection = _connection(accepted)
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            rank = int(connection.recv())
        except (AuthenticationError, OSError, EOFError, ValueError):
            connection.close()
            return None
        with socket.socket(fileno=os.dup(connection.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _seconds(send_s))
        return rank, connection

    def close(self) -> None:
        """Nobody else comes."""
        self._socket.close()


def knock(store: Any, rank: int) -> Connection:
    """A worker's side."""
    host, port, key = json.loads(store.get(WHERE))
    connection = _connection(socket.create_connection((host, port)))
    answer_challenge(connection, bytes.fromhex(key))
    deliver_challenge(connection, bytes.fromhex(key))
    connection.send(rank)
    return connection


def _seconds(value: float) -> bytes:
    """A timeval; 0: for ever."""
    return struct.pack("ll", int(value), int(value % 1 * 1e6))


def _connection(opened: socket.socket) -> Connection:
    opened.settimeout(None)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that is gone says nothing
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        opened.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(opened.detach())


def join_groups(
    store: Any, rank: int, world_size: int, backend: str, start_s: float, transfer_s: float,
    teams: Sequence[Sequence[int]] = (),
) -> Peers:  # fmt: skip
    """All ranks at once. `teams`: workers of each instance."""
    inner = PrefixStore("kvplane/groups", store)
    dist.init_process_group("gloo", store=inner, rank=rank, world_size=world_size, timeout=timedelta(seconds=start_s))
    return Peers(rank, world_size, backend, transfer_s, teams)
