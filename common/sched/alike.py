"""Systems that need instances of one kind say so at once."""

from __future__ import annotations

from common.errors import ConfigError
from common.types import ClusterInfo


def need_alike(system: str, cluster: ClusterInfo) -> None:
    """ConfigError where instances differ in TP: KV is exchanged between such, but neither parameters nor partial
    attention."""
    tps = [info.tp for info in cluster.instances]
    if len(set(tps)) > 1:
        raise ConfigError(f"system={system} needs instances of one TP, not cluster.tp={tps}")
