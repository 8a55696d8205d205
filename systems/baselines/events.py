"""What the baselines without messages or timers react to: arrivals, step ends, and instances that come and go."""

from __future__ import annotations

from abc import ABC, abstractmethod

from common.sched.lane import Seq
from common.types import Command, Event, InstanceLost, InstanceUp, RequestArrived, Status, StepDone


class ServingEvents(ABC):
    """Hands each event to the method that it concerns; an instance that failed to start is nobody's."""

    def on_event(self, now_ns: int, event: Event) -> list[Command]:
        """React to one event."""
        out: list[Command] = []
        if isinstance(event, StepDone):
            self._step_done(event, out)
        elif isinstance(event, RequestArrived):
            seq = Seq(event.request_id, event.prompt_tokens, event.max_output_tokens, event.content, event.session)
            self._route(seq, out)
        elif isinstance(event, InstanceUp):
            if event.status is Status.OK:
                self._up(event, out)
        elif isinstance(event, InstanceLost):
            self._lost(event.instance, out)
        return out

    @abstractmethod
    def _step_done(self, event: StepDone, out: list[Command]) -> None: ...

    @abstractmethod
    def _route(self, seq: Seq, out: list[Command]) -> None: ...

    @abstractmethod
    def _up(self, event: InstanceUp, out: list[Command]) -> None: ...

    @abstractmethod
    def _lost(self, instance: int, out: list[Command]) -> None: ...
