import itertools

import pytest
import torch

from research.data.views import PixelShift
from research.seeding import rng_for


def shift_by_loop(image: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Pixel (row, column) of the result is pixel (row - dy, column - dx) of the image, 0 where there is none."""
    height, width = image.shape
    moved = torch.zeros_like(image)
    for row, column in itertools.product(range(height), range(width)):
        if 0 <= row - dy < height and 0 <= column - dx < width:
            moved[row, column] = image[row - dy, column - dx]
    return moved


@pytest.mark.parametrize("max_pixels", [1, 2, 3])
def test_shifts_equal_a_loop_over_pixels(max_pixels: int) -> None:
    shift = PixelShift(max_pixels, 5, 4)
    draw_B = torch.arange(shift.num_shifts)
    images = torch.rand(shift.num_shifts, 5, 4, generator=rng_for(0, "images")) + 0.1
    expected = torch.stack(
        [
            shift_by_loop(image, dy, dx)
            for image, (dy, dx) in zip(
                images, itertools.product(range(-max_pixels, max_pixels + 1), repeat=2), strict=True
            )
        ]
    )
    assert torch.equal(shift.apply(images, draw_B), expected)
    assert torch.equal(shift.apply(images.flatten(1), draw_B), expected.flatten(1))


def test_the_middle_number_is_no_shift() -> None:
    shift = PixelShift(2, 5, 4)
    image = torch.rand(1, 5, 4)
    assert torch.equal(shift.apply(image, torch.tensor([shift.num_shifts // 2])), image)


def test_draws_are_uniform_and_moved_draws_always_move() -> None:
    shift = PixelShift(1, 5, 4)
    counts = shift.draw(18_000, rng_for(0, "draw")).bincount(minlength=9)
    # 2,000 expected in each of 9 cells; chi-square with 8 degrees of freedom exceeds 26.1 once in 1,000
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 26.1
    moved = shift.draw_moved(16_000, rng_for(1, "draw")).bincount(minlength=9)
    assert moved[4] == 0
    assert float(((moved[moved > 0] - 2000) ** 2 / 2000).sum()) < 24.3  # 7 degrees of freedom


def test_the_input_is_left_alone() -> None:
    images = torch.rand(4, 5, 4)
    before = images.clone()
    PixelShift(1, 5, 4).apply(images, torch.tensor([0, 1, 2, 8]))
    assert torch.equal(images, before)


def test_name_tells_the_size() -> None:
    assert PixelShift(2).name == "pixel_shift(2)"


@pytest.mark.parametrize("max_pixels", [-1, 0, 4, 10])
def test_impossible_shifts_are_refused(max_pixels: int) -> None:
    with pytest.raises(ValueError, match="give 1 to 3"):
        PixelShift(max_pixels, 5, 4)


def test_inputs_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="5x4"):
        PixelShift(1, 5, 4).apply(torch.zeros(2, 21), torch.tensor([0, 1]))
