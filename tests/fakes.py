"""Clusters with a made-up, exactly known cost: what tests of mechanisms need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from common.driver import drive
from common.executors.cluster import ClusterModel
from common.executors.network import LinkSpec
from common.executors.sim import SimExecutor
from common.policy import Policy
from common.record import RequestColumns, RunRecord
from common.types import Content, InstanceInfo

if TYPE_CHECKING:
    import numpy as np

US = 1_000


class FakeCost:
    """A layer takes 10 us, a prompt token 200 ns, an attended token 3 ns, a decode 700 ns; the head 5 us."""

    def __init__(self, layers: int, first: bool, last: bool, alpha: float = 0.0) -> None:
        self.layers = layers
        self.head = 5 * US if last else 0
        self.skew_alphas = (alpha,) if alpha else ()

    def iteration_ns(self, chunks: Sequence[tuple[int, int]], num_decodes: int, context: int, num_logits: int) -> int:
        layer = 10 * US
        for chunk, computed in chunks:
            layer += 200 * chunk + chunk * (computed + chunk // 2) // 50
        layer += num_decodes * (700 + 3 * context)
        return layer * self.layers + self.head + 11 * num_logits

    def decode_prefix(self, batch: int, upto: int) -> list[int]:
        times = (self.iteration_ns((), batch, context, batch) for context in range(2 * upto + 64))
        return [0, *accumulate(times)]

    def partial_attention_ns(self, batch: int, context: int) -> int:
        return batch * 3 * context

    def merge_ns(self, tokens: int) -> int:
        return 100 + tokens


@dataclass
class FakeWorkload:
    """Columns of a workload, given or made."""

    arrival_ns: Sequence[int]
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int]
    content: Sequence[Content] | None = None
    session: Sequence[int] | None = None
    release_after: Sequence[int] | None = None
    think_ns: Sequence[int] | None = None
    concurrency: int | None = None
    max_output_tokens: int = 1 << 20
    model: Sequence[int] | None = None


def cluster(
    instances: int = 1,
    blocks: int = 64,
    layers: int = 4,
    block_size: int = 16,
    running: int | None = None,
    host_blocks: int = 0,
    alpha: float = 0.0,
    **changes: object,
) -> ClusterModel:
    """A small cluster; `blocks` full-layer blocks per instance; a layer's parameters are as large as 8 cells."""
    cell = 4096
    infos = tuple(
        InstanceInfo(i, layers, blocks * layers, cell, 8 * cell, i // 2, running is None or i < running,
                     host_blocks * layers)
        for i in range(instances)
    )  # fmt: skip
    settings: dict[str, object] = {
        "instances": infos,
        "block_size": block_size,
        "num_layers": layers,
        "max_model_len": 1 << 20,
        "cost": lambda n, first, last: FakeCost(n, first, last, alpha),
        "hidden_bytes": 128,
        "query_bytes": 128,
        "partial_bytes": 160,
        "nvlink": LinkSpec(1e9, 5 * US),
        "nic": LinkSpec(2e8, 20 * US),
        "pcie": LinkSpec(5e8, 10 * US),
        "remap_ns": 50 * US,
        "startup_ns": 3_000 * US,
        "control_ns": 10 * US,
    }
    return ClusterModel(**{**settings, **changes})  # type: ignore[arg-type]


def run(
    policy: Policy, model: ClusterModel, workload: FakeWorkload, **options: object
) -> tuple[RunRecord, SimExecutor]:
    """Drive a policy to the end; the record and the executor, for inspection."""
    record = RunRecord(RequestColumns.empty(len(workload.prompt_tokens)))
    executor = SimExecutor(model, workload, record, **options)  # type: ignore[arg-type]
    drive(policy, executor, record)
    return record, executor


def random_workload(rng: np.random.Generator, num: int, gap_us: int, prompt: int, output: int) -> FakeWorkload:
    """Uniform lengths and exponential gaps."""
    import numpy as np  # here: the simulator itself runs where there is no numpy

    arrivals = np.cumsum(rng.exponential(gap_us * US, num)).astype(np.int64)
    return FakeWorkload(
        [int(v) for v in arrivals],
        [int(v) for v in rng.integers(1, prompt, num)],
        [int(v) for v in rng.integers(1, output, num)],
    )
