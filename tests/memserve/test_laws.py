"""Laws of the whole policy in the simulator: the ledger after every event, pins at the end, no request lost."""

from __future__ import annotations

from hypothesis import given

from tests.laws.strategies import law
from tests.memserve.lib import run, scenarios


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
