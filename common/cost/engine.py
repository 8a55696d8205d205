"""What the serving engine adds around the kernels: graph padding and host time.

The host constants are estimates, not measurements of ours, and the weakest numbers of the cost model. Per sequence:
a profile of vLLM's step loop (0.27, CPU engine, openfabric-systems/simllm pull request 204, which its authors call
void for drift) finds 12.7 us per running request in scheduling; taking that for the 35% of a step that it gives to
scheduling and KV allocation makes 36 us in all. Per iteration, 0.5 ms for inputs, graph launch and reading tokens
back and 0.3 ms for handing the batch to other ranks are judgement. They were set after the gap to the measured
closed-loop points had been seen (about 1.4 ms + 37 us per sequence at tp 8), so those points are no independent test
of them. With asynchronous scheduling they hide under any step longer than themselves.

What an engine sets aside before it sizes its KV cache is measured: start-up logs of vLLM on H100 that the llm-d project
publishes (Apache-2.0; docs/cost-model.md). The profiling run samples a token for every sequence it may hold. Sorting
all logits for top-k and top-p took 38.4 bytes per logit up to 0.16; since 0.17 it is 14.9.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.cost.specs import HardwareSpec
from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """Defaults: vLLM V1 with asynchronous scheduling (0.14 and later), CUDA graphs up to 512 tokens."""

    cuda_graphs: bool = True
    max_capture_tokens: int = 512  # larger batches run eagerly, unpadded
    async_scheduling: bool = True  # host work of the next iteration hides under this one
    host_ns: int = 500_000
    host_per_seq_ns: int = 36_000
    host_tp_ns: int = 300_000
    host_per_chunk_ns: int = 0  # of each piece of a prompt, beside host_per_seq_ns
    wake_share: float = 0.0  # so much longer takes an iteration after wake_after_ns of idleness
    wake_after_ns: int = 0
    logit_bytes: float = 14.9  # of the profiling run's sampler, per logit
    nccl_bytes: int = 1850 << 20  # beside one communicator, once tp > 1, as far as start-up counts it

    def padded(self, tokens: int) -> int:
        """Tokens that a captured graph really runs: 1, 2, 4, multiples of 8 to 256, of 16 beyond."""
        if not self.cuda_graphs or tokens > self.max_capture_tokens or tokens <= 2:
            return tokens
        if tokens <= 4:
            return 4
        return -(-tokens // 8) * 8 if tokens <= 256 else -(-tokens // 16) * 16

    def host_time_ns(self, sequences: int, tp: int) -> int:
        """Host work of one iteration with `sequences` requests."""
        return self.host_ns + sequences * self.host_per_seq_ns + (self.host_tp_ns if tp > 1 else 0)

    def iteration_ns(self, device_ns: int, sequences: int, tp: int) -> int:
        """Device and host time of one iteration, overlapped or one after the other."""
        host = self.host_time_ns(sequences, tp)
        return max(device_ns, host) if self.async_scheduling else device_ns + host


ENGINES = {
    "vllm-async": EngineTraits(),
    "vllm-sync": EngineTraits(async_scheduling=False, logit_bytes=38.4, nccl_bytes=430 << 20),
    "device-only": EngineTraits(host_ns=0, host_per_seq_ns=0, host_tp_ns=0),
}


def engine_traits(name: str, hardware: HardwareSpec | None = None) -> EngineTraits:
    """`vllm-async` (0.14 and later), `vllm-sync` (V1 before), `device-only` (no host time at all), `profile` (our
    engine as it was measured on this hardware: host and device one after the other, nothing padded)."""
    if name == "profile":
        if hardware is None or hardware.host_ns is None or hardware.host_per_seq_ns is None:
            raise ConfigError("cost.traits=profile needs hardware with host times of its own: a measured profile "
                              "(python -m common.cost.fit --measure)")  # fmt: skip
        return EngineTraits(False, 0, False, hardware.host_ns, hardware.host_per_seq_ns, 0,
                            hardware.host_per_chunk_ns or 0, hardware.wake_share or 0.0,
                            hardware.wake_after_ns or 0)  # fmt: skip
    if name not in ENGINES:
        raise ConfigError(f"engine traits {name!r} are unknown; known: {', '.join(ENGINES)}, profile")
    return ENGINES[name]
