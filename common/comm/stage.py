"""A worker's side of an iteration: the runner of one instance, whose plans come from the policy process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from common.comm.messages import Attend, RunStage
from common.comm.peers import PeerLost, Peers, pack, packed_bytes, unpack
from common.engine.instance import EngineInstance, InstanceBytes
from common.engine.model import Attend as AttendCall
from common.engine.runner import Item, Place, Runner, StageTimes
from common.engine.shard import ordered_sum
from common.engine.work import Batch, Pass, PlacePlan, Write, to_device
from common.errors import ContractError
from common.types import Layers


def moved_tokens(plan: PlacePlan, num_tokens: int) -> tuple[list[int], list[int]]:
    """Tokens of a batch whose queries, and whose new K and V, go to a creditor."""
    everyone = range(num_tokens)
    queries = {int(t) for part in plan.passes for t in (everyone if part.queries is None else part.queries)}
    writes = {int(t) for write in plan.writes for t in (everyone if write.tokens is None else write.tokens)}
    return sorted(queries), sorted(writes)


def further(message: RunStage, ids: list[int]) -> RunStage:
    """The same decodes one token further on, within their blocks; all of their KV is at home."""
    ((layers, (plan,)),) = message.bands
    ((rows, queries),), ((tokens, slots),) = plan.passes, plan.writes
    batch = message.batch
    works = tuple([work._replace(first=work.first + 1) for work in batch.works])
    rows = rows._replace(q_pos=rows.q_pos + 1, kv_len=rows.kv_len + 1)
    moved = PlacePlan(plan.instance, plan.tier, [Write(tokens, slots + 1)], [Pass(rows, queries)])
    return message._replace(batch=Batch(works, batch.first + 1, batch.count, batch.start), ids=ids,
                            bands=((layers, (moved,)),))  # fmt: skip


class Creditor(NamedTuple):
    """Where a part of a band's attention goes, and which rows come back in each pass."""

    rank: int
    queries: Tensor
    writes: Tensor
    passes: list[tuple[int, Tensor | None]]


