"""Requests that no instance works on: theirs is dead and that is not known yet, or no member can take them."""

from __future__ import annotations

from systems.memserve.job import Job


class Limbo:
    """See the module docstring. A request waits in one place at a time."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Job]] = {}  # by the dead instance
        self.orphans: list[Job] = []

    def __len__(self) -> int:
        return len(self.orphans) + sum(len(jobs) for jobs in self._waiting.values())

    def wait_for(self, instance: int, job: Job) -> None:
        """Until the death of this instance is known."""
        self._waiting.setdefault(instance, []).append(job)

    def orphan(self, job: Job) -> None:
        """Until somebody joins."""
        self.orphans.append(job)

    def forget(self, job: Job) -> None:
        """Wherever it waits: its P may die while it waits for its D's death."""
        for jobs in (self.orphans, *self._waiting.values()):
            if job in jobs:
                jobs.remove(job)

    def died(self, instance: int) -> list[Job]:
        """Its death is known: who may go on."""
        return self._waiting.pop(instance, [])

    def joined(self) -> list[Job]:
        """There is a new member: who may go on."""
        orphans, self.orphans = self.orphans, []
        return orphans
