"""The tests' own judge of replies: a token that is not the likeliest is caught, a tie of two is not."""

from __future__ import annotations

import pytest
import torch

from tests.engine.worlds import TIE, check_reply, dense_logits, off_the_likeliest, source_of, tiny_spec, undisturbed

PROMPT = list(range(5, 25))


def test_any_other_token_anywhere_is_caught():
    spec = tiny_spec(2)
    source = source_of(spec)
    ids = PROMPT + undisturbed(spec, source, PROMPT, 12)
    check_reply(spec, source, ids, len(PROMPT), 0)
    for place in range(len(PROMPT), len(ids)):
        second = int(dense_logits(spec, source, ids[:place])[-1].topk(2).indices[1])
        wrong = [*ids[:place], second, *ids[place + 1 :]]
        assert off_the_likeliest(spec, source, wrong, len(PROMPT)) > 10 * TIE, "the nearest rival is no tie here"
        with pytest.raises(AssertionError, match="something else"):
            check_reply(spec, source, wrong, len(PROMPT), 0)


def test_a_tie_is_not(monkeypatch):
    logits = torch.tensor([[1.0, 5.9, 5.9 - 4e-6], [0.0, 5.0, 5.1]])
    monkeypatch.setattr("tests.engine.worlds.dense_logits", lambda *_: logits)
    check_reply(None, None, [7, 2, 2], 1, 0)
    with pytest.raises(AssertionError):
        check_reply(None, None, [7, 2, 1], 1, 0)
