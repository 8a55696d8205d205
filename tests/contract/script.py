"""Policies written as stories: what the contract walks are made of.

A `Script` runs one generator per agent. A story emits commands and yields what it waits for; the script keeps the
lanes' books (who is in them, how far they are) and resubmits steps that merely met their limit. So a story reads in
the order of its mechanism and is the same at any leap and in any runtime.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, ClassVar, NamedTuple

from common.policy import Gauge
from common.types import (
    ClusterInfo,
    Command,
    Entry,
    Event,
    InstanceLost,
    InstanceUp,
    Interrupt,
    Mark,
    MessageArrived,
    Placement,
    Progress,
    RequestArrived,
    RunStep,
    Send,
    Stage,
    Status,
    StepDone,
)
from tests.fakes import FakeWorkload

Wait = Callable[[], Any]  # false until what is waited for has happened, then what the story is sent
Story = Generator[Wait, Any, None]


class World(NamedTuple):
    """The cluster that a walk needs, in terms that every runtime can build."""

    instances: int
    blocks: int  # KV blocks of all layers, per instance
    layers: int = 4
    block_size: int = 16
    running: int | None = None  # how many instances run from the start; None: all
    host_blocks: int = 0


class Book:
    """What the script knows of a lane. `members`: request -> stored tokens minus the lane's iterations."""

    def __init__(self) -> None:
        self.members: dict[int, int] = {}
        self.targets: dict[int, Entry] = {}
        self.iteration = 0
        self.step: int | None = None
        self.stages: tuple[Stage, ...] = ()
        self.placements: dict[int, Placement] = {}
        self.stopping = False
        self.todo: dict[str, Any] = {}
        self.flushes = 0


