"""The FLOP counter against closed forms (a multiply-add counts two; biases, activations and losses count nothing)."""

from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from research.data.traces import TraceData
from research.methods.base import Training
from research.methods.sft_trace import SftTrace
from research.models.classifiers import ConvNet, Mlp
from research.models.flops import BatchFlops, flops_by_length, flops_of_inputs, flops_per_row, flops_per_row_of
from research.models.language import LanguageModel
from research.models.weights import weights_sha256
from research.tasks.addition import Addition
from research.text.templates import Plain


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


# -- rotary frequencies that depend on the text's length --------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8},
}


def with_rope(network: LanguageModel, rope_type: str) -> LanguageModel:
    """The network with another scaling of its rotary positions and the same weights."""
    config = type(network.model.config).from_dict(network.model.config.to_dict())
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALED[rope_type]}
    scaled = type(network.model)(config)
    scaled.load_state_dict(network.model.state_dict())
    network.model = scaled
    return network


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rope_type", SCALED)
def test_scaled_rotary_positions_count_as_plain_ones(rope_type: str, backward: bool) -> None:
    plain, scaled = language_model("llama"), with_rope(language_model("llama"), rope_type)
    kept = scaled.model.model.rotary_emb.inv_freq.clone()
    for length in (7, 64):
        expected = flops_per_row_of(plain, text(2, length), backward=backward)
        assert flops_per_row_of(scaled, text(2, length), backward=backward) == expected > 0
    rotary = scaled.model.model.rotary_emb
    assert rotary.rope_type == rope_type and torch.equal(rotary.inv_freq, kept), "counting changed the model"


def test_scaling_of_some_layers_counts_as_plain() -> None:
    """Gemma 3 has one rotation for each type of layer."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    counted = []
    for scaling in ({"rope_type": "default"}, {"rope_type": "dynamic", **SCALED["dynamic"]}):
        network = language_model("llama")
        rope = {"full_attention": {"rope_theta": 1e6, **scaling}, "sliding_attention": {"rope_type": "default"}}
        config = Gemma3TextConfig(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, layer_types=list(rope), rope_parameters=rope,
        )  # fmt: skip
        network.model = Gemma3ForCausalLM(config)
        counted.append(flops_per_row_of(network, text(2, 16), backward=True))
    assert counted[0] == counted[1] > 0


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_step_of_a_model_with_dynamic_positions_is_in_the_ledger() -> None:
    spent = []
    for scale in (lambda network: network, partial(with_rope, rope_type="dynamic")):
        data = TraceData(
            task=Addition(), template=Plain(), num_train=4, num_val=0, num_test=0, batch_size=4, max_tokens=96
        )
        network = scale(language_model("llama", max_positions=16, vocab_size=data.facts()["vocab_size"]))
        network.max_positions = None  # documents longer than it was made for, so that frequencies do change
        method = SftTrace(Training(network, partial(torch.optim.SGD, lr=0.1), None, {}))
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, **quiet)
        trainer.fit(method, datamodule=data)
        spent.append(method.update_flops)
        batch = next(iter(data.train_dataloader()))
        assert method.update_flops == BatchFlops(network, backward=True).of(batch) > 0
    assert spent[0] == spent[1] and network.model.model.rotary_emb.max_seq_len_cached > 16
