"""A worker process: one instance's bytes and arithmetic, and a loop over what the policy process says.

`python -m common.comm.worker` with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set, or `run.py` under torchrun. It ends
when it is told to, or at once when the policy process is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from common.comm import messages as say
from common.comm.join import join_groups, knock, store_of
from common.comm.peers import PeerLost, Peers
from common.comm.stage import StageRunner
from common.engine.folder import FolderSource
from common.engine.instance import InstanceBytes, cell_shape, put_blocks
from common.engine.model import Decoder
from common.engine.spec import DecoderSpec
from common.engine.weights import MemorySource, ParameterSource, RandomSource
from common.errors import ContractError, KVPlaneError
from common.kernels.cache import gather_cells
from common.kernels.select import choose


class Worker:
    """Carries orders out. Handlers take (order, sequence) and return what an answer says."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self.instances: dict[int, InstanceBytes] = {}
        self._sources: dict[Any, ParameterSource] = {}
        self.handlers: dict[type, Callable[[Any, int], Any]] = {
            say.Setup: self._setup,
            say.Start: self._start,
            say.Stop: lambda order, _: self._stop(),
            say.Poison: lambda order, _: self.engine.poison(*order),
            say.DropPages: lambda order, _: self.engine.drop_pages(*order),
            say.Widen: lambda order, _: self.engine.widen(*order),
            say.Compact: lambda order, _: self.engine.compact(*order),
            say.MoveCells: lambda order, _: self.engine.move_cells(*order),
            say.PutBlocks: self._put_blocks,
            say.SendCells: self._send_cells,
            say.TakeCells: self._take_cells,
            say.SendLayers: self._send_layers,
            say.Load: self._load,
            say.SendHidden: self._send_hidden,
            say.RunStage: lambda order, sequence: self.runner.stage(order, self.index, sequence),
            say.Attend: lambda order, sequence: self.runner.attend_for(order, sequence),
        }

    @property
    def engine(self) -> InstanceBytes:
        """The instance, which is up."""
        return self.instances[self.index]

    # ------------------------------------------------------------ life

    def _setup(self, order: say.Setup, _: int) -> dict[str, str]:
        self._stop_all()
        self.setup, self.index = order, order.info.instance
        self.device = torch.device(order.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.peers.sent_bytes.clear()
        spec = order.spec
        self.source = self._source(spec, order.weights, order.seed)
        backend = choose(self.device, spec.dtype, order.block_size, order.attention)
        decoder = Decoder(spec, self.device, spec.dtype)
        self.runner = StageRunner(self.peers, self.instances, decoder, self.source, backend, order.block_size,
                                  order.sampling, order.poison)  # fmt: skip
        return {"attention": backend.reason}

    def _source(self, spec: DecoderSpec, weights: str | None, seed: int) -> ParameterSource:
        key = (spec, weights, seed)
        if key not in self._sources:
            made = MemorySource(RandomSource(spec, seed)) if weights is None else FolderSource(weights, spec.dtype)
            self._sources = {key: made}
        return self._sources[key]

    def _start(self, _: say.Start, __: int) -> None:
        order = self.setup
        self.instances[self.index] = InstanceBytes(order.info, order.spec, order.spec.dtype, self.device,
                                                   order.block_size, self.source, order.poison)  # fmt: skip

    def _stop(self) -> dict[str, int]:
        self._stop_all()
        return dict(self.peers.sent_bytes)

    def _stop_all(self) -> None:
        for index in list(self.instances):
            self.instances.pop(index).close()

    # ------------------------------------------------------------ bytes

    def _put_blocks(self, order: say.PutBlocks, _: int) -> None:
        source = self.engine.cells(order.source, int(order.src_cells.max()))
        goal = self.engine.cells(order.goal, int(order.dst_cells.max()))
        put_blocks(source, order.src_cells, goal, order.dst_cells, order.tokens, order.first_block,
                   self.setup.block_size)  # fmt: skip

    def _send_cells(self, order: say.SendCells, sequence: int) -> None:
        ids = torch.from_numpy(order.cells.ravel().astype(np.int64))
        cells = gather_cells(self.engine.cells(order.tier, int(ids.max())), ids)
        self.peers.send("copies", cells.to(self.device), order.to, sequence)

    def _take_cells(self, order: say.TakeCells, sequence: int) -> bool:
        spec, table = self.setup.spec, order.cells
        came = torch.empty((table.size, *cell_shape(spec, self.setup.block_size)), dtype=spec.dtype, device=self.device)
        try:
            self.peers.receive("copies", came, order.source, sequence)
        except PeerLost:
            return False
        goal = self.engine.cells(order.tier, int(table.max()))
        numbers = np.arange(table.size, dtype=np.int32).reshape(table.shape)
        put_blocks(came, numbers, goal, table, order.tokens, order.first_block, self.setup.block_size)
        return True

    def _send_layers(self, order: say.SendLayers, sequence: int) -> None:
        for index in order.layers:
            self.peers.send("copies", self.engine.slab(index).clone(), order.to, sequence)

    def _load(self, order: say.Load, sequence: int) -> list[Any]:
        remaps, source = [], order.source
        for index in order.layers:
            remap, slab = self.engine.restore(index)
            remaps.append(remap)
            if source is not None:
                try:
                    self.peers.receive("copies", slab, source, sequence)
                    continue
                except PeerLost:
                    source = None
            self.source.layer_into(index, slab)
        return remaps

    def _send_hidden(self, order: say.SendHidden, sequence: int) -> None:
        self.peers.send("hidden", self.runner.hidden.pop(order.lane), order.to, sequence)


Orders = SimpleQueue[tuple[int, Any]]


def listen(connection: Any) -> Orders:
    """Orders as they come in. When the policy process is gone this one ends at once, whatever it is in."""
    orders: Orders = SimpleQueue()

    def read() -> None:
        try:
            order = None
            while not isinstance(order, say.Exit):  # after that the connection may close
                sequence, order = connection.recv()
                orders.put((sequence, order))
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return orders


def serve(connection: Any, orders: Orders, worker: Worker) -> None:
    """Orders one by one until `Exit`. A broken contract or a failure is answered too, and what follows as well."""
    while True:
        sequence, order = orders.get()
        if isinstance(order, say.Exit):
            return
        try:
            answer = say.Answer(sequence, worker.handlers[type(order)](order, sequence))
        except ContractError as error:
            answer = say.Answer(sequence, None, str(error), contract=True)
        except Exception as error:  # whatever it is, it ends the run in one line, at the policy
            kind = "" if isinstance(error, KVPlaneError) else f"{type(error).__name__} in {type(order).__name__}: "
            answer = say.Answer(sequence, None, kind + (str(error).splitlines() or ["?"])[0])
        if isinstance(order, ANSWERED) or answer.error is not None:
            connection.send(answer)


ANSWERED = (say.Setup, say.Stop, say.DropPages, say.TakeCells, say.Load, say.RunStage)


def main() -> None:
    """One worker, from rendezvous to exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the policy process's business
    torch.set_num_threads(1)
    start_s, transfer_s = (float(os.environ.get(f"KVPLANE_{name}_S", "60")) for name in ("START", "TRANSFER"))
    backend = os.environ.get("KVPLANE_BACKEND", "gloo")
    try:
        store, rank, world_size = store_of(start_s)
        connection = knock(store, rank)
        orders = listen(connection)
        peers = join_groups(store, rank, world_size, backend, start_s, transfer_s)
    except (KVPlaneError, RuntimeError, OSError, EOFError) as error:
        print(f"worker {os.environ.get('RANK')}: {str(error).splitlines()[0]}", file=sys.stderr)
        os._exit(1)
    serve(connection, orders, Worker(peers))
    os._exit(0)  # without waiting for peers' connections


if __name__ == "__main__":
    main()
