"""What the serving engine adds around the kernels: graph padding and host time.

The host constants are not fitted to any run of ours. Per sequence: a profile of vLLM's step loop (0.27, CPU engine,
openfabric-systems/simllm pull request 204) finds 12.7 us per running request in the scheduler with its KV allocation,
35% of a step's host work, so 36 us in all. Per iteration: about 0.5 ms for building inputs, replaying the graph and
reading the sampled tokens back, 0.3 ms more for handing the batch to the other ranks when tp > 1. Both are close to
the 0.2-0.3 ms and 5-6 ms at 256 sequences that vLLM issue 10634 reports for the older engine.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    "vllm-sync": EngineTraits(async_scheduling=False),
    "device-only": EngineTraits(host_ns=0, host_per_seq_ns=0, host_tp_ns=0),
}


def engine_traits(name: str) -> EngineTraits:
    """`vllm-async` (0.14 and later), `vllm-sync` (V1 before), `device-only` (no host time at all)."""
    if name not in ENGINES:
        raise ConfigError(f"engine traits {name!r} are unknown; known: {', '.join(ENGINES)}")
    return ENGINES[name]
