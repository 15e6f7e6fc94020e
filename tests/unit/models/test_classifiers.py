"""Networks against hand counts and a loop written out with torch's own functions."""

import pytest
import torch
from torch.nn import functional as F

from research.errors import ConfigError
from research.models.classifiers import ConvNet, Mlp, image_shape
from research.models.weights import count_parameters


@pytest.mark.parametrize(
    ("hidden", "parameters"),
    [([800, 800], 1_276_810), ([1200, 1200], 2_395_210), ([5], 784 * 5 + 5 + 5 * 10 + 10)],
)
def test_mlp_parameters(hidden: list[int], parameters: int) -> None:
    for dropout in (0.0, 0.5):
        network = Mlp(hidden, input_shape=(784,), num_classes=10, input_dropout=dropout, dropout=dropout)
        assert count_parameters(network) == parameters


def test_conv_net_parameters() -> None:
    # 1 -> 16 -> 32 channels of 3x3 without bias, a scale and a shift for each, a head of 32 x 10 with bias
    expected = 9 * 1 * 16 + 2 * 16 + 9 * 16 * 32 + 2 * 32 + 32 * 10 + 10
    assert count_parameters(ConvNet([16, 32], input_shape=(784,), num_classes=10)) == expected


def test_mlp_is_the_formula_on_inputs_of_any_shape() -> None:
    network = Mlp([7, 6], input_shape=(2, 3), num_classes=4)
    weights = list(network.state_dict().values())
    inputs = torch.randn(5, 2, 3)
    hidden = inputs.reshape(5, 6)
    for weight, bias in zip(weights[0:4:2], weights[1:4:2], strict=True):
        hidden = (hidden @ weight.T + bias).clamp(min=0)
    torch.testing.assert_close(network(inputs), hidden @ weights[4].T + weights[5])


def test_conv_net_is_the_formula() -> None:
    network = ConvNet([3, 4], input_shape=(36,), num_classes=5).eval()
    state = network.state_dict()
    inputs = torch.randn(2, 36)
    features = inputs.reshape(2, 1, 6, 6)
    for layer, stride in ((0, 1), (3, 2)):
        features = F.conv2d(features, state[f"body.{layer}.weight"], stride=stride, padding=1)
        features = (features / (1 + 1e-5) ** 0.5).clamp(min=0)  # running mean 0 and variance 1, scale 1, shift 0
    assert features.shape == (2, 4, 3, 3)
    expected = features.mean(dim=(2, 3)) @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(network(inputs), expected)


def test_dropout_drops_inputs_and_hidden_units_in_training_alone() -> None:
    network = Mlp([1000], input_shape=(50,), num_classes=3, input_dropout=0.2, dropout=0.5)
    inputs = torch.ones(1, 50)
    dropouts = [module for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    assert [module.p for module in dropouts] == [0.2, 0.5]
    assert not torch.equal(network(inputs), network(inputs))
    network.eval()
    assert torch.equal(network(inputs), network(inputs))


def test_image_shape() -> None:
    assert image_shape((784,)) == (1, 28, 28)
    assert image_shape((28, 20)) == (1, 28, 20)
    assert image_shape((3, 8, 9)) == (3, 8, 9)
    with pytest.raises(ConfigError, match=r"\(440,\) is not a square image"):
        image_shape((440,))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hidden": []}, "model.hidden"),
        ({"hidden": [10, 0]}, "model.hidden"),
        ({"hidden": [10], "dropout": 1.0}, "model.dropout is 1.0"),
        ({"hidden": [10], "dropout": float("nan")}, "model.dropout is nan"),
        ({"hidden": [10], "input_dropout": -0.1}, "model.input_dropout is -0.1"),
    ],
)
def test_bad_options_are_named(options: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Mlp(**options, input_shape=(4,), num_classes=2)
