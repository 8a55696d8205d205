"""Random legal stories over one cluster: requests are placed, cut, moved, parked, swapped, preempted and lost while
others run on the same instances, and parameters come and go under them.

The policy reads the executor's books to stay legal (it is a test, not a system); all that it does goes through the
contract. The same story runs in every runtime.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np

from common.kv.plane import Rectangle, move
from common.types import (
    CopySpan,
    DropLayers,
    Entry,
    FreeSpan,
    LoadLayers,
    SetTimer,
    ShrinkKV,
    Span,
    Stage,
    Status,
    SwapSpan,
    Tier,
)
from tests.contract.script import Script

US = 1_000
KINDS = ("go", "go", "go", "shift", "shift", "shift", "home", "append", "park", "park", "swap", "preempt", "breathe",
         "breathe", "drop", "restore", "kill", "wait")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One story. `ops`: (kind, request, microseconds before it); `seed`: every detail of where and how."""

    instances: int
    layers: int
    block_size: int
    heads: tuple[int, int, int]  # query heads, KV heads, head size
    slack: float  # KV room of an instance, in all that the requests come to
    lengths: tuple[tuple[int, int], ...]
    ops: tuple[tuple[str, int, int], ...]
    seed: int
    ragged: bool = False

    @property
    def cells(self) -> int:
        """KV cells of an instance: all requests fit on each."""
        blocks = sum(-(-(prompt + output) // self.block_size) for prompt, output in self.lengths)
        return int(blocks * self.slack) * self.layers


def boxes(mask):
    """A boolean [layers, blocks] as rectangles (layers low, high, blocks low, high)."""
    rows = {}
    for layer in range(mask.shape[0]):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[layer].astype(np.int8), [0]])))
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist()):
            rows.setdefault((first, last), []).append(layer)
    for (first, last), layers in rows.items():
        low = layers[0]
        for at, layer in enumerate(layers):
            if at + 1 == len(layers) or layers[at + 1] != layer + 1:
                yield low, layer + 1, first, last
                low = layers[at + 1] if at + 1 < len(layers) else 0


