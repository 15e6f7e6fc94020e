"""The FLOP counter against closed forms (a multiply-add counts two; biases, activations and losses count nothing)."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from research.models.classifiers import ConvNet, Mlp
from research.models.flops import flops_by_length, flops_of_inputs, flops_per_row, flops_per_row_of
from research.models.language import LanguageModel
from research.models.weights import weights_sha256


@pytest.mark.parametrize("hidden", [[800, 800], [30], [20, 10, 5]])
def test_mlp_closed_form(hidden: list[int]) -> None:
    network = Mlp(hidden, input_shape=(784,), num_classes=10, dropout=0.5)
    products = [fan_in * fan_out for fan_in, fan_out in pairwise([784, *hidden, 10])]
    assert flops_per_row(network, (784,), backward=False) == 2 * sum(products)
    # Backward: the gradient of every weight, and of every layer's input but the first's, which nobody needs.
    assert flops_per_row(network, (784,), backward=True) == 2 * (3 * sum(products) - products[0])


def test_the_paper_s_networks() -> None:
    small = Mlp([800, 800], input_shape=(784,), num_classes=10)
    assert flops_per_row(small, (784,), backward=False) == 2_550_400  # 2 x (627,200 + 640,000 + 8,000)
    assert flops_per_row(small, (784,), backward=True) == 6_396_800  # 3 x 2,550,400 - 2 x 627,200


def test_conv_net_closed_form() -> None:
    network = ConvNet([4, 6], input_shape=(64,), num_classes=10)
    first, second, head = 64 * 9 * 1 * 4, 16 * 9 * 4 * 6, 6 * 10  # output places x kernel x channels in x out
    assert flops_per_row(network, (64,), backward=False) == 2 * (first + second + head)
    assert flops_per_row(network, (64,), backward=True) == 2 * (2 * first + 3 * second + 3 * head)


@pytest.mark.parametrize("backward", [False, True])
def test_counting_touches_neither_weights_nor_random_numbers_nor_modes(backward: bool) -> None:
    network = ConvNet([4, 6], input_shape=(64,), num_classes=10, dropout=0.5)
    before, state, step = weights_sha256(network), torch.get_rng_state(), network.body[1].num_batches_tracked.item()
    flops_per_row(network, (64,), backward=backward)
    assert weights_sha256(network) == before and torch.equal(torch.get_rng_state(), state)
    assert network.training and network.body[1].num_batches_tracked.item() == step
    assert all(parameter.grad is None for parameter in network.parameters())


def test_inside_no_grad_the_backward_pass_is_still_counted() -> None:
    network = Mlp([30], input_shape=(20,), num_classes=10)
    with torch.no_grad():
        assert flops_per_row(network, (20,), backward=True) == 2 * (3 * (600 + 300) - 600)


def test_a_compiled_network_counts_as_it_is() -> None:
    network = Mlp([30], input_shape=(20,), num_classes=10)
    network.compile(backend="eager")
    assert flops_per_row(network, (20,), backward=False) == 2 * (600 + 300)


def test_frozen_parameters_need_no_gradient() -> None:
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    network[0].requires_grad_(False)
    assert flops_per_row(network, (20,), backward=True) == 2 * (600 + 300 + 300)


# -- text -------------------------------------------------------------------------------------------------------------

TEXT = {"vocab_size": 50, "eos_token_id": 1, "pad_token_id": 0}


def language_model(architecture: str, **changes: object) -> LanguageModel:
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 40}
    return LanguageModel(architecture, **{**sizes, **TEXT, **changes})


def text(rows: int, length: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(rows, length, dtype=torch.int64) for _ in range(3))


@pytest.mark.parametrize(
    ("architecture", "options", "layer"),
    [
        ("llama", {}, 4 * 32 * 32 + 3 * 32 * 40),
        ("qwen3", {"num_kv_heads": 2}, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 40),
        ("gpt2", {}, 4 * 32 * 32 + 2 * 32 * 40),
    ],
)
@pytest.mark.parametrize("length", [1, 7, 64])
def test_language_model_closed_form(architecture: str, options: dict, layer: int, length: int) -> None:
    """2 x parameters x tokens, and for attention queries x keys and probabilities x values: 2 x 2 x T x T x width."""
    network = language_model(architecture, **options)
    products = length * (3 * layer + 32 * 50) + 3 * 2 * length * length * 32
    forward = flops_per_row_of(network, text(5, length), backward=False)
    assert forward == 2 * products
    assert flops_per_row_of(network, text(5, length), backward=True) == 3 * forward
    assert flops_of_inputs(network, text(6, length), backward=False) == 6 * forward


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_three_counted_lengths_give_every_other(architecture: str, backward: bool) -> None:
    network = language_model(architecture, max_positions=300)
    at = flops_by_length(network, text(2, 3), backward=backward)
    for length in (1, 13, 100, 257):
        assert at(length) == pytest.approx(flops_per_row_of(network, text(5, length), backward=backward), rel=1e-12)


def test_recomputed_activations_are_paid_for() -> None:
    plain, recomputing = (language_model("llama", gradient_checkpointing=on).train() for on in (False, True))
    forward = flops_per_row_of(plain, text(2, 16), backward=False)
    again = forward - 2 * 16 * (32 * 50 + 3 * 40 * 32)  # neither the head nor a layer's last product is recomputed
    assert flops_per_row_of(recomputing, text(2, 16), backward=True) == 3 * forward + again


def test_counting_text_touches_neither_weights_nor_random_numbers() -> None:
    network = language_model("llama", tie_embeddings=True)
    before, state = weights_sha256(network), torch.get_rng_state()
    flops_per_row_of(network, text(2, 16), backward=True)
    assert weights_sha256(network) == before and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and not parameter.is_meta for parameter in network.parameters())
    assert network.model.lm_head.weight is network.model.get_input_embeddings().weight
