"""`system.mode=remote_attention` (the paper's first version): parameters drop, KV stays where it is, queries travel.

A request that straddles a drop goes on at once in the new pipeline. Per layer, the stage that has the parameters sends
its query to where the request's KV is and merges the partial result; what is computed from now on is stored at the
stages, so queries of later tokens meet a growing part at home. Nothing is exchanged and nobody stalls for it.
"""

from __future__ import annotations

from common.sched.laneset import LaneSet
from common.types import Command
from systems.kunserve.core import Core
from systems.kunserve.group import Group
from systems.kunserve.state import Happening


def stay(core: Core, group: Group, goal: LaneSet, out: list[Command]) -> None:
    """After a drop: everyone parked joins the pipeline, with a placement that names where its KV is."""
    parked, group.parked = group.parked, []
    group.happen(Happening.EXCHANGED, core.now_ns)
    group.parts = ()
    for seq, route in parked:
        seq.shared = core.spread.stays(seq.request_id, route, seq.computed)
        goal.join(seq, out)
