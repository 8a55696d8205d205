"""Drives a `Decoder` over one request with dense causal attention and a plain KV list: no pages, no batching."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.engine.head import Head
from common.engine.model import Decoder


class DenseRun:
    """One request. `extend` computes more tokens of it and returns their logits [n, vocab]."""

    def __init__(self, source, dtype=None, decoder=None):
        self.decoder = decoder or Decoder(source.spec, "cpu", dtype)
        self.layers = []
        for index in range(source.spec.num_layers):
            slab = torch.zeros(source.layout.num_bytes, dtype=torch.uint8)
            source.layer_into(index, slab)
            self.layers.append(source.layout.views(slab))
        self.table, self.head, self.norm = source.embedding(), Head(source.head()), source.final_norm()
        self.keys, self.values = ([None] * source.spec.num_layers for _ in range(2))
        self.length = 0

    @torch.no_grad()
    def extend(self, ids):
        ids_T = torch.as_tensor(ids)
        x = self.decoder.embed(ids_T, self.table)
        rotation = self.decoder.rotation(torch.arange(self.length, self.length + len(ids_T)))
        for index, weights in enumerate(self.layers):
            x = self.decoder.layer(weights, x, rotation, lambda q, k, v, i=index: self._attend(i, q, k, v))
        self.length += len(ids_T)
        return self.decoder.logits(x, self.norm, self.head)

    def _attend(self, index, q_THD, k_TGD, v_TGD):
        k_TGD, v_TGD = k_TGD.clone(), v_TGD.clone()  # what is given lasts until the layer ends
        if self.keys[index] is not None:
            k_TGD = torch.cat((self.keys[index], k_TGD))
            v_TGD = torch.cat((self.values[index], v_TGD))
        self.keys[index], self.values[index] = k_TGD, v_TGD
        rows, columns = len(q_THD), len(k_TGD)
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        q, k, v = (tensor.transpose(0, 1) for tensor in (q_THD, k_TGD, v_TGD))
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.decoder.spec.scale, enable_gqa=True)
        return out.transpose(0, 1)
