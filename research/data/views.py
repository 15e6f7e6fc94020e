"""Views: random augmentations of whole micro-batches, as small frozen objects.

A view is split in two, so that what a row looks like in an epoch depends on the row and the epoch alone, never on the
batch size, the accumulation or the rank that happens to hold it:

* ``draw(num_rows, generator)`` makes the epoch's randomness, one entry per row of the split;
* ``apply(inputs, draw_B)`` transforms a micro-batch with its rows' entries, in one vectorised pass.

``name`` enters the fingerprint of the data: a teacher cache written for other inputs can be refused by it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor


class View(Protocol):
    """What a loader needs of an augmentation."""

    @property
    def name(self) -> str: ...

    def draw(self, num_rows: int, generator: torch.Generator) -> Tensor:
        """One entry of randomness per row, [num_rows], on the generator's device."""
        ...

    def apply(self, inputs: Tensor, draw_B: Tensor) -> Tensor:
        """The transformed micro-batch: shape, dtype and device of ``inputs``."""
        ...


@dataclass(frozen=True)
class PixelShift:
    """Integer shifts of whole images, up to ``max_pixels`` in each direction, zero-filled.

    Image ``b`` moves down by ``dy`` and right by ``dx`` (negative: up, left), each uniform on
    ``-max_pixels..max_pixels``; what leaves the frame is lost, what enters is 0. Accepts [B, height, width] and
    flattened [B, height * width].

    Raises ValueError where ``max_pixels`` is below 1 or not below the smaller side: such a shift could empty an image.
    """

    max_pixels: int
    height: int = 28
    width: int = 28

    def __post_init__(self) -> None:
        smaller = min(self.height, self.width)
        if not 1 <= self.max_pixels < smaller:
            raise ValueError(
                f"max_pixels={self.max_pixels!r} for images of {self.height}x{self.width}: give 1 to {smaller - 1}"
                " (no shift at all is the absence of a view)"
            )

    @property
    def name(self) -> str:
        return f"pixel_shift({self.max_pixels})"

    @property
    def num_shifts(self) -> int:
        """How many different shifts there are, the zero shift (number ``num_shifts // 2``) included."""
        return (2 * self.max_pixels + 1) ** 2

    def draw(self, num_rows: int, generator: torch.Generator) -> Tensor:
        """Shift numbers [num_rows], uniform over all ``num_shifts``; :meth:`offsets` says what a number means."""
        return torch.randint(self.num_shifts, (num_rows,), generator=generator)

    def draw_moved(self, num_rows: int, generator: torch.Generator) -> Tensor:
        """Shift numbers [num_rows], uniform over the shifts that move the image: the zero shift is left out."""
        number_B = torch.randint(self.num_shifts - 1, (num_rows,), generator=generator)
        return number_B + (number_B >= self.num_shifts // 2)

    def offsets(self, draw_B: Tensor) -> tuple[Tensor, Tensor]:
        """``(dy_B, dx_B)`` in pixels of the shift numbers ``draw_B``."""
        span = 2 * self.max_pixels + 1
        return draw_B // span - self.max_pixels, draw_B % span - self.max_pixels

    def apply(self, inputs: Tensor, draw_B: Tensor) -> Tensor:
        flat_BN = inputs.reshape(inputs.shape[0], -1)
        if flat_BN.shape[1] != self.height * self.width:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} are not images of {self.height}x{self.width}:"
                f" give [B, {self.height}, {self.width}] or [B, {self.height * self.width}]"
            )
        # One gather for the whole batch: column height * width is an appended zero, the source of what enters.
        padded = torch.nn.functional.pad(flat_BN, (0, 1))
        source_BN = _source_pixels(self, inputs.device).index_select(0, draw_B)
        return padded.gather(1, source_BN).reshape(inputs.shape)


@lru_cache(maxsize=16)
def _source_pixels(shift: PixelShift, device: torch.device) -> Tensor:
    """For each shift number and each pixel of the result, the pixel it comes from: [num_shifts, height * width]."""
    dy_S, dx_S = shift.offsets(torch.arange(shift.num_shifts))
    row = torch.arange(shift.height)[None, :, None] - dy_S[:, None, None]
    column = torch.arange(shift.width)[None, None, :] - dx_S[:, None, None]
    inside = (row >= 0) & (row < shift.height) & (column >= 0) & (column < shift.width)
    source = torch.where(inside, row * shift.width + column, shift.height * shift.width)
    return source.reshape(shift.num_shifts, -1).to(device)
