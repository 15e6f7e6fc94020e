"""FLOPs of a network, by torch's own counter on tensors without storage: no time, no memory, no random numbers.

A multiply-add counts two; biases, activations, normalisation and losses count nothing. Attention counts the whole
square of scores, as the products do, whatever the mask hides.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from research.records import Batch, TokenBatch

COUNTED_ROWS = 2  # batch normalisation is content with two


def flops_per_row(module: nn.Module, input_shape: Sequence[int], *, backward: bool) -> float:
    """FLOPs of one row's forward pass, with its backward pass where asked."""
    inputs = torch.empty(COUNTED_ROWS, *input_shape, device="meta")
    return flops_of_inputs(module, (inputs,), backward=backward) / COUNTED_ROWS


def flops_per_row_of(module: nn.Module, inputs: Sequence[Tensor], *, backward: bool) -> float:
    """FLOPs of one row of a batch, called as `module(*inputs)`; of the inputs only shapes and dtypes are read.

    The same for every batch whose rows have these shapes, so that a caller counts each length of text once. Padding
    is paid for.
    """
    rows = tuple(torch.empty(COUNTED_ROWS, *t.shape[1:], dtype=t.dtype, device="meta") for t in inputs)
    return flops_of_inputs(module, rows, backward=backward) / COUNTED_ROWS


def flops_by_length(module: nn.Module, inputs: Sequence[Tensor], *, backward: bool) -> Callable[[int], float]:
    """FLOPs of one row of text as a function of its length, padding included.

    Matrix products grow with the length and attention with its square, so three counted lengths give all the others
    exactly; counting each length that comes would cost a tenth of a second apiece.
    """
    lengths = (8, 16, 32)
    counted = []
    for length in lengths:
        rows = [torch.empty(1, length, *t.shape[2:], dtype=t.dtype, device="meta") for t in inputs]
        counted.append(flops_per_row_of(module, rows, backward=backward))
    (a, b, c), (at_a, at_b, at_c) = lengths, counted

    def at(length: int) -> float:
        return float(
            round(
                at_a * (length - b) * (length - c) / ((a - b) * (a - c))
                + at_b * (length - a) * (length - c) / ((b - a) * (b - c))
                + at_c * (length - a) * (length - b) / ((c - a) * (c - b))
            )
        )

    return at


class BatchFlops:
    """FLOPs of a network over whole batches, padding included; what they cost to count is paid once for each shape.

    backward  with the backward pass
    """

    def __init__(self, network: nn.Module, *, backward: bool) -> None:
        self._network, self._backward = network, backward
        self._of_shape: dict[tuple[int, ...], float] = {}
        self._of_length: Callable[[int], float] | None = None

    def of(self, batch: Batch) -> float:
        """FLOPs of one batch."""
        inputs = batch.network_inputs()
        shape, rows = tuple(inputs[0].shape[1:]), int(inputs[0].shape[0])
        if isinstance(batch, TokenBatch):
            if self._of_length is None:
                self._of_length = flops_by_length(self._network, inputs, backward=self._backward)
            return self._of_length(shape[0]) * rows
        if shape not in self._of_shape:
            self._of_shape[shape] = flops_per_row_of(self._network, inputs, backward=self._backward)
        return self._of_shape[shape] * rows


def flops_of_inputs(module: nn.Module, inputs: tuple[Tensor, ...], *, backward: bool) -> float:
    """FLOPs of `module(*inputs)` on a copy on the meta device; of the inputs only shapes and dtypes are read."""
    shadow = _without_storage(module)
    _fix_frequencies(shadow)
    counter = FlopCounterMode(display=False)
    with torch.enable_grad() if backward else torch.no_grad(), counter:
        logits = shadow(*(tensor.to("meta") for tensor in inputs))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def _without_storage(module: nn.Module) -> nn.Module:
    """A copy whose tensors are all on the meta device; nothing is ever copied."""
    known: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    for parameter in module.parameters():
        known[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, known)


def _fix_frequencies(shadow: nn.Module) -> None:
    """Leave rotary frequencies of `transformers` as they are, whatever the length of the text.

    Scaled ones (dynamic, longrope) would be chosen anew by the largest position, which has no value on the meta device.
    Neither choice nor rotation counts anything.
    """
    part: Any
    for part in shadow.modules():
        match getattr(part, "rope_type", None):
            case str():
                part.rope_type = "default"
            case dict() as of_layers:
                part.rope_type = dict.fromkeys(of_layers, "default")
