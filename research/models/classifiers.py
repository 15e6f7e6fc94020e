"""Student and teacher classifiers: plain networks from inputs [B, ...] to logits [B, V]."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

from research.errors import ConfigError


class Mlp(nn.Module):
    """Rectified fully connected layers, as in section 3 of Hinton, Vinyals and Dean (2015).

    hidden         units of each hidden layer, for example [800, 800]
    input_dropout  probability of dropping an input, `dropout` of dropping a hidden unit; both in [0, 1)
    """

    def __init__(
        self,
        hidden: Sequence[int],
        *,
        input_shape: Sequence[int],
        num_classes: int,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_widths("model.hidden", hidden)
        _check_probability("model.input_dropout", input_dropout)
        _check_probability("model.dropout", dropout)
        widths = [prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        if input_dropout > 0:
            layers.append(nn.Dropout(input_dropout))
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


class ConvNet(nn.Module):
    """Strided 3x3 convolutions with batch normalisation, mean pooling and a linear head, for square images.

    channels  output channels of each block; every block after the first halves the side
    """

    def __init__(
        self, channels: Sequence[int], *, input_shape: Sequence[int], num_classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check_widths("model.channels", channels)
        _check_probability("model.dropout", dropout)
        self.image_shape = image_shape(input_shape)
        blocks: list[nn.Module] = []
        for depth, (fan_in, fan_out) in enumerate(pairwise([self.image_shape[0], *channels])):
            stride = 1 if depth == 0 else 2
            blocks += [nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        self.body = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(inputs.reshape(-1, *self.image_shape)).mean(dim=(2, 3))
        return self.head(self.dropout(features))


def image_shape(input_shape: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width) of inputs that are images, or square one-channel images laid out flat.

    Raises ConfigError where the shape cannot be read as a square image.
    """
    shape = tuple(int(n) for n in input_shape)
    if len(shape) == 3:
        return shape
    if len(shape) == 2:
        return (1, *shape)
    side = round(prod(shape) ** 0.5)
    if side * side != prod(shape):
        raise ConfigError(f"the data's input_shape {shape} is not a square image; use model@student=mlp for such data")
    return (1, side, side)


def _check_widths(key: str, widths: Sequence[int]) -> None:
    if len(widths) == 0 or any(width < 1 for width in widths):
        raise ConfigError(f"{key} is {list(widths)}; expected a list of positive layer sizes such as [800, 800]")


def _check_probability(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key} is {value}; expected a probability in [0, 1)")
