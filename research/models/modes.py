"""A network in another mode or precision for a while, exactly as it was afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; each submodule's own mode, which need not be its parent's, afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def parameters_as(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Floating-point parameters rounded to ``dtype`` inside; the same tensors as before, bit for bit, afterwards.

    One cast for as long as it lasts: autocast without gradients would cast every weight again at every call. Buffers
    keep their precision (rounded frequencies of a rotary embedding would move far positions). None changes nothing.
    """
    kept = [(p, p.data) for p in module.parameters() if dtype and p.is_floating_point() and p.dtype != dtype]
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
