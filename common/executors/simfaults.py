"""Faults of agents and of what they say to each other. (Losses of instances: `simloss.py`.)

An agent that dies loses its state: its timers and watches end, and until it is back nothing reaches it or leaves it.
Messages on their way when it comes back still arrive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from common.executors.simstate import LOST, SimState
from common.types import AgentLost, Event, Send

if TYPE_CHECKING:
    import numpy as np

BEFORE_INSTANCES = -1  # of losses at one instant


class MessageFaults(Protocol):
    """Decides a message's fate: extra delays in ns, one per copy delivered (empty: lost)."""

    def deliveries(self, now_ns: int, message: Send) -> list[int]: ...


class RandomMessageFaults:
    """Each message by itself: lost with probability `loss`, else doubled with probability `duplicate`; every copy
    comes later by an exponential time of mean `delay_ns`."""

    def __init__(self, rng: np.random.Generator, delay_ns: float, loss: float, duplicate: float) -> None:
        self._rng, self._delay_ns, self._loss, self._duplicate = rng, delay_ns, loss, duplicate

    def deliveries(self, now_ns: int, message: Send) -> list[int]:
        """Four draws a message, whatever they decide: faults of one kind leave the others where they were."""
        lost, doubled = self._rng.random(2)
        first, second = self._rng.exponential(1.0, 2)
        delays = [int(first * self._delay_ns), int(second * self._delay_ns)]
        if lost < self._loss:
            return []
        return delays if doubled < self._duplicate else delays[:1]


class Agents:
    """Who is dead, and which life the others are in."""

    def __init__(self, state: SimState) -> None:
        self.state = state
        self._dead: set[str] = set()
        self._deaths: dict[str, int] = {}

    def plan(self, time_ns: int, agent: str, restart_ns: int) -> None:
        """Plan a death, and the restart so much later."""
        self.state.push(time_ns, LOST, BEFORE_INSTANCES, self._die, (agent, restart_ns))

    def alive(self, agent: str) -> bool:
        """Can it hear and speak?"""
        return agent not in self._dead

    def life(self, agent: str) -> int:
        """How often it has died: what it set in another life is void."""
        return self._deaths.get(agent, 0)

    def _die(self, plan: tuple[str, int], _: int) -> Event | None:
        agent, restart_ns = plan
        if agent in self._dead:
            return None
        self._dead.add(agent)
        self._deaths[agent] = self.life(agent) + 1
        self.state.push(self.state.now + restart_ns, LOST, BEFORE_INSTANCES, self._restart, agent)
        return AgentLost(agent, restarted=False)

    def _restart(self, agent: str, _: int) -> Event | None:
        self._dead.discard(agent)
        return AgentLost(agent, restarted=True)
