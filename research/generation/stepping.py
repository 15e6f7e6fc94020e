"""One more token of every row of a rotary decoder, by plain tensor calls over its own weights and a cache with room.

A forward pass of the library for one token makes masks, copies every layer's cache to lengthen it, and goes through a
dozen modules and wrappers a layer; in a small model that takes as long as the products do. Here is what that pass does,
in its order, and nothing around it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from research.models.rotary import Decoder, in_product, normed, turn_of

LEAST_ROOM = 32


@dataclass(slots=True)
class Kept:
    """One layer's keys and values, [B, heads, places, D]; the places behind those written hold nothing."""

    key_BHTD: Tensor
    value_BHTD: Tensor

    def write(self, place: int, key_BHD: Tensor, value_BHD: Tensor) -> None:
        """At ``place``, the first that is free; where there is none, room for a quarter more is made."""
        if self.key_BHTD.shape[2] == place:
            self.key_BHTD, self.value_BHTD = _longer(self.key_BHTD), _longer(self.value_BHTD)
        self.key_BHTD.select(2, place).copy_(key_BHD)
        self.value_BHTD.select(2, place).copy_(value_BHD)

    def select(self, place_B: Tensor) -> None:
        """Keep these rows, in this order."""
        self.key_BHTD, self.value_BHTD = self.key_BHTD[place_B], self.value_BHTD[place_B]


class RotaryStepper:
    """The rows of a batch behind their prompts, for a model that ``models.rotary.is_plain``.

    model       in eval mode; its weights are read once, here
    cache       the library's cache of the prompts, whose keys and values are taken over
    visible_BT  bool, at least as long as the rows will grow: which places may be attended to; None: all
    capacity    most tokens that will be fed
    """

    @torch.inference_mode()
    def __init__(self, model: Any, cache: Any, visible_BT: Tensor | None, capacity: int) -> None:
        self._visible_BT, self._length = visible_BT, int(cache.get_seq_length())
        self._decoder = Decoder.of(model)
        self._kept = [Kept(in_product(layer.keys), in_product(layer.values)) for layer in cache.layers]
        self._cos_TD, self._signed_sin_TD = turn_of(model, self._length + capacity)

    @torch.inference_mode()
    def feed(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        """Logits [B, V] of what follows ``token_B``, which stands at ``position_B`` of its document."""
        decoder = self._decoder
        turn_B1D = self._cos_TD[position_B][:, None], self._signed_sin_TD[position_B][:, None]
        seen_B11T = None if self._visible_BT is None else self._visible_BT[:, None, None, : self._length + 1]
        hidden_BC = F.embedding(token_B, decoder.embedding_VC)
        for layer, kept in zip(decoder.layers, self._kept, strict=True):
            heads = layer.heads(normed(hidden_BC, *layer.before), turn_B1D, decoder.width)
            hidden_BC = layer.finished(hidden_BC, self._mixed(kept, *heads, seen_B11T))
        self._length += 1
        return F.linear(normed(hidden_BC, *decoder.norm), *decoder.head)

    @torch.inference_mode()
    def select(self, place_B: Tensor) -> None:
        """Go on with these rows, in this order."""
        for kept in self._kept:
            kept.select(place_B)
        if self._visible_BT is not None:
            self._visible_BT = self._visible_BT[place_B]

    def _mixed(
        self, kept: Kept, query_BHD: Tensor, key_BHD: Tensor, value_BHD: Tensor, seen_B11T: Tensor | None
    ) -> Tensor:
        kept.write(self._length, key_BHD, value_BHD)
        # the query heads of one key head stand beside each other: they attend as if they were places of one sequence
        rows, heads, width = key_BHD.shape
        return F.scaled_dot_product_attention(
            query_BHD.view(rows, heads, -1, width),
            kept.key_BHTD[:, :, : self._length + 1],
            kept.value_BHTD[:, :, : self._length + 1],
            attn_mask=seen_B11T,
            scale=self._decoder.scale,
        ).reshape(rows, -1)


def _longer(kept_BHTD: Tensor) -> Tensor:
    rows, heads, places, width = kept_BHTD.shape
    grown_BHTD = kept_BHTD.new_empty(rows, heads, places + max(LEAST_ROOM, places // 4), width)
    grown_BHTD[:, :, :places] = kept_BHTD
    return grown_BHTD
