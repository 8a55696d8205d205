"""python -m bench.replay results/runs/a     does the policy still decide as the log of this run says?

The run's configuration and the first line of its log make the policy anew; it is given the recorded events, and must
give the recorded commands. No engine and no device takes part, so a log of GPUs replays on a laptop. The log of a run
that was killed or interrupted is replayed as far as it goes.

Exit code: 0 identical, 1 another command (the first one is named), 2 nothing to replay, in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import RunConfig, of_run
from common.driver import drive
from common.errors import ConfigError, KVPlaneError
from common.executors.replay import Difference, ReplayExecutor
from common.log import LOG, PARTIAL, find_log, read_cluster, read_log
from common.policy import Policy
from common.record import RequestColumns, RunRecord
from common.types import ClusterInfo
from systems.registry import make_policy


@dataclass(frozen=True)
class Replay:
    """`num_events` were delivered, and `num_commands` were the recorded ones before `difference` (None: all are)."""

    num_events: int
    num_commands: int
    partial: bool
    difference: str | None = None

    def __str__(self) -> str:
        text = f"{self.num_events:,} events, {self.num_commands:,} commands: "
        if self.difference is not None:
            return f"{text}identical until {self.difference}"
        return text + "identical" + (" (the run did not complete: its log ends here)" if self.partial else "")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="DIR", type=Path, help="folder of a run, complete or not, with a log in it")
    try:
        found = replay(parser.parse_args(argv).run)
    except KVPlaneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(found)
    return 0 if found.difference is None else 1


def replay(folder: Path) -> Replay:
    """Replay the log in a run's folder. ConfigError or TraceError where there is nothing that can be replayed."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such results folder")
    log = find_log(folder)
    if log is None:
        raise ConfigError(f"{folder}: no {LOG} and no {LOG}{PARTIAL} in it; runs write one with log.events=true")
    config, partial = of_run(folder), log.name.endswith(PARTIAL)
    policy = _policy(folder, config, read_cluster(log))
    executor = ReplayExecutor(read_log(log, partial), partial)
    difference = None
    try:
        drive(policy, executor, RunRecord(RequestColumns.empty(0)))
    except KVPlaneError:
        raise
    except Difference as error:
        difference = str(error)
    except Exception as error:  # a policy that stumbles over what it once could handle decides otherwise, too
        difference = f"{executor.where}: the policy fails ({type(error).__name__}: {' '.join(str(error).split())})"
    return Replay(executor.num_events, executor.num_commands, partial, difference)


def _policy(folder: Path, config: RunConfig, cluster: ClusterInfo) -> Policy:
    try:
        return make_policy(config.system, cluster, config.engine, config.system_options)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    except (LookupError, TypeError, ValueError) as error:
        why = f"{error!r:.200}"
        raise ConfigError(f"{folder}: this version makes no policy of its configuration ({why})") from error


if __name__ == "__main__":
    sys.exit(main())
