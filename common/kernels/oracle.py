"""Attention as the definition reads: fp64, one query, one head, one key at a time. Tests and benchmarks judge by it."""

from __future__ import annotations

import math

import torch

from common.kernels.plan import Rows


def attend(
    rows: Rows, q_THD: torch.Tensor, kv_C2BGD: torch.Tensor, layer: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o_NHD, lse_NH) in fp64 of every query of every row, in row order."""
    outputs, sums = [], []
    for row in range(len(rows.q_start)):
        for i in range(int(rows.q_len[row])):
            stop = min(int(rows.kv_start[row] + rows.kv_len[row]), int(rows.q_pos[row]) + i + 1)
            keys = [_key(rows, row, kv_C2BGD, layer, p - int(rows.kv_start[row]))
                    for p in range(int(rows.kv_start[row]), stop)]  # fmt: skip
            o_HD, lse_H = _one_query(q_THD[int(rows.q_start[row]) + i].double(), keys, scale)
            outputs.append(o_HD)
            sums.append(lse_H)
    if not outputs:
        return torch.zeros(0, *q_THD.shape[1:], dtype=torch.float64), torch.zeros(0, q_THD.shape[1]).double()
    return torch.stack(outputs), torch.stack(sums)


def _key(rows: Rows, row: int, kv_C2BGD: torch.Tensor, layer: int, index: int) -> torch.Tensor:
    """[2, G, D] K and V of the index-th key of a row's span."""
    block, offset = divmod(index, kv_C2BGD.shape[2])
    if rows.tables.ndim == 2:
        cell = int(rows.tables[row, block]) + layer
    else:
        cell = int(rows.tables[layer, row, block])
    return kv_C2BGD[cell, :, offset].double()


def _one_query(q_HD: torch.Tensor, keys: list[torch.Tensor], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    o_HD = torch.zeros_like(q_HD)
    lse_H = torch.full((q_HD.shape[0],), -math.inf, dtype=torch.float64)
    if not keys:
        return o_HD, lse_H
    group = q_HD.shape[0] // keys[0].shape[1]
    for head in range(q_HD.shape[0]):
        logits = [scale * float(q_HD[head] @ key[0, head // group]) for key in keys]
        top = max(logits)
        total = math.fsum(math.exp(logit - top) for logit in logits)
        for logit, key in zip(logits, keys):
            o_HD[head] += math.exp(logit - top) / total * key[1, head // group]
        lse_H[head] = top + math.log(total)
    return o_HD, lse_H