class Nomads(Script):
    """`executor` must be set before the first event."""

    executor = None

    def __init__(self, case, info, leap=None):
        super().__init__(info, leap)
        self.case = case
        self.rng = Random(case.seed)
        self.did = Counter()
        self.routes = {}  # lane -> route
        self.plans = {}  # lane -> (request, new placement or None from the stored tokens)
        self.fuse = None  # the instance that dies in the middle of the next move
        self.size = case.block_size

    def agents(self):
        return [self.story()]

    def story(self):
        requests = range(len(self.case.lengths))
        yield self.arrived(*requests)
        self.tokens = dict.fromkeys(requests, 0)
        for request in requests:
            yield from self.go(request)
        for kind, request, delay in self.case.ops:
            yield self.ask(SetTimer, self.now + delay * US)
            yield from getattr(self, kind)(request % len(requests))
        yield from self.explode()
        tries = 0
        while waiting := [request for request in requests if not self.over(request)]:
            tries += 1
            assert tries < 200, "nobody gets anywhere"
            idle = [request for request in waiting if self.lane_of(request) is None]
            for request in idle:
                if not (yield from self.go(request)):
                    self.forget(request)
                    yield from self.go(request, simple=True)
            if all(self.lane_of(request) is None for request in waiting):
                for request in waiting:
                    self.forget(request)
            else:
                waiting = [request for request in waiting if self.lane_of(request) is not None]
                yield lambda waiting=waiting: any(self.over(one) or self.lane_of(one) is None for one in waiting)

    # ------------------------------------------------------------ books

    def over(self, request):
        return ("finished", request) in self.happened

    def lane_of(self, request):
        for lane, book in self.books.items():
            added = [entry.request_id for entry in book.todo.get("add", ())]
            if request in book.members or request in book.targets or request in added:
                return lane
        return None

    @property
    def live(self):
        return [index for index in range(len(self.case.lengths)) if not self.over(index)]

    @property
    def up(self):
        return [index for index, up in enumerate(self.executor.state.up) if up]

    def memory(self, instance):
        return self.executor.state.memory[instance]

    def blocks(self, tokens):
        return -(-tokens // self.size)

    def charged(self, request):
        lane = self.lane_of(request)
        if lane is None:
            return self.tokens[request]
        book, running = self.books[lane], self.executor.lanes.get(lane)
        if running is not None and request in running.members:  # as of now, as memory is: the last report is older
            return running.members[request].offset + running.iteration  # where a leap goes step by step
        if request in book.members:
            return book.members[request] + book.iteration
        return book.targets[request].target if request in book.targets else self.tokens[request]

    def reserve(self):
        """Cells that everybody may yet grow by, wherever that is."""
        return self.case.layers * sum(self.blocks(sum(self.case.lengths[one])) - self.blocks(self.charged(one))
                                      for one in self.live)  # fmt: skip

    def fits(self, cells, growth=None):
        """Do these cells, by instance, leave the others room to grow?"""
        growth = self.reserve() if growth is None else growth
        return all(self.memory(instance).room() >= num + growth for instance, num in cells.items())

    def where(self, request, tokens):
        """(instance, tier) -> [layers, blocks]: whole there, ready, outside lanes."""
        grids = {}
        for held in self.executor.state.held.get(request, ()):
            if held.ready:
                key = (held.instance, held.tier)
                grid = grids.setdefault(key, np.zeros((self.case.layers, self.blocks(tokens) * self.size), bool))
                grid[held.layers[0] : held.layers[1], held.start : held.end] = True
        for grid in grids.values():
            grid[:, tokens:] = True
        return {key: grid.reshape(self.case.layers, -1, self.size).all(axis=2) for key, grid in grids.items()}

    def wanted(self, placement, tokens):
        """instance -> [layers, blocks] that a placement names there, of the first `tokens`."""
        grids = {}
        for span in placement:
            grid = grids.setdefault(span.instance, np.zeros((self.case.layers, self.blocks(tokens)), bool))
            end = tokens if span.token_end is None else min(span.token_end, tokens)
            if end > span.token_start:
                grid[span.layers[0] : span.layers[1], span.token_start // self.size : self.blocks(end)] = True
        return grids

    def forget(self, request):
        """All KV of a request outside lanes goes: it is to be computed anew."""
        for instance, tier in {(held.instance, held.tier): 0 for held in self.executor.state.held.get(request, ())}:
            self.do(FreeSpan(instance, request, tier=tier))
        self.tokens[request] = 0

    def _out_of(self, book, request):
        lane = self.executor.members.lane_of(request)
        partial = self.executor.members.stored(lane, request) if request in book.targets and lane is not None else 0
        decoding = request in book.members
        super()._out_of(book, request)
        if not decoding:
            self.tokens[request] = partial

    def _step_done(self, event):
        super()._step_done(event)
        for request in range(len(self.case.lengths)):
            if ("lost", request) in self.happened:
                self.happened.discard(("lost", request))
                self.tokens[request] = 0
                self.did["lost"] += 1

    def _flush(self, lane):
        book, iteration = self.books[lane], self.books[lane].iteration
        gone = book.todo.get("remove", ())
        gone = [one for one in gone if one in book.members or one in book.targets]
        if lane in self.plans:
            request, plan = self.plans.pop(lane)
            new = None
            if request in book.members:
                new = plan(book.members[request] + iteration)
            elif request in book.targets:
                new = plan(self.executor.members.stored(self.executor.lanes[lane], request))
            if new is not None and all(span.instance in self.up for span in new):
                book.todo["place"] = ((request, new),)
                self.did["switch"] += 1
        super()._flush(lane)
        for request in gone:
            self.tokens[request] = 0

    # ------------------------------------------------------------ draws

    def route(self, simple=False):
        """Stages over instances that hold the layers; None where nobody does."""
        rng, stages, low = self.rng, [], 0
        most = 1 if simple or rng.random() < 0.4 else rng.randint(2, 4)
        while low < self.case.layers:
            reach = {}
            for instance in self.up:
                high = low
                while high < self.case.layers and self.memory(instance).resident[high]:
                    high += 1
                if high > low:
                    reach[instance] = high
            if not reach:
                return None
            if len(stages) + 1 >= most:
                furthest = max(reach.values())
                instance, high = rng.choice([item for item in reach.items() if item[1] == furthest])
            else:
                instance, furthest = rng.choice(list(reach.items()))
                high = rng.randint(low + 1, furthest)
            stages.append(Stage(instance, (low, high)))
            low = high
        return tuple(stages)

    def rectangle(self, last):
        """Some layers, some whole blocks below block `last` (or all that is to come)."""
        rng, layers = self.rng, self.case.layers
        low = rng.randrange(layers) if rng.random() < 0.5 else 0
        high = rng.randint(low + 1, layers) if rng.random() < 0.5 else layers
        start = rng.randrange(last)
        end = start + 1 if rng.random() < 0.3 else rng.randint(start + 1, last)
        return Rectangle((low, high), start * self.size, end * self.size)

    def placement(self, route, request):
        spans = tuple(Span(stage.instance, stage.layers, 0, None) for stage in route)
        last = self.blocks(sum(self.case.lengths[request])) + 2
        for _ in range(self.rng.choice((0, 1, 1, 2, 3, 5))):
            box = self.rectangle(last)
            if self.rng.random() < 0.3:
                box = box._replace(token_end=None)
            spans = move(spans, box, self.rng.choice(self.up))
        return spans

    # ------------------------------------------------------------ moves

    def copies(self, request, tokens, pieces):
        """Commands for (instance, tier, goal, layers, blocks) pieces; a story that is sent their answers."""
        waits = []
        for instance, tier, goal, low, high, first, last in pieces:
            start, end = first * self.size, min(last * self.size, tokens)
            if tier is Tier.DRAM and instance == goal and self.rng.random() < 0.7:
                waits.append(self.ask(SwapSpan, request, instance, (low, high), (start, end), False))
                self.did["swap in"] += 1
                continue
            cuts = [start, end]
            if end - start > 2 and self.rng.random() < 0.3:
                cuts.insert(1, self.rng.randrange(start + 1, end))  # inside a block, most often
            for one, other in pairwise(cuts):
                pace = self.rng.choice((None, None, 7))
                waits.append(self.ask(CopySpan, request, instance, goal, (low, high), (one, other), src_tier=tier,
                                      pace=pace, priority=self.rng.randrange(3)))  # fmt: skip
            self.did["copy"] += 1
            self.did["band"] += high - low < self.case.layers
        answers = []
        yield from self.explode()
        for wait in waits:
            answers.append((yield wait))
        return all(answer.status is Status.OK for answer in answers)

    def explode(self):
        """The loss that was planned happens now, whatever is on its way."""
        if self.fuse is not None:
            instance, self.fuse = self.fuse, None
            self.mark("kill", instance)
            yield lambda: ("gone", instance) in self.happened
            yield self.ask(SetTimer, self.now)
            self.did["loss"] += 1

    def gather(self, request, spans, tokens):
        """Bring a parked request's KV to where `spans` want it; False if that cannot be."""
        grids, pieces, cells = self.where(request, tokens), [], Counter()
        for goal, want in self.wanted(spans, tokens).items():
            missing = want & ~grids.get((goal, Tier.HBM), np.zeros_like(want))
            for (instance, tier), grid in grids.items():
                if instance not in self.up:
                    continue
                for box in boxes(missing & grid):
                    pieces.append((instance, tier, goal, *box))
                    cells[goal] += (box[1] - box[0]) * (box[3] - box[2])
                missing &= ~grid
            if missing.any():
                self.forget(request)
                return False
        if not self.fits(cells):
            return False
        if not (yield from self.copies(request, tokens, pieces)):
            self.forget(request)
            return False
        return True

    def tidy(self, request, spans, tokens):
        """Free what a placement does not name."""
        want = self.wanted(spans, tokens)
        for (instance, tier), grid in self.where(request, tokens).items():
            if tier is Tier.HBM and instance in want:
                grid = grid & ~want[instance]
            for low, high, first, last in boxes(grid):
                area = (first * self.size, min(last * self.size, tokens))
                self.do(FreeSpan(instance, request, (low, high), area, tier=tier))

    def go(self, request, simple=False):
        """A request outside lanes gets a route and a placement; its KV goes there, and it runs."""
        yield self.ask(SetTimer, self.now)  # the books that are read here follow commands only then
        if self.over(request) or self.lane_of(request) is not None:
            return False
        route = self.route(simple)
        if route is None:
            yield from self.restore(request, force=True)
            return False
        spans = self.placement(route, request)
        if simple:
            spans = tuple(Span(stage.instance, stage.layers, 0, None) for stage in route)
        tokens = self.tokens[request]
        if tokens and not (yield from self.gather(request, spans, tokens)):
            return False
        needed = {*(span.instance for span in spans), *(stage.instance for stage in route)}
        if not needed <= set(self.up) or not all(self.memory(s.instance).has(s.layers) for s in route):
            self.forget(request)
            return False
        if tokens and (simple or tokens % self.size or self.rng.random() < 0.7):  # else replicas stay where they are
            self.tidy(request, spans, tokens)
        target, known = self.known[request], self.known[request]
        if target - tokens > 1 and self.rng.random() < 0.3:  # the prompt in two entries
            target = self.rng.randrange(tokens + 1, target)
        new, charge = self.wanted(spans, target), Counter()
        for instance, want in new.items():
            here = self.where(request, tokens).get((instance, Tier.HBM)) if tokens else None
            have = np.zeros_like(want)
            if here is not None:
                have[:, : here.shape[1]] = here
            charge[instance] = int((want & ~have).sum())
        final = self.blocks(sum(self.case.lengths[request])) - self.blocks(target)
        others = self.reserve() - self.case.layers * (
            self.blocks(sum(self.case.lengths[request])) - self.blocks(tokens))  # fmt: skip
        if not self.fits(charge, others + self.case.layers * final):
            return False
        lane = next((lane for lane, has in self.routes.items() if has == route), None)
        if lane is None or self.rng.random() < 0.3:
            lane = len(self.routes)
        self.routes[lane] = route
        default = spans == tuple(Span(stage.instance, stage.layers, 0, None) for stage in route)
        generated = known > self.case.lengths[request][0]
        decode = tokens == known - 1 and generated and self.rng.random() < 0.8
        entry = Entry(request, tokens, target, sample=target == known, decode=decode,
                      placement=None if default else spans)  # fmt: skip
        self.did["rejoin" if tokens else "recompute" if generated else "join"] += 1
        self.did["spread"] += not default
        budget = self.rng.choice((3, 7, 16, 64, 2048))
        yield self.change(lane, stages=route, add=(entry,), token_budget=budget)
        return True

    def shift(self, request, kind="shift"):
        """Of a request in a lane, some of the plane goes elsewhere, at a boundary."""
        lane = self.lane_of(request)
        if lane is None:
            return
        yield self.change(lane)
        yield self.ask(SetTimer, self.now)
        book = self.books[lane]
        if self.lane_of(request) != lane:
            return
        route = book.stages
        stored = self.executor.members.stored(self.executor.lanes[lane], request)
        old = book.placements.get(request) or tuple(Span(s.instance, s.layers, 0, None) for s in route)
        full = stored // self.size
        new, later = self.redrawn(kind, old, route, full)
        if new is None or not all(span.instance in self.up for span in old):
            return
        before, after, grids = self.wanted(old, full * self.size), self.wanted(new, full * self.size), {}
        if full:
            grids = self.where(request, full * self.size)
        pieces, cells = self.lacking(before, after, grids)
        if kind == "append":  # what a running prefill will append there is booked there at the switch
            extra = self.blocks(self.charged(request)) - full
            cells.update({instance: extra * self.case.layers for instance in after})
        if not self.fits(cells):
            return
        moved = yield from self.copies(request, full * self.size, pieces)
        if not moved or self.lane_of(request) != lane:
            if self.lane_of(request) == lane:
                self.leave_only(request, old, full * self.size, pieces)
            return
        done = []

        def plan(now):
            if now > later:
                return None
            done.append(True)
            return new

        self.plans[lane] = (request, plan)
        yield self.change(lane)
        self.plans.pop(lane, None)
        if self.lane_of(request) == lane:
            self.leave_only(request, new if done else old, full * self.size, pieces)
            if done:
                self.drop_old(request, before, after, route, full * self.size)

    def redrawn(self, kind, old, route, full):
        """Another placement, and the token before which it must be taken; (None, _): nothing to move yet."""
        if kind == "append":
            low = self.rng.randrange(self.case.layers)
            later = (full + self.rng.randint(1, 2)) * self.size
            box = Rectangle((low, self.rng.randint(low + 1, self.case.layers)), later, None)
            return move(old, box, self.rng.choice(self.up)), later
        if not full:
            return None, 0
        if kind == "shift":
            return move(old, self.rectangle(full), self.rng.choice(self.up)), 1 << 60
        for stage in route:
            old = move(old, Rectangle(stage.layers, 0, full * self.size), stage.instance)
        return old, 1 << 60

    def lacking(self, before, after, grids):
        """Pieces to copy from where the plane is to where it is to be, and the cells that they take."""
        pieces, cells = [], Counter()
        for goal, want in after.items():
            nothing = np.zeros_like(want)
            missing = want & ~before.get(goal, nothing) & ~grids.get((goal, Tier.HBM), nothing)
            for instance, grid in before.items():
                for piece in boxes(missing & grid):
                    pieces.append((instance, Tier.HBM, goal, *piece))
                    cells[goal] += (piece[1] - piece[0]) * (piece[3] - piece[2])
        return pieces, cells

    def leave_only(self, request, placement, tokens, pieces):
        """Free copies that were made in vain."""
        want = self.wanted(placement, tokens)
        for _, _, goal, low, high, first, last in pieces:
            mask = np.zeros((self.case.layers, self.blocks(tokens)), bool)
            mask[low:high, first:last] = True
            for box in boxes(mask & ~want.get(goal, np.zeros_like(mask))):
                self.do(FreeSpan(goal, request, box[:2], (box[2] * self.size, min(box[3] * self.size, tokens))))

    def drop_old(self, request, before, after, route, tokens):
        """Free at creditors what the placement named there before; at home it is free already."""
        for instance, grid in before.items():
            gone = grid & ~after.get(instance, np.zeros_like(grid))
            for low, high, first, last in boxes(gone):
                self.do(FreeSpan(instance, request, (low, high), (first * self.size, min(last * self.size, tokens))))

    def home(self, request):
        yield from self.shift(request, "home")

    def append(self, request):
        yield from self.shift(request, "append")

    def park(self, request):
        lane = self.lane_of(request)
        if lane is not None:
            yield self.change(lane)
            yield self.change(lane, park=(request,))
            self.did["park"] += 1

    def preempt(self, request):
        lane = self.lane_of(request)
        if lane is not None:
            yield self.change(lane)
            yield self.change(lane, remove=(request,))
            self.did["preempt"] += 1

    def swap(self, request):
        """Out to the host; whoever runs the request next brings it back."""
        yield from self.park(request)
        yield self.ask(SetTimer, self.now)  # the books that are read here follow commands only then
        if self.over(request) or self.lane_of(request) is not None or not self.tokens[request]:
            return
        waits = []
        for held in list(self.executor.state.held.get(request, ())):
            if held.tier is Tier.HBM and held.ready and self.rng.random() < 0.8:
                cells = held.cells(self.size)
                if self.memory(held.instance).host_room() >= cells:
                    waits.append(self.ask(SwapSpan, request, held.instance, held.layers, (held.start, held.end), True))
                    self.did["swap out"] += 1
        yield from self.explode()
        if waits:
            yield self.both(*waits)

    # ------------------------------------------------------------ parameters, instances

    def drop(self, _):
        """Some layers of an instance go; whoever runs on them is parked where it is."""
        yield self.ask(SetTimer, self.now)
        instance = self.rng.choice(self.up)
        memory, layers = self.memory(instance), self.case.layers
        low = self.rng.randrange(layers)
        high = self.rng.randint(low + 1, layers)
        others = [self.memory(other).resident for other in self.up if other != instance]
        safe = not others or all(any(other[layer] for other in others) for layer in range(low, high))
        if not memory.has((low, high)) or not safe:
            return
        hit = [lane for lane, book in self.books.items() if any(
            stage.instance == instance and stage.layers[0] < high and low < stage.layers[1] for stage in book.stages)]
        for lane in hit:
            yield self.change(lane)
            book = self.books[lane]
            if book.members or book.targets:
                yield self.change(lane, park=(*book.members, *book.targets))
            yield lambda book=book: book.step is None
        if instance not in self.up or any(self.books[lane].members or self.books[lane].targets for lane in hit):
            return
        for lane in hit:
            self.books[lane].stages = ()
        yield self.ask(DropLayers, instance, (low, high))
        self.did["drop"] += 1

    def restore(self, request, force=False):
        """Layers come back under whatever runs: compact, then load from a peer or from the host."""
        yield self.ask(SetTimer, self.now)
        lacking = [index for index in self.up if not all(self.memory(index).resident)]
        if not lacking:
            return
        instance = self.rng.choice(lacking)
        memory = self.memory(instance)
        missing = [layer for layer, here in enumerate(memory.resident) if not here]
        low, high = missing[0], missing[-1] + 1
        if not force and self.rng.random() < 0.4:
            low = self.rng.choice(missing)
            high = low + 1
        returning = sum(low <= layer < high for layer in missing)
        goal = memory.full_capacity(returning)
        if memory.used + self.reserve() > goal:
            if not force:
                return
            for other in self.live:
                if self.lane_of(other) is None:
                    self.forget(other)
        if memory.used + self.reserve() > goal:
            return
        shrunk = yield self.ask(ShrinkKV, instance, min(goal, memory.capacity))
        peers = [peer for peer in self.up if peer != instance and self.memory(peer).has((low, high))]
        source = self.rng.choice([None, *peers])
        if shrunk.status is Status.OK and instance in self.up:
            loaded = self.ask(LoadLayers, instance, (low, high), source, self.rng.randrange(2))
            yield from self.explode()
            answer = yield loaded
            self.did["restore"] += answer.status is Status.OK
            self.did["peer"] += answer.status is Status.OK and source is not None

    def breathe(self, request):
        """Layers go, whoever had to wait runs on in the larger range, and the layers come back under it."""
        yield from self.drop(request)
        for other in self.live:
            yield from self.go(other)
        yield self.ask(SetTimer, self.now + 60 * US)
        yield from self.restore(request)

    def kill(self, request):
        """An instance will die in the middle of the next move; instance 0 lives."""
        others = [index for index in self.up if index]
        if others and self.fuse is None and self.rng.random() < 0.5:
            self.fuse = self.rng.choice([index for index in others if self.memory(index).used] or others)
        yield lambda: True

    def wait(self, request):
        yield lambda: True