class Script:
    """Base of the walks; `leap` bounds every step, so that the same story runs in leaps of any size."""

    world: ClassVar[World]
    workload: ClassVar[FakeWorkload]
    cached_blocks: ClassVar[dict[int, int]] = {}  # what the walk leaves in the caches, by instance

    def __init__(self, info: ClusterInfo, leap: int | None = None) -> None:
        self.info = info
        self.leap = leap
        self.now = 0
        self.out: list[Command] = []
        self.books: dict[int, Book] = {}
        self.tokens: dict[int, int] = {}  # stored tokens of requests outside lanes
        self.known: dict[int, int] = {}  # known tokens of requests outside lanes
        self.answers: dict[int, Any] = {}
        self.happened: set[tuple[str, int]] = set()
        self.mail: dict[str, deque[Any]] = {}
        self.reports: deque[Progress] = deque()
        self.num_sampled = 0  # tokens sampled at the end of a prefill
        self._next_id = 0
        self._stories: list[tuple[Story, Wait]] = []

    def agents(self) -> Iterable[Story]:
        """The stories that run side by side; they share nothing but messages."""
        raise NotImplementedError

    # ------------------------------------------------------------ contract

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """Keep the books, then let every story go on that waits no more."""
        if not self._next_id:
            self._next_id = 1
            self._stories = [(story, next(story)) for story in self.agents()]
        self.now, self.out = now_ns, []
        self._note(event)
        moved = True
        while moved:
            moved = False
            for index, (story, wait) in enumerate(self._stories):
                value = wait()
                if value:
                    moved = True
                    try:
                        self._stories[index] = (story, story.send(value))
                    except StopIteration:
                        self._stories[index] = (story, lambda: None)
        return self.out

    def gauges(self) -> Iterable[Gauge]:
        """None: walks are not plotted."""
        return ()

    # ------------------------------------------------------------ what stories say

    def do(self, command: Command) -> None:
        """Emit a command that is not answered."""
        self.out.append(command)

    def ask(self, kind: Any, *args: Any, **more: Any) -> Wait:
        """Emit a command that is answered; wait for the event."""
        self._next_id += 1
        command_id = self._next_id
        self.out.append(kind(command_id, *args, **more))
        return lambda: self.answers.get(command_id)

    def tell(self, sender: str, to: str, payload: Any) -> None:
        """Send a message to another agent."""
        self.out.append(Send(sender, to, payload))

    def mark(self, kind: str, instance: int = -1) -> None:
        """Leave a milestone in the record."""
        self.out.append(Mark(instance, kind))

    def change(self, lane: int, **what: Any) -> Wait:
        """Change a lane's batch or route at its next boundary (with nothing to change: learn how far it is there);
        wait until that has been submitted."""
        book = self.books.setdefault(lane, Book())
        goal = book.flushes + 1
        for key, value in what.items():
            if key == "stages":
                if value != book.stages:
                    book.todo[key] = book.stages = value
            else:
                book.todo[key] = book.todo.get(key, ()) + value if isinstance(value, tuple) else value
        if book.step is None:
            self._flush(lane)
        elif not book.stopping:
            book.stopping = True
            self.out.append(Interrupt(lane))
        return lambda: book.flushes >= goal or (book.step is None and not book.todo)

    def again(self, request_id: int) -> Entry:
        """The entry with which a parked request goes on decoding."""
        return Entry(request_id, self.tokens[request_id], self.tokens[request_id] + 1, decode=True)

    def stored(self, request_id: int) -> int:
        """Stored tokens by the last report of the request's lane."""
        for book in self.books.values():
            if request_id in book.members:
                return book.members[request_id] + book.iteration
        return self.tokens[request_id]

    def step(self, lane: int) -> int | None:
        """The lane's running step."""
        return self.books[lane].step

    # ------------------------------------------------------------ what stories wait for

    def arrived(self, *requests: int) -> Wait:
        """All of these requests have arrived."""
        return self._all("arrived", requests)

    def reached(self, *requests: int) -> Wait:
        """All of these requests have been computed up to the target of their last entry."""
        return self._all("reached", requests)

    def finished(self, *requests: int) -> Wait:
        """All of these requests have finished."""
        return self._all("finished", requests)

    def lost(self, *requests: int) -> Wait:
        """All of these requests were in lanes of an instance that died."""
        return self._all("lost", requests)

    def instance(self, *instances: int) -> Wait:
        """All of these instances are up."""
        return self._all("up", instances)

    def message(self, to: str) -> Wait:
        """The next message to an agent."""
        box = self.mail.setdefault(to, deque())
        return lambda: box.popleft() if box else None

    def both(self, *waits: Wait) -> Wait:
        """All of them; the story is sent their values."""
        values: list[Any] = [None] * len(waits)

        def ready() -> tuple[Any, ...] | None:
            for index, wait in enumerate(waits):
                values[index] = values[index] or wait()
            return tuple(values) if all(values) else None

        return ready

    def progress(self) -> Wait:
        """The next report of a watched instance from now on."""
        self.reports.clear()
        return lambda: self.reports.popleft() if self.reports else None

    def _all(self, what: str, ids: tuple[int, ...]) -> Wait:
        return lambda: all((what, one) in self.happened for one in ids)

    # ------------------------------------------------------------ books

    def _note(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._step_done(event)
        elif isinstance(event, RequestArrived):
            self.happened.add(("arrived", event.request_id))
            self.known[event.request_id] = event.prompt_tokens
        elif isinstance(event, MessageArrived):
            self.mail.setdefault(event.to, deque()).append(event)
        elif isinstance(event, InstanceUp) and event.status is Status.OK:
            self.happened.add(("up", event.instance))
        elif isinstance(event, Progress):
            self.reports.append(event)
        elif isinstance(event, InstanceLost):
            self.happened.add(("gone", event.instance))
        if not isinstance(event, StepDone):
            for lane, iterations in getattr(event, "lanes", ()):
                if lane in self.books:
                    self.books[lane].iteration = iterations
            if getattr(event, "command_id", -1) >= 0:
                self.answers[event.command_id] = event  # type: ignore[union-attr]

    def _step_done(self, event: StepDone) -> None:
        book = self.books[event.lane]
        book.iteration, book.step, book.stopping = event.lane_iterations, None, False
        for request_id, at in event.prefilled:
            entry = book.targets.pop(request_id)
            self.happened.add(("reached", request_id))
            self.num_sampled += entry.sample
            if entry.leave or not entry.sample:
                self.tokens[request_id] = entry.target
                self.known[request_id] = max(self.known[request_id], entry.target + entry.sample)
            else:
                book.members[request_id] = entry.target - at
        for request_id in event.finished:
            self._out_of(book, request_id)
            self.happened.add(("finished", request_id))
        if event.status is not Status.OK:
            for request_id in [*book.members, *book.targets]:
                where: list[Any] = [*book.stages, *book.placements.get(request_id, ())]
                if any(("gone", part.instance) in self.happened for part in where):
                    self._out_of(book, request_id)
                    self.happened.add(("lost", request_id))
        if book.todo or book.members or book.targets:
            self._flush(event.lane)

    def _out_of(self, book: Book, request_id: int) -> None:
        book.placements.pop(request_id, None)
        if request_id in book.members:
            self.tokens[request_id] = book.members.pop(request_id) + book.iteration
            self.known[request_id] = self.tokens[request_id] + 1
        else:
            book.targets.pop(request_id, None)

    def _flush(self, lane: int) -> None:
        book = self.books[lane]
        todo, book.todo = book.todo, {}
        for kind in ("remove", "park"):  # some may have finished on the way to this boundary
            if kind in todo:
                todo[kind] = tuple(one for one in todo[kind] if one in book.members or one in book.targets)
        for request_id in (*todo.get("remove", ()), *todo.get("park", ())):
            self._out_of(book, request_id)
        book.placements.update(todo.get("place", ()))
        for entry in todo.get("add", ()):
            book.placements[entry.request_id] = entry.placement or ()
            self.happened.discard(("reached", entry.request_id))
            if entry.decode:
                book.members[entry.request_id] = entry.computed - book.iteration
            else:
                book.targets[entry.request_id] = entry
        book.flushes += 1
        self._next_id += 1
        book.step = self._next_id
        self.out.append(RunStep(book.step, lane, max_iterations=self.leap, **todo))
