"""Queueing theory: with one request at a time an instance is a single server, and must wait as one does."""

from __future__ import annotations

import random
from itertools import accumulate
from math import log1p

import pytest

from common.driver import drive
from common.executors.sim import SimExecutor
from common.log import Delivered, Recorder
from common.record import RequestColumns, RunRecord
from common.sched.lane import EngineConfig
from common.types import Rule
from systems.baselines.vllm import VllmPolicy
from tests.fakes import FakeCost, FakeWorkload, cluster

TICK = 1_000  # ns an iteration takes, whatever is in it
MEAN = 1_000  # tokens, and so ticks, of a mean reply
NUM = 60_000


class TickCost(FakeCost):
    """Service time = output tokens: the prompt's iteration gives the first."""

    def iteration_ns(self, chunks, num_decodes, context, num_logits):
        return TICK

    def decode_prefix(self, batch, upto):
        return list(accumulate([TICK] * (2 * upto + 64), initial=0))


def serve(gaps, outputs, instances=1, dispatch="round_robin", max_num_seqs=1, present=None):
    """Run requests of one prompt token; the record."""
    workload = FakeWorkload(list(accumulate(gaps)), [1] * len(outputs), outputs)
    model = cluster(instances, 1 << 20, cost=lambda layers, first, last: TickCost(layers, first, last))
    record = RunRecord(RequestColumns.empty(len(outputs)))
    policy = VllmPolicy(model.info(), EngineConfig(16, 64, max_num_seqs, Rule.CHUNKED), dispatch)
    if present is not None:
        present.policy = policy
    executor = SimExecutor(model, workload, record)
    drive(policy, Recorder(executor, present) if present is not None else executor, record)
    return record


def waits(record):
    """Time in queue, in ticks."""
    columns = record.requests
    return [(first - arrival) / TICK - 1 for first, arrival in zip(columns.first_token_ns, columns.arrival_ns)]


def exponential_draws(ranks, mean):
    """Exponential draws whose histogram is exact (`ranks` is a permutation): only their order is left to chance, which
    takes most of the variance out of a mean waiting time and biases nothing that it depends on."""
    return [-mean * log1p(-(rank + 0.5) / len(ranks)) for rank in ranks]


def shuffled(rng, num):
    """A random permutation."""
    ranks = list(range(num))
    rng.shuffle(ranks)
    return ranks


def lindley(gaps, services):
    """Waiting times of a single server, first come first served."""
    wait, found = 0, []
    for index, service in enumerate(services):
        found.append(wait)
        if index + 1 < len(services):
            wait = max(0, wait + service - gaps[index + 1])
    return found


def mean_wait(service_ranks, gap_ranks, rho):
    """Mean wait of a simulated run in ticks; `service_ranks` None: all services are of the mean length."""
    num = len(gap_ranks)
    outputs = [MEAN] * num
    if service_ranks is not None:
        outputs = [max(1, round(draw)) for draw in exponential_draws(service_ranks, MEAN)]
    gaps = [round(draw * TICK) for draw in exponential_draws(gap_ranks, MEAN / rho)]
    found = waits(serve(gaps, outputs))
    exact = lindley(gaps, [output * TICK for output in outputs])
    assert max(abs(mine - theirs / TICK) for mine, theirs in zip(found, exact)) < 1e-6, "not Lindley's recursion"
    return sum(found) / num


def test_waiting_time_is_that_of_mm1():
    """rho / (1 - rho) services within 2% at half load, and every single wait as Lindley's recursion has it, to the ns.

    The second run swaps the chances of services and gaps: what crowds one run thins the other, so that the standard
    error of their mean is 0.8%, from 60,000 requests each."""
    rng = random.Random(0)
    first, second = shuffled(rng, NUM), shuffled(rng, NUM)
    found = (mean_wait(first, second, 0.5) + mean_wait(second, first, 0.5)) / 2
    assert found == pytest.approx(MEAN, rel=0.02)


def test_waiting_time_is_that_of_md1():
    """Half of that. The standard error is 0.8%."""
    assert mean_wait(None, shuffled(random.Random(0), NUM), 0.5) == pytest.approx(MEAN / 2, rel=0.02)


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


class Present:
    """Integrates the requests that a policy says it has. As a log it is told of events before the policy is."""

    def __init__(self):
        self.policy = None
        self.area = self.before = 0

    def __call__(self, line):
        if not isinstance(line, Delivered):
            return
        count = sum(gauge.running + gauge.waiting for gauge in self.policy.gauges())
        self.area += count * (line.now_ns - self.before)
        self.before = line.now_ns


@pytest.mark.parametrize(("instances", "max_num_seqs"), ((1, 1), (3, 4)))
def test_littles_law(instances, max_num_seqs):
    """Requests that the policy's gauges show, summed over time, are those that the record shows, to the ns."""
    rng = random.Random(3)
    num = 3000
    outputs = [1 + int(rng.expovariate(1 / 60)) for _ in range(num)]
    gaps = [round(rng.expovariate(1 / (60 / 0.7 / instances / max_num_seqs)) * TICK) for _ in range(num)]
    present = Present()
    columns = serve(gaps, outputs, instances, "least_outstanding", max_num_seqs, present).requests
    sojourn = sum(finish - arrival for finish, arrival in zip(columns.finish_ns, columns.arrival_ns))
    assert present.area == sojourn > num * 60 * TICK
