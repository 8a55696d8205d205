"""A worker process: bytes and arithmetic of one instance, or of one rank of it, and a loop over what the policy process
says.

`python -m common.comm.worker` with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set, or `run.py` under torchrun. It ends
when it is told to, or at once when the policy process is gone."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from common.comm import messages as say
from common.comm.beside import Beside
from common.comm.copies import Arrival, Copies
from common.comm.join import join_groups, knock, store_of
from common.comm.loop import Ear, Mouth, carry_out, serve
from common.comm.peers import PeerLost, Peers
from common.comm.stage import StageRunner
from common.engine.folder import FolderSource
from common.engine.instance import InstanceBytes, put_blocks
from common.engine.model import Decoder
from common.engine.relayout import cut_tokens, put_tokens
from common.engine.shard import ShardedSource, rank_spec
from common.engine.spec import DecoderSpec
from common.engine.weights import MemorySource, ParameterSource, RandomSource
from common.errors import KVPlaneError
from common.kernels.select import choose


class Worker:
    """Carries orders out. Handlers take (order, sequence) and return what an answer says."""

    def __init__(self, peers: Peers, copies: Copies, recalled: set[int]) -> None:
        self.peers, self.copies, self.recalled = peers, copies, recalled
        self.instances: dict[int, InstanceBytes] = {}
        self.setup_number = 0
        self._ran = (0, 0.0)  # stages, and seconds of the clock that they took
        self._cpu_from = 0.0  # CPU seconds of this process before the first of them
        self._coming: set[int] = set()  # copies and loads on their way here,
        self._void: set[int] = set()  # and those of them whose bytes are not wanted any more
        self._sources: dict[Any, ParameterSource] = {}
        self.handlers: dict[type, Callable[[Any, int], Any]] = {
            say.Setup: self._setup,
            say.Start: self._start,
            say.Stop: lambda order, _: self._stop(),
            say.Settle: lambda order, _: None,
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
            say.CancelTake: lambda order, _: self._void.update({order.number} & self._coming),
            say.SendHidden: self._send_hidden,
            say.Forget: lambda order, _: self.runner.hidden.pop(order.lane, None),
            say.RunStage: lambda order, sequence: self._timed(self.runner.stage, order, sequence),
            say.Continue: self._continue,
            Arrival: self._arrived,
        }

    @property
    def engine(self) -> InstanceBytes:
        """The instance, which is up."""
        return self.instances[self.index]

    def beat(self) -> say.Beat:
        """That it lives, and what it has sent and received since its setup."""
        (sent, received), (stages, wall_s) = self.peers.counts(), self._ran
        cpu_s = time.process_time() - self._cpu_from if stages else 0.0
        return say.Beat(self.setup_number, sent, received, stages, cpu_s, wall_s)

    # ------------------------------------------------------------ life

    def _setup(self, order: say.Setup, sequence: int) -> dict[str, str]:
        self._stop_all()
        self.setup, self.index = order, order.info.instance
        self.spec = rank_spec(order.spec, len(self.peers.team))
        self.device = torch.device(order.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.peers.reset()
        self._ran = (0, 0.0)
        self.setup_number = sequence
        self.source = self._source(order.spec, order.weights, order.seed)
        backend, self.runner = self._runner(order)
        _, self.attender = self._runner(order)  # for others, in a thread of its own
        return {"attention": backend.reason}

    def _runner(self, order: say.Setup) -> tuple[Any, StageRunner]:
        spec = self.spec
        backend = choose(self.device, spec.dtype, order.block_size, order.attention)
        decoder = Decoder(spec, self.device, spec.dtype)
        return backend, StageRunner(self.peers, order.teams, self.instances, decoder, self.source, backend,
                                    order.block_size, order.sampling, order.poison)  # fmt: skip

    def _source(self, spec: DecoderSpec, weights: str | None, seed: int) -> ParameterSource:
        key = (spec, weights, seed)
        if key not in self._sources:
            whole = RandomSource(spec, seed) if weights is None else FolderSource(weights, spec.dtype)
            team = self.peers.team
            own = whole if len(team) == 1 else ShardedSource(whole, len(team), team.index(self.peers.rank))
            self._sources = {key: own if weights is not None else MemorySource(own)}
        return self._sources[key]

    def _start(self, _: say.Start, __: int) -> None:
        order = self.setup
        self.instances[self.index] = InstanceBytes(order.info, self.spec, self.spec.dtype, self.device,
                                                   order.block_size, self.source, order.poison)  # fmt: skip

    def _stop(self) -> say.Beat:
        self._stop_all()
        return self.beat()

    def _stop_all(self) -> None:
        for index in list(self.instances):
            self.instances.pop(index).close()

    def _continue(self, order: say.Continue, sequence: int) -> Any:
        if self.recalled:
            recalled = sequence in self.recalled
            self.recalled.difference_update([number for number in list(self.recalled) if number <= sequence])
            if recalled:
                return [], ()
        return self._timed(self.runner.proceed, order.lane, sequence)

    def _timed(self, run: Callable[[Any, int, int], Any], what: Any, sequence: int) -> Any:
        wall = time.perf_counter()
        if not self._ran[0]:
            self._cpu_from = time.process_time()
        try:
            return run(what, self.index, sequence)
        finally:
            num, wall_s = self._ran
            self._ran = (num + 1, wall_s + time.perf_counter() - wall)

    def attend(self, order: say.Attend, sequence: int) -> None:
        """A creditor's part of a stage; in a thread of its own."""
        self.attender.attend_for(order, sequence)

    # ------------------------------------------------------------ bytes

    def _put_blocks(self, order: say.PutBlocks, _: int) -> None:
        source = self.engine.cells(order.source, int(order.src_cells.max()))
        goal = self.engine.cells(order.goal, int(order.dst_cells.max()))
        put_blocks(source, order.src_cells, goal, order.dst_cells, order.tokens, order.first_block,
                   self.setup.block_size)  # fmt: skip

    def _send_cells(self, order: say.SendCells, sequence: int) -> None:
        source = self.engine.cells(order.tier, int(order.cells.max()))
        tokens = cut_tokens(source, order.cells, order.tokens, order.first_block).to(self.device)
        for to, low, high in order.to:
            self.copies.send(tokens[..., low:high, :].contiguous(), to, sequence)

    def _take_cells(self, order: say.TakeCells, sequence: int) -> None:
        spec, num = self.spec, order.tokens[1] - order.tokens[0]
        came = [torch.empty((len(order.cells), 2, num, heads, spec.head_dim), dtype=spec.dtype, device=self.device)
                for _, heads in order.sources]  # fmt: skip
        engine = self.engine

        def put() -> None:
            goal = engine.cells(order.tier, int(order.cells.max()))
            whole = came[0] if len(came) == 1 else torch.cat(came, dim=3)
            put_tokens(whole, goal, order.cells, order.tokens, order.first_block)

        def fetch() -> Callable[[], Any]:
            try:
                for (source, _), part in zip(order.sources, came):
                    self.copies.receive(part, source, sequence)
            except PeerLost as error:
                rank = error.rank
                return lambda: rank
            return self._if_still(engine, sequence, put)

        self._coming.add(sequence)
        self.copies.take(sequence, fetch)

    def _if_still(self, engine: InstanceBytes, number: int, put: Callable[[], Any]) -> Callable[[], Any]:
        """Put what came, unless the instance has gone meanwhile or nobody wants it any more."""

        def when_due() -> Any:
            wanted = number not in self._void and self.instances.get(self.index) is engine
            return put() if wanted else None

        return when_due

    def _send_layers(self, order: say.SendLayers, sequence: int) -> None:
        for index in order.layers:
            self.copies.send(self.engine.slab(index).clone(), order.to, sequence)

    def _load(self, order: say.Load, sequence: int) -> None:
        engine, slabs, remaps = self.engine, [], []
        for index in order.layers:
            remap, slab = engine.restore(index)
            remaps.append(remap)
            slabs.append(slab)

        def fetch() -> Callable[[], Any]:
            source, buffers = order.source, [torch.empty_like(slab) for slab in slabs]
            lost = None
            for index, buffer in zip(order.layers, buffers):
                if source is not None:
                    try:
                        self.copies.receive(buffer, source, sequence)
                        continue
                    except PeerLost as error:
                        source, lost = None, error.rank
                self.source.layer_into(index, buffer)

            def put() -> Any:
                for slab, buffer in zip(slabs, buffers):
                    slab.copy_(buffer)
                return remaps, lost

            return self._if_still(engine, sequence, put)

        self._coming.add(sequence)
        self.copies.take(sequence, fetch)

    def _arrived(self, arrival: Arrival, _: int) -> Any:
        try:
            if arrival.error is not None:
                raise KVPlaneError(arrival.error)
            return arrival.put()
        finally:
            self._coming.discard(arrival.number)
            self._void.discard(arrival.number)

    def _send_hidden(self, order: say.SendHidden, sequence: int) -> None:
        hidden = self.runner.hidden.pop(order.lane)
        for to in order.to:
            self.peers.send("hidden", hidden, to, sequence)


