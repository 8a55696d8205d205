"""Losses by the wall clock, where the answers of those who live come late: of workers killed, of instances that are
lost while their workers live, and in the middle of a load."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import common.comm.hub
from common.build_local import decoder_spec, parameter_source
from common.comm import messages as say
from common.comm.hub import Gone, Hub, Timeouts
from common.comm.join import join_groups, knock, store_of
from common.executors.wall import WallExecutor
from common.types import RequestStatus
from tests.deadline import at_most
from tests.dist.pool import nothing_left, own_hub, own_hub_closed
from tests.dist.stories import STORIES, play
from tests.dist.test_kills import survive
from tests.engine.worlds import check_replies
from tests.laws.strategies import NIGHTLY

MEASURED = "runtime.clock=measured"
ROOT = Path(__file__).resolve().parents[2]
# Kills that once left a run waiting for ever for an answer that nobody wanted any more.
KNOWN = [("kunserve", 383, 0), ("infinite_llm", 300, 1)]


def drawn(name: str, seed: int) -> tuple[str, int, int]:
    rng = random.Random(f"wall {name} {seed}")
    return name, rng.randrange(60, 300), rng.randrange(STORIES[name].instances)


@pytest.mark.parametrize(
    ("name", "when", "victim"),
    [*KNOWN, *(drawn(name, seed) for name in STORIES for seed in range(12 if NIGHTLY else 1))],
)
def test_a_worker_dies_by_the_wall_clock(name: str, when: int, victim: int) -> None:
    survive(name, {when: victim}, MEASURED)


def played(name: str, *more: str, timeouts: Timeouts | None = None) -> Any:
    """A story in which everybody is served, as if undisturbed."""
    hub = own_hub(STORIES[name].instances, timeouts or Timeouts())
    with nothing_left(hub), at_most(120):
        made = play(STORIES[name], "dist", MEASURED, *more, hub=hub)
    config = STORIES[name].config("runtime=dist", *more)
    made.executor.world.source = parameter_source(config, decoder_spec(config, made.executor.world.spec.dtype))
    assert set(made.record.requests.status) == {RequestStatus.FINISHED} and check_replies(made.executor) > 0
    return made


@pytest.mark.parametrize("at_s", [0.2, 0.5, 1.0] if NIGHTLY else [0.5])
@pytest.mark.parametrize("name", [*STORIES] if NIGHTLY else ["kunserve", "infinite_llm"])
def test_an_instance_is_lost_whose_worker_lives(name: str, at_s: float) -> None:
    made = played(name, f"cluster.lost=[[{at_s},0]]")
    assert not made.report["lost_workers"]


def at_first_load(monkeypatch: pytest.MonkeyPatch, act: Callable[[WallExecutor, Any], None]) -> list[Any]:
    """Do something right after the first load from a peer has been ordered; the loads at which it was done."""
    loaded, done = WallExecutor.layers_loaded, list[Any]()

    def then_act(self: WallExecutor, command: Any, *rest: Any) -> None:
        loaded(self, command, *rest)
        if not done and command.source is not None:
            done.append(command)
            act(self, command)

    monkeypatch.setattr(WallExecutor, "layers_loaded", then_act)
    return done


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_source_is_lost_in_the_middle_of_a_load(monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    """Layers come from the parameter source of who loads."""

    def kill_it(executor: WallExecutor, load: Any) -> None:
        os.kill(executor.world.hub.processes[load.source + 1].pid or 0, how)

    done = at_first_load(monkeypatch, kill_it)
    made = played("kunserve", timeouts=Timeouts(60.0, 60.0, 60.0, 4.0))
    assert len(done) == 1 and list(made.report["lost_workers"]) == [str(done[0].source)]


def test_who_loads_is_lost_in_the_middle_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = at_first_load(
        monkeypatch, lambda executor, load: executor.control.lose_at(executor.state.now, load.instance))  # fmt: skip
    made = played("kunserve")
    assert len(done) == 1 and not made.report["lost_workers"]


def half_an_answer(environment: dict[str, str]) -> None:
    """A worker whose machine goes between two segments of a message."""
    os.environ.clear()
    os.environ.update(environment)
    store, rank, world_size = store_of(60.0)
    connection = knock(store, rank)
    terms = connection.recv()
    join_groups(store, rank, world_size, terms.backend, terms.start_s, terms.transfer_s, terms.teams)
    connection.recv()
    os.write(connection.fileno(), struct.pack("!i", 5000) + b"x" * 100)
    time.sleep(100)


def test_half_a_message_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    own_hub_closed()
    monkeypatch.setattr(common.comm.hub, "WORKER", half_an_answer)
    hub = Hub(1, Timeouts(60.0, 30.0, 30.0, 2.0))
    with nothing_left(hub), at_most(60), pytest.raises(Gone):
        hub.ask(1, say.Stop())
    assert hub.lost[1].startswith("hung")


@pytest.mark.parametrize("wrong", ["system.roles=xx", "system.roles=3P3D"])
def test_what_a_system_refuses_ends_the_process(wrong: str, tmp_path: Path) -> None:
    """Workers are there by then."""
    overrides = ["system=memserve", wrong, "workload=poisson", "runtime=dist", "model=tiny_llama", "hardware=cpu",
                 "cluster.num_instances=2", f"run.results={tmp_path}"]  # fmt: skip
    run = subprocess.run([sys.executable, "run.py", *overrides], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "roles" in run.stderr and "Traceback" not in run.stderr


def test_a_second_error_while_closing_does_not_keep_workers() -> None:
    from common.executors.dist import DistExecutor

    class Closing:
        arrived = None
        closed = False

        def close(self) -> None:
            self.closed = True

    class Failing:
        hub = Closing()

        def close(self) -> None:
            raise RuntimeError("a worker says something else")

    executor = DistExecutor.__new__(DistExecutor)
    executor.world, executor._own_hub = Failing(), True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="something else"):
        executor.close()
    assert Failing.hub.closed
