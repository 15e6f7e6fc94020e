"""Documents read by plain calls over a model's weights, against the library's own pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.models.build import build_network
from research.records import DenseLogits, TokenBatch
from research.teachers.frozen import FrozenTeacher, LoadedNetwork
from research.text.document import Document, collate

FACTS: dict[str, Any] = {"vocab_size": 31, "eos_token_id": 1, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    "_target_": "research.models.language.LanguageModel", "hidden_size": 32, "num_layers": 3, "num_heads": 4,
    "num_kv_heads": 2, "intermediate_size": 56, "max_positions": 64, "initializer_range": 0.3,
}  # fmt: skip


def make_network(architecture: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_network({**SIZES, "architecture": architecture, **changes}, **FACTS).eval()


def make_batch(packed_to: int | None = None) -> TokenBatch:
    """Prompts and completions of many lengths."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 9), (1, 30), (12, 1), (7, 0), (20, 24)]
    ids = [torch.randint(2, 31, (prompt + rest,), generator=generator).tolist() for prompt, rest in sizes]
    documents = [Document(tuple(row), size[0], place) for place, (row, size) in enumerate(zip(ids, sizes, strict=True))]
    return collate(documents, prompt_loss_weight=0.0, pad_id=0, packed_to=packed_to)


def make_teacher(network: nn.Module, **options: Any) -> FrozenTeacher:
    return FrozenTeacher(LoadedNetwork(network, None, FACTS["vocab_size"], "teacher"), **options)


def library(network: Any, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        return network(*batch.network_inputs())[batch.completion_BT].float()


def logits_of(teacher: FrozenTeacher, batch: TokenBatch) -> Tensor:
    signal = teacher.signal_at(batch, batch.completion_BT)
    if isinstance(signal, DenseLogits):
        return signal.logits_NV
    return nn.functional.linear(signal.hidden_ND, signal.weight_VD, signal.bias_V).float()


def changed(network: Any, change: Callable[[Any], None] | None) -> Any:
    if change is not None:
        change(network)
    return network


@torch.no_grad()
def with_biases(network: Any) -> None:
    for linear in [module for module in network.modules() if isinstance(module, nn.Linear)]:
        linear.bias = nn.Parameter(torch.randn(linear.out_features))


@pytest.mark.parametrize("signal", ["dense", "hidden"])
@pytest.mark.parametrize(
    ("architecture", "changes", "change"),
    [
        ("llama", {}, None),
        ("qwen3", {}, None),
        ("llama", {"num_kv_heads": 4, "num_layers": 1, "tie_embeddings": True}, None),
        ("llama", {"rope_theta": 500.0}, with_biases),
    ],
    ids=["llama", "qwen3", "one layer and tied", "biases"],
)
def test_the_places_asked_for_are_the_library_s(
    architecture: str, changes: dict[str, Any], change: Callable[[Any], None] | None, signal: Any
) -> None:
    """Row by row, behind prompts of any length and before padding; one row of the batch has no such place."""
    network, batch = changed(make_network(architecture, **changes), change), make_batch()
    assert network.reads_places(*batch.network_inputs())
    found_NV = logits_of(make_teacher(network, signal=signal), batch)
    assert found_NV.shape == (64, 31) and not found_NV.requires_grad
    torch.testing.assert_close(found_NV, library(network, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_hidden_states_are_the_library_s_to_the_bit(architecture: str) -> None:
    """What makes a student that is its own teacher learn nothing, under any divergence."""
    network, batch = make_network(architecture), make_batch()
    with torch.no_grad():
        expected = network.hidden_projection(*batch.network_inputs()).at(batch.completion_BT)
    found = network.hidden_projection_at(batch.ids_BT, batch.position_BT, batch.completion_BT)
    assert torch.equal(found.hidden_ND, expected.hidden_ND)


def test_it_is_half_precision_s_own_rounding() -> None:
    """Both against the same weights in float64."""
    rounded, exact = make_network("qwen3").bfloat16(), make_network("qwen3").double()
    exact.load_state_dict({name: tensor.double() for name, tensor in rounded.state_dict().items()})
    batch, found = make_batch(), {}
    for name, logits_NV in (("ours", logits_of(make_teacher(rounded), batch)), ("theirs", library(rounded, batch))):
        found[name] = float((logits_NV - library(exact, batch)).square().mean())
    assert 0 < found["ours"] < 1.3 * found["theirs"]


@torch.no_grad()
def test_no_place_is_read_to_the_end_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's MLP and the head see the completion's places, all before it the whole batch."""
    network, batch, rows = make_network(), make_batch(), []
    linear = torch.nn.functional.linear

    def counted(input: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        rows.append((tuple(weight.shape), input.numel() // input.shape[-1]))
        return linear(input, weight, *bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    make_teacher(network).signal_at(batch, batch.completion_BT)
    by_shape = {shape: [count for one, count in rows if one == shape] for shape, _ in rows}
    everywhere = batch.ids_BT.numel()
    assert by_shape[(56, 32)] == [everywhere] * 4 + [64] * 2  # gate and up
    assert by_shape[(32, 56)] == [everywhere] * 2 + [64]  # down
    assert by_shape[(31, 32)] == [64]


class Doubled(nn.Linear):
    """A projection that does more than multiply."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def adapted(network: Any) -> None:
    old = network.model.model.layers[1].mlp.down_proj
    network.model.model.layers[1].mlp.down_proj = new = Doubled(56, 32, bias=False)
    new.weight = old.weight


def hooked(network: Any) -> None:
    network.register_forward_hook(lambda _, __, logits_BTV: logits_BTV * 2)


def hooked_within(network: Any) -> None:
    network.model.model.layers[0].register_forward_hook(lambda _, __, hidden_BTC: hidden_BTC * 2)


@pytest.mark.parametrize("change", [adapted, hooked, hooked_within])
def test_a_teacher_that_does_more_is_asked_itself(change: Callable[[Any], None]) -> None:
    plain, more, batch = make_network(), changed(make_network(), change), make_batch()
    assert plain.reads_places(*batch.network_inputs()) and not more.reads_places(*batch.network_inputs())
    expected_NV = library(more, batch)
    assert not torch.allclose(library(plain, batch), expected_NV, atol=1e-2)
    torch.testing.assert_close(logits_of(make_teacher(more), batch), expected_NV, rtol=1e-6, atol=1e-6)


def test_packed_rows_other_families_and_training_ask_the_library() -> None:
    network, packed = make_network(), make_batch(packed_to=64)
    assert not network.reads_places(*packed.network_inputs())
    torch.testing.assert_close(logits_of(make_teacher(network), packed), library(network, packed))
    inputs = make_batch().network_inputs()
    others = [make_network("gpt2", num_kv_heads=None), make_network(attention="eager"), make_network().train()]
    assert not any(other.reads_places(*inputs) for other in others)
    others[0].eval()
    torch.testing.assert_close(logits_of(make_teacher(others[0]), make_batch()), library(others[0], make_batch()))


def test_a_document_that_is_too_long_is_refused() -> None:
    teacher, batch = make_teacher(make_network(max_positions=30)), make_batch()
    with pytest.raises(ValueError, match="a document has 44 tokens, the model is built for max_positions=30"):
        teacher.signal_at(batch, batch.completion_BT)
