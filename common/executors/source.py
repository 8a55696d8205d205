"""The client side of a run: when requests arrive, and which one a finish releases.

Open loop: by the workload's arrival times. Sessions: the next turn arrives at the finish of the previous one plus
think time. Closed loop: `concurrency` requests are outstanding; each finish releases the next in index order.
The client knows nothing about the system; true output lengths stay on this side of the contract.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

from common.types import Content

NEVER = 1 << 62


def integers(values: Sequence[int]) -> list[int]:
    """Plain ints of a sequence or array."""
    as_list = getattr(values, "tolist", None)
    found: list[int] = as_list() if as_list is not None else [int(value) for value in values]
    return found


class WorkloadLike(Protocol):
    """What the client reads of a workload (see `workloads.types.Workload`); lengths in tokens, times in ns."""

    @property
    def arrival_ns(self) -> Sequence[int]: ...
    @property
    def prompt_tokens(self) -> Sequence[int]: ...
    @property
    def output_tokens(self) -> Sequence[int]: ...
    @property
    def content(self) -> Sequence[Content] | None: ...
    @property
    def session(self) -> Sequence[int] | None: ...
    @property
    def release_after(self) -> Sequence[int] | None: ...
    @property
    def think_ns(self) -> Sequence[int] | None: ...
    @property
    def concurrency(self) -> int | None: ...
    @property
    def max_output_tokens(self) -> int: ...
    @property
    def model(self) -> Sequence[int] | None: ...  # of the cluster's models; None: there is one


class Client:
    """Requests in order of arrival; ties by request id."""

    def __init__(self, workload: WorkloadLike, frontend_ns: int = 0) -> None:
        self.frontend_ns = frontend_ns  # from the client's send to the scheduler; `next_ns` is at the scheduler
        self._arrivals = [value + frontend_ns for value in integers(workload.arrival_ns)]
        self.num_requests = num = len(self._arrivals)
        self._arrivals.append(NEVER)  # of what comes behind the last of `_open`
        release_after = workload.release_after
        self._think = workload.think_ns
        self._followers: dict[int, list[int]] = {}
        self._closed = workload.concurrency
        self._cursor = 0
        self._released: list[tuple[int, int]] = []
        self._open: Sequence[int]
        if self._closed is not None:
            first = min(self._closed, num)
            self._released = [(frontend_ns, index) for index in range(first)]
            self._next_closed = first
            self._open = (num,)
        elif release_after is not None:
            first_turns = []
            for index in range(num):
                before = int(release_after[index])
                if before >= 0:
                    self._followers.setdefault(before, []).append(index)
                else:
                    first_turns.append(index)
            self._open = [*sorted(first_turns, key=lambda index: (self._arrivals[index], index)), num]
        else:
            self._open = range(num + 1)
        self.next_ns = self._peek()

    def _peek(self) -> int:
        open_ns = self._arrivals[self._open[self._cursor]]
        if self._released and self._released[0][0] < open_ns:
            return self._released[0][0]
        return open_ns

    def pop(self) -> int:
        """The id of the request that arrives at `next_ns` (not `NEVER`)."""
        index = self._open[self._cursor]
        if not self._released:
            self._cursor += 1
            self.next_ns = self._arrivals[self._open[self._cursor]]
            return index
        if (self._arrivals[index], index) <= self._released[0]:
            self._cursor += 1
        else:
            index = heapq.heappop(self._released)[1]
        self.next_ns = self._peek()
        return index

    def ended(self, now_ns: int, request_id: int) -> None:
        """A request finished or was refused: release what waited for it."""
        if self._closed is not None:
            if self._next_closed < self.num_requests:
                heapq.heappush(self._released, (now_ns + self.frontend_ns, self._next_closed))
                self._next_closed += 1
                self.next_ns = self._peek()
        elif request_id in self._followers:
            for index in self._followers.pop(request_id):
                think = int(self._think[index]) if self._think is not None else 0
                heapq.heappush(self._released, (now_ns + think + self.frontend_ns, index))
            self.next_ns = self._peek()
