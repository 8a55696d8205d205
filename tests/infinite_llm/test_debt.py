"""Laws of v1 (`mode=debt`): the ledger, candidates in turn, the cap, and DGFM."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from systems.infinite_llm.debt_gmanager import DebtGManager
from systems.infinite_llm.dgfm import cancel, find_cycle
from systems.infinite_llm.ledger import NUM_CANDIDATES, DebtLedger
from tests.infinite_llm.test_laws import assert_all_ended
from tests.infinite_llm.worlds import CYCLE, World, crowded, worlds

NIGHTLY = bool(os.environ.get("KVPLANE_NIGHTLY"))
LAW = settings(max_examples=2000 if NIGHTLY else 60, deadline=None, derandomize=not NIGHTLY,
               suppress_health_check=list(HealthCheck),
               phases=tuple(Phase) if NIGHTLY else (Phase.explicit, Phase.generate))  # fmt: skip

NODE = st.integers(0, 5)


@LAW
@given(worlds(debt=True))
def test_nobody_waits_for_ever_and_nothing_is_left(world: World) -> None:
    assert_all_ended(world.run())


def assert_capped(run) -> None:
    for manager in run.policy.managers.values():
        assert manager.creditor.lent.total <= int(run.world.settings.lend_cap * manager.lane.num_blocks)


@LAW
@given(worlds(debt=True, faults=False, losses=False))
def test_lent_is_borrowed_and_nobody_lends_beyond_the_cap(world: World) -> None:
    run = world.start()
    run.drive(lambda now, event: assert_capped(run))  # lent = borrowed: checked after every event
    assert_all_ended(run)
    assert run.drained


def used(edges, instance: int, own: dict[int, int]) -> int:
    """Blocks taken at an instance: its own KV at home, and what it has lent."""
    owed = sum(edges.get(instance, {}).values())
    return own[instance] - owed + sum(row.get(instance, 0) for row in edges.values())


@st.composite
def debts(draw):
    nodes = range(draw(st.integers(2, 6)))
    pairs = draw(st.dictionaries(st.tuples(st.sampled_from(nodes), st.sampled_from(nodes)), st.integers(1, 20)))
    edges: dict[int, dict[int, int]] = {}
    for (debtor, creditor), blocks in pairs.items():
        if debtor != creditor:
            edges.setdefault(debtor, {})[creditor] = blocks
    return edges, len(nodes), draw(st.integers(1, 8)), draw(st.integers(0, 6))


def reaches(edges, threshold: int, source: int, goal: int) -> bool:
    seen, todo = set(), [source]
    while todo:
        for creditor, blocks in edges.get(todo.pop(), {}).items():
            if blocks >= threshold and creditor == goal:
                return True
            if blocks >= threshold and creditor not in seen:
                seen.add(creditor)
                todo.append(creditor)
    return False


@LAW
@given(debts())
def test_a_pass_lowers_total_debt_and_changes_nobodys_use(case) -> None:
    edges, num, threshold, start = case
    cycle = find_cycle(edges, threshold, start)
    assert bool(cycle) == any(reaches(edges, threshold, node, node) for node in range(num))
    if not cycle:
        return
    assert len(set(cycle)) == len(cycle) >= 2
    own = dict.fromkeys(range(num), 10_000)
    after, blocks = cancel(edges, cycle)
    assert blocks >= threshold
    before_total, after_total = (sum(sum(row.values()) for row in table.values()) for table in (edges, after))
    assert before_total - after_total == len(cycle) * blocks
    assert all(used(edges, node, own) == used(after, node, own) for node in range(num))


@LAW
@given(st.lists(st.tuples(NODE, st.integers(0, 40), st.dictionaries(NODE, st.integers(0, 30))), max_size=8), NODE,
       st.sampled_from((0.25, 1.0)))  # fmt: skip
def test_candidates_are_three_at_most_near_first_and_within_the_cap(news, debtor: int, cap: float) -> None:
    ledger = DebtLedger(cap)
    for now, (instance, free, lent) in enumerate(news):
        ledger.heard(now, instance, free, lent, full=True)
    capacity = dict.fromkeys(range(6), 40)
    node = {i: i // 2 for i in range(6)}
    found = ledger.candidates(100, debtor, capacity, lambda i: node[i] != node[debtor])
    assert len(found) <= NUM_CANDIDATES and debtor not in dict(found)
    for creditor, spare in found:
        row = ledger.rows[creditor]
        assert 0 < spare <= row.free and sum(row.lent.values()) + spare <= cap * 40
    order = [(node[i] != node[debtor], -spare) for i, spare in found]
    assert order == sorted(order)
    for creditor, _ in found:
        ledger.refused(creditor, 200)
    again = ledger.candidates(150, debtor, capacity, lambda i: 0)
    assert not {i for i, _ in found} & {i for i, _ in again}, "a refusal pauses referrals"


class Passes:
    """What DGFM's passes of a run did."""

    def __init__(self, run) -> None:
        self.run = run
        self.before: dict[int, int] = {}
        self.number = -1
        self.balanced = self.ended = self.moved = 0

    def look(self, now: int, event) -> None:
        """After every event: did a pass begin or end?"""
        manager = self.run.policy.gmanager
        if not isinstance(manager, DebtGManager):
            return
        counts = {i: m.debtor.recaller.num_recalled for i, m in self.run.policy.managers.items()}
        repair = manager.repair
        if repair is not None and repair.number != self.number:
            self.number, self.before, self.current = repair.number, counts, repair
        if self.number >= 0 and self.current.over:
            moved = {i: counts[i] - self.before[i] for i in self.current.cycle}
            self.ended += 1
            self.moved += sum(moved.values())
            if self.current.balanced and self.current.moved:
                self.balanced += 1
                assert set(moved.values()) == {self.current.moved}, "everyone gives back as much as it gets"
            self.number = -1


@LAW
@given(crowded())
def test_passes_bring_the_same_number_home_everywhere(world: World) -> None:
    run = world.start()
    passes = Passes(run)
    run.drive(passes.look)
    assert_all_ended(run)


def test_a_cycle_of_debt_is_found_and_repaired() -> None:
    run = CYCLE.start()
    passes = Passes(run)
    run.drive(passes.look)
    assert_all_ended(run)
    assert passes.balanced and passes.moved and any(moved for _, moved in run.policy.gmanager.repairs)
