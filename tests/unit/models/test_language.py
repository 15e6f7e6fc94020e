"""Language models from scratch: documents see themselves alone, and the library's own call is the truth."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from research.errors import ConfigError
from research.models.build import build_network
from research.models.language import LanguageModel, gated_width, one_document_a_row, same_document_and_before
from research.models.weights import count_parameters

ARCHITECTURES = ("llama", "qwen3", "gpt2")
FACTS: dict[str, Any] = {"vocab_size": 23, "eos_token_id": 1, "pad_token_id": 0}
REPOSITORY = Path(__file__).parents[3]


def small(architecture: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "initializer_range": 0.5}
    return LanguageModel(architecture, **{**sizes, **FACTS, **changes}).eval()


def documents(lengths: tuple[int, ...], vocab: int = 23) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


def packed(rows: list[list[Tensor]], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, position, segment) of documents laid end to end in each row, padded on the right with zeros."""
    ids, position, segment = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    for row, pieces in enumerate(rows):
        place = 0
        for number, piece in enumerate(pieces, start=1):
            end = place + len(piece)
            ids[row, place:end], position[row, place:end] = piece, torch.arange(len(piece))
            segment[row, place:end] = number
            place = end
    return ids, position, segment


def alone(network: nn.Module, document: Tensor) -> Tensor:
    return network(*packed([[document]], len(document)))[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_direct_call_of_the_library(architecture: str, attention: str) -> None:
    network = small(architecture, attention=attention)
    (document,) = documents((9,))
    direct = network.model(input_ids=document[None], attention_mask=torch.ones(1, 9)).logits[0]
    torch.testing.assert_close(alone(network, document), direct)
    assert network.model.config.model_type == architecture and direct.std() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_p43_packed_logits_are_those_of_each_document_alone(architecture: str, attention: str) -> None:
    network = small(architecture, attention=attention, num_kv_heads=None if architecture == "gpt2" else 2)
    a, b, c, d = documents((5, 3, 1, 7))
    logits_BTV = network(*packed([[a, b, c], [d]], 12))
    for document, row, place in ((a, 0, 0), (b, 0, 5), (c, 0, 8), (d, 1, 0)):
        found = logits_BTV[row, place : place + len(document)]
        torch.testing.assert_close(found, alone(network, document), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_p43_the_segment_alone_says_who_sees_whom(architecture: str, attention: str) -> None:
    """Positions that run on over the row hide no boundary: rotary positions are relative, so logits stay the same."""
    network = small(architecture, attention=attention)
    a, b = documents((5, 6))
    ids, _, segment = packed([[a, b]], 11)
    logits_BTV = network(ids, torch.arange(11)[None], segment)
    torch.testing.assert_close(logits_BTV[0, 5:], alone(network, b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_p43_packed_gradients_are_the_sum_of_each_document_s(architecture: str) -> None:
    network = small(architecture)
    a, b = documents((5, 3))
    weights_TV = torch.randn(8, 23)
    (network(*packed([[a, b]], 8))[0] * weights_TV).sum().backward()
    together = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    (alone(network, a) * weights_TV[:5]).sum().backward()
    (alone(network, b) * weights_TV[5:]).sum().backward()
    for gradient, parameter in zip(together, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_p43_editing_one_document_leaves_the_others_bit_equal(architecture: str, attention: str) -> None:
    network = small(architecture, attention=attention)
    a, b, c = documents((6, 5, 4))
    before = network(*packed([[a, b, c]], 16))
    after = network(*packed([[a, (b + 1) % 23, c]], 16))
    assert torch.equal(before[0, :6], after[0, :6]) and torch.equal(before[0, 11:15], after[0, 11:15])
    assert not torch.equal(before[0, 6:11], after[0, 6:11])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_logit_depends_on_a_later_token(architecture: str) -> None:
    network = small(architecture)
    (document,) = documents((8,))
    changed = document.clone()
    changed[5:] = (changed[5:] + 1) % 23
    assert torch.equal(alone(network, document)[:5], alone(network, changed)[:5])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_logit_whatever_stands_in_it(architecture: str) -> None:
    network = small(architecture)
    a, b = documents((6, 4))
    expected = alone(network, b)
    ids, position, segment = packed([[a], [b]], 9)
    plain = network(ids, position, segment)[1, :4]
    torch.testing.assert_close(plain, expected)
    padding = segment == 0
    other_ids = torch.where(padding, 7, ids)
    other_position = torch.where(padding, 3, position)
    assert torch.equal(network(other_ids, position, segment)[1, :4], plain)
    assert torch.equal(network(ids, other_position, segment)[1, :4], plain)
    left = (
        torch.cat([ids.new_zeros(1, 3), b[None]], 1),
        torch.tensor([[0, 0, 0, 0, 1, 2, 3]]),
        torch.ones(1, 7).long(),
    )
    left[2][:, :3] = 0
    logits_BTV = network(*left)
    torch.testing.assert_close(logits_BTV[0, 3:], expected)
    assert bool(logits_BTV.isfinite().all())


def test_which_rows_need_no_mask() -> None:
    arange, ones = torch.arange(4)[None], torch.ones(1, 4).long()
    assert one_document_a_row(arange, ones)
    assert one_document_a_row(torch.tensor([[0, 1, 0, 9]]), torch.tensor([[1, 1, 0, 0]]))
    assert one_document_a_row(arange, torch.zeros(1, 4).long())
    for position, segment in (
        ([[0, 1, 0, 1]], [[1, 1, 2, 2]]),
        ([[0, 0, 1, 2]], [[0, 1, 1, 1]]),
        ([[0, 1, 0, 1]], [[1, 1, 1, 1]]),
        ([[3, 4, 5, 6]], [[1, 1, 1, 1]]),
        ([[0, 1, 2, 3]], [[2, 2, 2, 2]]),
    ):
        assert not one_document_a_row(torch.tensor(position), torch.tensor(segment))
    assert not one_document_a_row(torch.cat([arange, arange]), torch.tensor([[1, 1, 1, 1], [1, 1, 2, 2]]))


def test_the_mask_by_hand() -> None:
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert same_document_and_before(torch.tensor([[1, 1, 2, 0, 0]])).int().tolist() == [[expected]]


def test_the_mask_of_a_window_by_hand() -> None:
    """A window of two places: the query's own and the one before."""
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert same_document_and_before(torch.tensor([[1, 1, 1, 2, 2]]), window=2).int().tolist() == [[expected]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("vocab", [256, 512, 50_257])
def test_c17_the_initial_loss_is_the_log_of_the_vocabulary(architecture: str, vocab: int) -> None:
    network = small(architecture, vocab_size=vocab, initializer_range=0.02)
    ids, position, segment = packed([[piece] for piece in documents((32,) * 8, vocab)], 32)
    with torch.no_grad():
        loss = F.cross_entropy(network(ids, position, segment)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss) - math.log(vocab)) < 0.1


PRESETS = {
    "llama_100k": 101_696,
    "llama_300k": 304_032,
    "llama_1m": 997_760,
    "llama_3m": 3_111_744,
    "llama_11m": 10_646_400,
    "llama": 150_464,
    "qwen3": 136_224,
    "gpt2": 186_944,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_named_sizes_have_the_parameters_that_their_files_say(preset: str) -> None:
    path = REPOSITORY / "conf" / "model" / f"{preset}.yaml"
    description = yaml.safe_load(path.read_text())
    counts = []
    for vocab in (32, 33):
        with torch.device("meta"):
            counts.append(count_parameters(build_network(description, **{**FACTS, "vocab_size": vocab})))
    assert counts[0] == PRESETS[preset]
    said = f"# {counts[0]:,} parameters at a vocabulary of 32, and {counts[1] - counts[0]} for every further token."
    assert said in path.read_text()


def test_parameters_by_hand() -> None:
    width, inner, layers, vocab = 16, 48, 2, 23
    gated = 4 * width * width + 3 * width * inner + 2 * width
    assert count_parameters(small("llama")) == layers * gated + 2 * vocab * width + width
    assert count_parameters(small("llama", tie_embeddings=True)) == layers * gated + vocab * width + width
    plain = 12 * width * width + 13 * width  # with biases and two LayerNorms
    expected = layers * plain + 2 * vocab * width + 512 * width + 2 * width
    assert count_parameters(small("gpt2")) == expected
    assert gated_width(16) == inner and gated_width(96) == 256 and gated_width(64) == 176


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_autocast_trains_and_stays_near_float32(architecture: str) -> None:
    network = small(architecture, initializer_range=0.1)
    inputs = packed([documents((5, 3)), documents((8,))], 8)
    expected = network(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = network(*inputs)
    assert logits_BTV.dtype == torch.bfloat16
    torch.testing.assert_close(logits_BTV.float(), expected, atol=0.02, rtol=0.05)
    logits_BTV.float().square().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_changes_no_gradient(architecture: str) -> None:
    inputs = packed([documents((5, 3)), documents((8,))], 8)
    gradients = []
    for recomputed in (False, True):
        network = small(architecture, gradient_checkpointing=recomputed).train()
        assert network.model.is_activation_checkpointing == recomputed
        network(*inputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_p34_the_embedding_of_padding_is_trained_where_it_is_the_eos() -> None:
    network = small("llama", eos_token_id=0, pad_token_id=0)
    embedding = network.model.get_input_embeddings()
    assert embedding.padding_idx is None and bool(embedding.weight[0].any())
    network(*packed([[torch.tensor([0, 3, 0, 5])]], 4))[0, 2:].sum().backward()
    assert bool(embedding.weight.grad[0].any())


def test_generation_stops_at_the_data_s_ids() -> None:
    told = small("qwen3", eos_token_id=[1, 5], pad_token_id=2).model.generation_config
    assert (told.eos_token_id, told.pad_token_id, told.bos_token_id) == ([1, 5], 2, None)


def test_dropout_works_in_training_alone() -> None:
    for architecture in ARCHITECTURES:
        network = small(architecture, dropout=0.5)
        inputs = packed([documents((8,))], 8)
        assert torch.equal(network(*inputs), network(*inputs))
        network.train()
        assert not torch.equal(network(*inputs), network(*inputs))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_document_longer_than_the_positions_is_refused_and_a_long_row_is_not(architecture: str) -> None:
    network = small(architecture, max_positions=6)
    a, b = documents((6, 4))
    torch.testing.assert_close(network(*packed([[a, b]], 10))[0, 6:], alone(network, b), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="a document has 7 tokens, the model is built for max_positions=6"):
        alone(network, documents((7,))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, r"model\.architecture is 'mamba'; expected one of llama, qwen3, gpt2"),
        ({"hidden_size": 18}, r"model\.hidden_size is 18 and model\.num_heads is 4; expected whole heads of even"),
        ({"hidden_size": 12}, "expected whole heads of even width"),
        ({"num_layers": 0}, r"model\.num_layers is 0"),
        ({"num_kv_heads": 3}, r"model\.num_kv_heads is 3; expected a divisor of model\.num_heads=4"),
        ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
        ({"architecture": "gpt2", "num_kv_heads": 4}, r"model\.num_kv_heads is 4, which gpt2 does not have"),
        ({"architecture": "gpt2", "rope_theta": 1.0}, r"model\.rope_theta is 1\.0, which gpt2 does not have"),
        ({"intermediate_size": 0}, r"model\.intermediate_size is 0"),
        ({"initializer_range": -0.1}, r"model\.initializer_range is -0\.1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**{"architecture": "llama", **changes})
