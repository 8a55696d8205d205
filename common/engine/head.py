"""The LM head: from final hidden states to logits. At small batches it is the largest matrix of a small model."""

from __future__ import annotations

import torch

from common.engine.products import packed
from common.engine.sampler import greedy

_PANEL = 640  # columns; a panel of a small model fits a core's cache, and its rows do not span the whole vocabulary


class Head:
    """A [vocab, hidden] table, kept so that hidden states multiply it fast.

    CPU: a copy in oneDNN's order where that is to be had, else transposed and cut into contiguous panels [hidden, up to
    640] (1.1 to 1.3 times as fast at 64 rows as one matrix either way round). CUDA: a view of the table, which may be
    the embedding."""

    def __init__(self, table: torch.Tensor) -> None:
        self.vocab_size = table.shape[0]
        self._packed = packed(table)
        self._panels: tuple[torch.Tensor, ...] = ()
        if self._packed is not None:
            return
        if table.device.type == "cpu":
            self._panels = tuple(rows.t().contiguous() for rows in torch.split(table, _PANEL))
        else:
            self._panels = (table.t(),)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab] of normalised hidden states [n, hidden]."""
        if self._packed is not None:
            return self._packed(x)
        if len(self._panels) == 1:
            return torch.mm(x, self._panels[0])
        out = x.new_empty(x.shape[0], self.vocab_size)
        for panel, columns in zip(self._panels, torch.split(out, _PANEL, dim=1)):
            torch.mm(x, panel, out=columns)
        return out

    def likeliest(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the greatest one's token in each row, int64 [n] (as `greedy`: the lowest id of equals).

        With panels, each one's maximum is taken while it is in cache; then only the best panel is looked through."""
        if len(self._panels) <= 1:
            logits = self(x)
            return logits, greedy(logits)
        num = x.shape[0]
        logits, maxima = x.new_empty(num, self.vocab_size), x.new_empty(len(self._panels), num)
        for panel, columns, best in zip(self._panels, torch.split(logits, _PANEL, dim=1), maxima):
            torch.mm(x, panel, out=columns)
            torch.amax(columns, 1, out=best)
        # the last panel may be narrower: what is before it in its window is less than its maximum
        first = (maxima.argmax(0) * _PANEL).clamp_(max=self.vocab_size - _PANEL)
        windows = logits.unfold(1, _PANEL, 1)[torch.arange(num), first]
        return logits, first + windows.argmax(1)
