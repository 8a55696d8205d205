"""Looks on while a local runtime works: which cuts its iterations really had, and the logits of every sampled token."""

from __future__ import annotations

from collections import Counter

from tests.engine.worlds import dense_logits

ROUNDING = 2e-3  # of logits that spread over about two


class Witness:
    """Sees every stage that runs: what the draws reach, and the logits of every sampled token."""

    def __init__(self, world):
        self.seen = Counter()
        self.logits = {}  # (request, position of the sampled token) -> row
        self._rows = None
        self._run, self._likeliest = world.runner.run_stage, world.runner.decoder.likeliest
        self._layers = world.spec.num_layers
        world.runner.run_stage = self.run_stage
        world.runner.decoder.likeliest = self.keep

    def keep(self, *args):
        self._rows, tokens = self._likeliest(*args)
        return self._rows, tokens

    def run_stage(self, item, home, layers):
        times = self._run(item, home, layers)
        works = item.batch.works
        for work in works:
            self.note(work, home, layers)
        if layers[1] == self._layers:
            sampled = [work for work in works if work.sample]
            for work, row in zip(sampled, self._rows if sampled else ()):
                self.logits[work.request_id, work.first + work.num] = row.clone()
        kinds = {work.num > 1 for work in works}
        self.seen["chunk beside decode"] += len(kinds) == 2
        self.seen["pipeline"] += layers[0] > 0
        return times

    def note(self, work, home, layers):
        here = [span for span in work.spans if span.layers[0] < layers[1] and layers[0] < span.layers[1]]
        end = work.first + work.num
        read = [span for span in here if span.token_start < end]
        decode = work.num == 1 and work.first > 0
        self.seen["multi-span decode"] += decode and len({span.token_start for span in read}) > 1
        self.seen["remote decode"] += decode and any(span.instance != home for span in read)
        self.seen["all of it remote"] += all(span.instance != home for span in read)
        self.seen["layer x token cuts"] += len({s.token_start for s in read}) > 1 and len({s.layers for s in read}) > 1
        self.seen["empty span"] += len(here) > len(read)
        self.seen["one-block span"] += any(span.token_end == span.token_start + 16 for span in read)
        self.seen["chunked"] += work.num > 1 and work.first > 0
        for span in here:
            stop = end if span.token_end is None else span.token_end
            if span.instance != home and span.token_start < end and work.first < stop:
                self.seen["remote append"] += decode
                self.seen["remote prefill"] += not decode


def check_logits(executor, witness):
    """All logits that the runtime saw, those of iterations that were lost included."""
    dense = {request: dense_logits(executor.world.spec, executor.world.source, ids[:-1])
             for request, ids in executor.tokens.items()}  # fmt: skip
    for (request, position), row in witness.logits.items():
        want = dense[request][position - 1]
        off = float((row - want).abs().max())
        assert off < ROUNDING, f"request {request} has other logits at position {position}: off by {off}"
