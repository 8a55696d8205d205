"""The whole loop: events in, commands out."""

from __future__ import annotations

from collections.abc import Callable

from common.policy import Executor, Policy
from common.record import RunRecord

FLUSH_BYTES = 1 << 18  # larger pieces are new memory each time, which costs more than the copying


def drive(
    policy: Policy,
    executor: Executor,
    record: RunRecord,
    sample_ns: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Deliver events until the source is exhausted and nothing lives.

    To log, pass the executor seen through a `common.log.Recorder`, which has every event before the policy does.
    Gauges are sampled every `sample_ns` of event time (0: never). A sample is the ledger at its mark, events of that
    very instant included: read when the first later event is at hand, before the policy sees it. So sampling never
    changes a run, and a policy that is woken more often is not seen at other moments. A mark at which nothing has
    changed since the one before has no sample of its own. `progress` gets the time of that later event.
    """
    poll, submit, on_event = executor.poll, executor.submit, policy.on_event
    next_sample = 0 if sample_ns else (1 << 63) - 1
    num_events = num_commands = 0
    try:
        while (item := poll()) is not None:
            now_ns, event = item
            if now_ns > next_sample:
                for gauge in policy.gauges():
                    record.timeline.sample(next_sample, gauge)
                record.segments.flush(FLUSH_BYTES)
                record.timeline.flush(FLUSH_BYTES)
                next_sample = -(-now_ns // sample_ns) * sample_ns
                if progress is not None:
                    progress(now_ns)
            num_events += 1
            for command in on_event(now_ns, event):
                num_commands += 1
                submit(command)
    finally:
        record.segments.flush()
        record.timeline.flush()
        record.num_events += num_events
        record.num_commands += num_commands