def main() -> None:
    """One worker, from rendezvous to exit."""
    work()
    os._exit(0)  # without waiting for peers' connections


def work() -> None:
    """A worker's life in this process, which it should not outlive: threads and connections stay."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the policy process's business
    torch.set_num_threads(1)
    start_s = float(os.environ.get("KVPLANE_START_S", "60"))
    try:
        store, rank, world_size = store_of(start_s)
        connection = knock(store, rank)
        terms = connection.recv()
        ear, mouth = Ear(connection), Mouth(connection)
        peers = join_groups(store, rank, world_size, terms.backend, terms.start_s, terms.transfer_s, terms.teams)
    except (KVPlaneError, RuntimeError, OSError, EOFError) as error:
        print(f"worker {os.environ.get('RANK')}: {str(error).splitlines()[0]}", file=sys.stderr)
        os._exit(1)
    copies = Copies(peers, terms.piece_bytes, lambda arrival: ear.orders.put((arrival.number, arrival, None)))
    worker = Worker(peers, copies, ear.recalled)
    beside = Beside(lambda sequence, order: carry_out(mouth, sequence, order, worker.attend))
    ear.start(beside)
    mouth.beats(worker.beat, terms.beat_s)
    serve(ear, mouth, worker.handlers, beside)


def start_worker(environment: dict[str, str]) -> None:
    """A process of its own, forked from one that has imported this; never returns."""
    os.environ.clear()
    os.environ.update(environment)
    main()


if __name__ == "__main__":
    main()
