"""Queueing theory: with one request at a time an instance is a single server, and must wait as one does."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from common.driver import drive
from common.executors.sim import SimExecutor
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import Rule
from systems.baselines.vllm import VllmPolicy
from tests.fakes import FakeCost, FakeWorkload, cluster

TICK = 1_000  # ns an iteration takes, whatever is in it
MEAN = 1_000  # tokens, and so ticks, of a mean reply
NUM = 40_000


class TickCost(FakeCost):
    """Service time = output tokens: the prompt's iteration gives the first."""

    def iteration_ns(self, chunks, num_decodes, context, num_logits):
        return TICK

    def decode_prefix(self, batch, upto):
        return list(accumulate([TICK] * (2 * upto + 64), initial=0))


def serve(gaps, outputs, instances=1, dispatch="round_robin", max_num_seqs=1, sample_ns=0):
    """Run requests of one prompt token; the record."""
    workload = FakeWorkload(list(accumulate(gaps)), [1] * len(outputs), outputs)
    model = cluster(instances, 1 << 20, cost=lambda layers, first, last: TickCost(layers, first, last))
    record = RunRecord(RequestColumns.empty(len(outputs)))
    policy = VllmPolicy(model.info(), EngineConfig(16, 64, max_num_seqs, Rule.CHUNKED), dispatch)
    drive(policy, SimExecutor(model, workload, record), record, sample_ns=sample_ns)
    return record


def waits(record):
    """Time in queue, in ticks."""
    columns = record.requests
    return [(first - arrival) / TICK - 1 for first, arrival in zip(columns.first_token_ns, columns.arrival_ns)]


def quantiles(rng, mean, num):
    """`num` draws of an exponential whose histogram is exact: only their order is left to chance. That takes out most
    of the variance of a mean waiting time, without any bias of its mean or second moment."""
    from math import log1p

    draws = [-mean * log1p(-(rank + 0.5) / num) for rank in range(num)]
    rng.shuffle(draws)
    return draws


def lindley(gaps, services):
    """Waiting times of a single server, first come first served."""
    wait, found = 0, []
    for index, service in enumerate(services):
        found.append(wait)
        if index + 1 < len(services):
            wait = max(0, wait + service - gaps[index + 1])
    return found


@pytest.mark.parametrize("exponential", (True, False), ids=("M/M/1", "M/D/1"))
def test_waiting_time_is_that_of_theory(exponential):
    """Pollaczek-Khinchine within 2% at half load; and every single wait as Lindley's recursion has it, to the ns."""
    rng = random.Random(11)
    rho = 0.5
    outputs = [max(1, round(draw)) for draw in quantiles(rng, MEAN, NUM)] if exponential else [MEAN] * NUM
    gaps = [round(draw * TICK) for draw in quantiles(rng, MEAN / rho, NUM)]
    found = waits(serve(gaps, outputs))
    expected = rho * MEAN / (1 - rho) if exponential else rho * MEAN / (2 * (1 - rho))
    assert sum(found) / NUM == pytest.approx(expected, rel=0.02)
    exact = [wait / TICK for wait in lindley(gaps, [output * TICK for output in outputs])]
    # An idle server starts at once; a busy one is taken over at a boundary: both exactly.
    assert max(abs(mine - theirs) for mine, theirs in zip(found, exact)) < 1e-6


def test_a_server_that_is_twice_overloaded_serves_at_full_rate():
    rng = random.Random(5)
    outputs = [1 + int(rng.expovariate(1 / 50)) for _ in range(2000)]
    record = serve([25 * TICK] * 2000, outputs)
    assert max(record.requests.finish_ns) == 25 * TICK + sum(outputs) * TICK


def test_least_outstanding_waits_less_than_round_robin():
    rng = random.Random(7)
    outputs = [1 + int(rng.expovariate(1 / 200)) for _ in range(6000)]
    gaps = [round(rng.expovariate(1 / (200 / 0.8 / 4)) * TICK) for _ in range(6000)]
    mean = {dispatch: sum(waits(serve(gaps, outputs, 4, dispatch))) / 6000
            for dispatch in ("round_robin", "least_outstanding")}  # fmt: skip
    assert mean["least_outstanding"] < 0.6 * mean["round_robin"]


@pytest.mark.parametrize(("instances", "max_num_seqs"), ((1, 1), (3, 4)))
def test_littles_law(instances, max_num_seqs):
    """Requests that the policy's gauges show, averaged over time, = arrival rate x mean time in the system."""
    rng = random.Random(3)
    num = 3000
    outputs = [1 + int(rng.expovariate(1 / 60)) for _ in range(num)]
    gaps = [round(rng.expovariate(1 / (60 / 0.7 / instances / max_num_seqs)) * TICK) for _ in range(num)]
    record = serve(gaps, outputs, instances, "least_outstanding", max_num_seqs, sample_ns=1)
    rows, columns = record.timeline, record.requests
    area, counts, before = 0, {}, 0
    for row, now in enumerate(rows.time_ns):  # every event is sampled: the counts are those until the next
        area += sum(counts.values()) * (now - before)
        before = now
        counts[rows.instance[row]] = rows.running[row] + rows.waiting[row]
    sojourn = sum(finish - arrival for finish, arrival in zip(columns.finish_ns, columns.arrival_ns))
    assert area == pytest.approx(sojourn, rel=1e-9)
