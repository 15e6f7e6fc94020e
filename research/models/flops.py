"""FLOPs of one row, by torch's own counter on tensors without storage: no time, no memory, no random numbers."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops_per_row(module: nn.Module, input_shape: Sequence[int], *, backward: bool) -> float:
    """FLOPs (a multiply-add counts two) of one row's forward pass, with its backward pass where asked.

    Counted on a copy on the meta device over two rows, so that batch normalisation is content, and halved.
    """
    shadow = copy.deepcopy(module).to("meta")
    rows = 2
    inputs = torch.empty(rows, *input_shape, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.enable_grad() if backward else torch.no_grad(), counter:
        logits = shadow(inputs)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / rows