class StageRunner(Runner):
    """See the module docstring. `instances` has the one instance of this worker, or the worker's rank of it; then the
    decoder is a rank's too, and the first rank samples. `teams`: workers of each instance."""

    peers: Peers

    def __init__(
        self, peers: Peers, teams: Sequence[Sequence[int]], instances: dict[int, InstanceBytes], *args: Any,
        **options: Any,
    ) -> None:  # fmt: skip
        self.peers, self.teams = peers, teams
        self.position = peers.team.index(peers.rank)  # among the ranks of its instance
        self.hidden: dict[int, Tensor] = {}  # lane -> what its stage here left for the next one
        self._last: dict[int, tuple[RunStage, list[tuple[int, int]]]] = {}  # lane -> what ran last here, and its tokens
        self._bands: dict[Layers, tuple[PlacePlan, ...]] = {}
        self._creditors: list[Creditor] = []
        self._lost: set[int] = set()
        self._sequence = 0
        decoder, source, backend, *rest = args
        super().__init__(decoder, source, backend, cast(dict[int, EngineInstance], instances), *rest, **options)
        if len(peers.team) > 1:
            decoder.reduce = self._reduce

    def stage(self, message: RunStage, home: int, sequence: int) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
        """Run it. Where peers are lost the rest goes on with what there is, as others wait for their part of it; the
        result is then not valid. Tokens, and who was lost."""
        self._lost, self._sequence, self._bands = set(), sequence, dict(message.bands)
        item = Item(message.batch, message.ids)
        if message.layers[0]:
            item.hidden = self._hidden(message)
        try:
            self.run_stage(item, home, message.layers)
        except ContractError:
            if not self._lost:
                raise
        if message.layers[1] < self.decoder.spec.num_layers:
            assert item.hidden is not None
            self.hidden[message.lane] = item.hidden
        self._last[message.lane] = message, item.sampled
        return item.sampled, tuple(sorted(self._lost))

    def proceed(self, lane: int, home: int, sequence: int) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
        """A lane's next decode iteration."""
        message, sampled = self._last[lane]
        return self.stage(further(message, [token for _, token in sampled]), home, sequence)

    def _sample(self, item: Item) -> None:
        if self.position == 0:
            super()._sample(item)

    def _reduce(self, part: Tensor) -> Tensor:
        """The sum over the ranks of this instance, in their order: the same bits in all of them, and in `local`."""
        if not part.numel() or self._lost.intersection(self.peers.team):
            return part
        try:
            return ordered_sum(self.peers.gather(part))
        except PeerLost as error:
            self._lost.add(error.rank)
            return part

    def _hidden(self, message: RunStage) -> Tensor:
        if message.source is None:
            return self.hidden.pop(message.lane)
        spec = self.decoder.spec
        hidden = torch.zeros(message.batch.num_tokens, spec.hidden_size, dtype=spec.dtype, device=self.device)
        try:
            return self.peers.receive("hidden", hidden, message.source, self._sequence)
        except PeerLost as error:
            self._lost.add(error.rank)
            return hidden.zero_()

    # ------------------------------------------------------------ attention at home

    def _prepare(self, item: Item, home: int, band: Layers) -> list[Place]:
        own, *others = self._bands[band]
        self._creditors = [self._creditor(plan, item.batch.num_tokens) for plan in others]
        return [self._on_device(own)]

    def _creditor(self, plan: PlacePlan, num_tokens: int) -> Creditor:
        queries, writes = (torch.tensor(ids, device=self.device) for ids in moved_tokens(plan, num_tokens))
        passes = [(int(part.rows.q_len.sum()), to_device(part.queries, self.device)) for part in plan.passes]
        return Creditor(self.teams[plan.instance][self.position], queries.long(), writes.long(), passes)

    def _attend(self, places: list[Place], layer: int, times: StageTimes) -> AttendCall:
        home, creditors = places[0], self._creditors
        if not creditors:
            return super()._attend(places, layer, times)

        def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for creditor in creditors:
                out = pack(q[creditor.queries], k[creditor.writes], v[creditor.writes])
                self.peers.send("queries", out, creditor.rank, self._sequence)
            self._write(home, k, v, layer)
            parts = self._partials(home, q, layer)
            for creditor in creditors:
                parts += self._theirs(creditor)
            return self._merged(parts)

        return together

    def _theirs(self, creditor: Creditor) -> list[tuple[Tensor | None, Tensor, Tensor]]:
        if creditor.rank in self._lost:
            return []
        shapes = [shape for num, _ in creditor.passes for shape in self._partial_shapes(num)]
        data = torch.empty(packed_bytes(*shapes), dtype=torch.uint8, device=self.device)
        try:
            flat = unpack(self.peers.receive("partials", data, creditor.rank, self._sequence), *shapes)
        except PeerLost as error:
            self._lost.add(error.rank)
            return []
        return [(queries, flat[2 * index + 1], flat[2 * index]) for index, (_, queries) in enumerate(creditor.passes)]

    def _partial_shapes(self, num: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """(lse, o) of a pass."""
        spec = self.decoder.spec
        return [((num, spec.num_heads), torch.float32), ((num, spec.num_heads, spec.head_dim), spec.dtype)]

    # ------------------------------------------------------------ attention for others

    def attend_for(self, message: Attend, sequence: int) -> None:
        """A creditor's part of a stage. If home is lost on the way, nobody waits for the rest."""
        try:
            with torch.inference_mode():
                for band, (plan,) in message.bands:
                    place = self._on_device(plan)
                    tokens = moved_tokens(plan, message.num_tokens)
                    for layer in range(band[1] - band[0]):
                        self._answer(message, place, tokens, layer, sequence)
        except PeerLost:
            return

    def _answer(
        self, message: Attend, place: Place, tokens: tuple[list[int], list[int]], layer: int, sequence: int
    ) -> None:
        spec, rows = self.decoder.spec, message.num_tokens
        heads, dtype = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), spec.dtype
        owners = (tokens[0], tokens[1], tokens[1])
        shapes = [((len(ids), num, spec.head_dim), dtype) for ids, num in zip(owners, heads)]
        data = torch.empty(packed_bytes(*shapes), dtype=torch.uint8, device=self.device)
        parts = unpack(self.peers.receive("queries", data, message.home, sequence), *shapes)
        whole = [part.new_zeros(rows, *part.shape[1:]) for part in parts]
        for full, part, ids in zip(whole, parts, owners):
            full[torch.tensor(ids, dtype=torch.int64, device=self.device)] = part
        q, k, v = whole
        self._write(place, k, v, layer)
        answers = [part for _, o, lse in self._partials(place, q, layer) for part in (lse, o.to(dtype))]
        self.peers.send("partials", pack(*answers), message.home, sequence)
