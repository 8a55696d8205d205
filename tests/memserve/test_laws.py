"""Laws of the whole policy in the simulator: the ledger after every event, pins at the end, no request lost."""

from __future__ import annotations

from hypothesis import given

from common.types import RequestStatus
from systems.memserve.config import Options
from tests.laws.strategies import law
from tests.memserve.lib import PLANNER, Scenario, Turn, run, scenarios


@law(150)
@given(scenarios())
def test_ledger_and_pins(scenario):
    """free + active + historical + in transfer = total per instance and tier, as the executor counts too."""
    run(scenario)


@law(150)
@given(scenarios(losses=True))
def test_failures_and_lost_messages(scenario):
    """Instances die and come back, messages are late, lost and doubled: every request still ends."""
    run(scenario)


def test_an_instance_lost_before_it_was_up_is_started():
    """Nobody ever heard of it: the manager knows from the configuration that it is missing."""
    options = Options(design="pd_basic", roles="1P1D", heartbeat_s=0.0005, timeout_s=0.0015, restart=True,
                      planner=PLANNER)  # fmt: skip
    _, executor = run(Scenario((Turn(0, 0, 40, 5),), (0,), options, 2, 10, 0, losses=((0, 1),)))
    assert list(executor.record.requests.status) == [RequestStatus.FINISHED]
