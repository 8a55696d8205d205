"""What arrives: trace readers and generators, pure functions of (config, seed). See docs/workloads.md."""

from workloads.build import build
from workloads.config import WorkloadConfig, from_mapping
from workloads.types import Workload

__all__ = ["Workload", "WorkloadConfig", "build", "from_mapping"]
