"""`runtime=…` as plain numbers and names: what kind of world carries the commands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from common.errors import ConfigError

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "clock": ("measured", "modelled"),
    "attention": ("auto", "torch", "triton", "flash"),
    "graphs": ("auto", "on", "off"),
    "backend": ("gloo", "nccl"),
    "launcher": ("auto", "ray"),
}
SECONDS = ("start_timeout_s", "reply_timeout_s", "transfer_timeout_s", "heartbeat_timeout_s")
DIST_ONLY = {"backend", "launcher", "ray_address", "piece_kb", "async_scheduling", *SECONDS}


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """`sim` has a name only; the other keys are those of conf/runtime/local.yaml, the last nine of dist.yaml alone."""

    name: str
    device: str = "auto"
    dtype: str = "auto"
    clock: str = "measured"
    attention: str = "auto"
    graphs: str = "auto"
    weights: str | None = None
    temperature: float = 0.0
    threads: int = 1
    check: bool = False
    backend: str = "gloo"
    launcher: str = "auto"
    ray_address: str | None = None
    start_timeout_s: float = 120.0
    reply_timeout_s: float = 120.0
    transfer_timeout_s: float = 120.0
    heartbeat_timeout_s: float = 20.0
    piece_kb: int = 256
    async_scheduling: bool = True

    @classmethod
    def from_mapping(cls, tree: Mapping[str, Any]) -> RuntimeConfig:
        """Raises ConfigError on a key that this runtime does not have, or a value that it cannot use."""
        name = str(tree["name"])
        if isinstance(tree.get("graphs"), bool):  # on and off are booleans in YAML 1.1
            tree = {**tree, "graphs": "on" if tree["graphs"] else "off"}
        known = {"name"} if name == "sim" else {field.name for field in fields(cls)}
        known -= set() if name == "dist" else DIST_ONLY
        for key, value in tree.items():
            if key not in known:
                raise ConfigError(f"runtime.{key} is unknown for runtime={name}; known: {', '.join(sorted(known))}")
            if key in CHOICES and value not in CHOICES[key]:
                raise ConfigError(f"runtime.{key}={value!r} is unknown; choose one of: {', '.join(CHOICES[key])}")
        config = cls(**tree)
        config._check()
        return config

    def _check(self) -> None:
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise ConfigError(f"runtime.threads={self.threads!r}: give a whole number of at least 1")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float) or self.temperature < 0:
            raise ConfigError(f"runtime.temperature={self.temperature!r}: give a number of at least 0 (0: greedy)")
        for key in ("check", "async_scheduling"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"runtime.{key}={getattr(self, key)!r}: use true or false")
        if isinstance(self.piece_kb, bool) or not isinstance(self.piece_kb, int) or self.piece_kb < 1:
            raise ConfigError(f"runtime.piece_kb={self.piece_kb!r}: give a whole number of at least 1")
        for key in SECONDS:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise ConfigError(f"runtime.{key}={value!r}: give seconds above 0")
        limit = min(self.reply_timeout_s, self.transfer_timeout_s)
        if self.name == "dist" and self.heartbeat_timeout_s >= limit:
            raise ConfigError(f"runtime.heartbeat_timeout_s={self.heartbeat_timeout_s:g}: give less than "
                              f"reply_timeout_s and transfer_timeout_s ({limit:g})")  # fmt: skip
