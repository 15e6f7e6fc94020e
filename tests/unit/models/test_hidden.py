"""Hidden states and head in place of logits: the same distribution and the same gradients, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from research.errors import ConfigError
from research.losses.linear import linear_cross_entropy
from research.losses.projection import project
from research.losses.soft_target import soft_target
from research.losses.supervised import cross_entropy
from research.models.language import LanguageModel
from research.models.pretrained_language import PretrainedLanguageModel

FACTS: dict[str, Any] = {"vocab_size": 23, "eos_token_id": 1, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
         "intermediate_size": 24, "initializer_range": 0.5}  # fmt: skip


def small(architecture: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "initializer_range": 0.5}
    return LanguageModel(architecture, **{**sizes, **FACTS, **changes})


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Two documents in the first row, one and padding in the second."""
    ids = torch.randint(1, 23, (2, 40), generator=torch.Generator().manual_seed(1))
    segment = torch.ones_like(ids)
    segment[0, 22:], segment[1, 30:] = 2, 0
    position = torch.arange(40).repeat(2, 1)
    position[0, 22:] -= 22
    return ids, position, segment


def saved(folder: Path, kind: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=23, **{**SIZES, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def gradients(loss: Tensor, network: nn.Module) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_trained_alike(network: Any) -> None:
    """Cross-entropy of 80 places, from logits and from the projection: every parameter has the same gradient."""
    inputs, weight = packed(), (packed()[2] > 0).float()
    labels = inputs[0].roll(-1, 1)
    whole = gradients(cross_entropy(network(*inputs), labels, weight_N=weight).mean(), network)
    projection = network.hidden_projection(*inputs)
    ours = gradients(linear_cross_entropy(projection, labels, weight_N=weight, chunk_rows=16).mean(), network)
    assert set(ours) == set(whole) and len(ours) > 5
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_the_projection_makes_the_logits_and_trains_alike(architecture: str, tied: bool) -> None:
    network = small(architecture, tie_embeddings=tied)
    projection, inputs = network.hidden_projection(*packed()), packed()
    assert projection.hidden_ND.shape == (2, 40, 16) and projection.num_classes == 23 and projection.softcap is None
    assert projection.weight_VD is network.model.lm_head.weight
    torch.testing.assert_close(project(projection), network(*inputs), atol=1e-5, rtol=1e-5)
    assert_trained_alike(network)


def test_the_softcap_of_the_config_is_in_the_projection(tmp_path: Path) -> None:
    folder = saved(tmp_path, "gemma2", final_logit_softcapping=3.0, query_pre_attn_scalar=8, sliding_window=64)
    network = PretrainedLanguageModel(str(folder), attention="eager", **FACTS)
    projection = network.hidden_projection(*packed())
    logits = network(*packed())
    assert projection.softcap == 3.0 and 2.0 < float(logits.detach().abs().max()) <= 3.0
    torch.testing.assert_close(project(projection), logits, atol=1e-5, rtol=1e-5)
    assert_trained_alike(network)


def test_adapters_are_trained_through_the_projection(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    network = PretrainedLanguageModel(str(folder), lora_rank=2, **FACTS)
    with torch.no_grad():  # adapters start as nothing
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    torch.testing.assert_close(project(network.hidden_projection(*packed())), network(*packed()), atol=1e-4, rtol=1e-4)
    assert_trained_alike(network)
    assert not network.hidden_projection(*packed()).weight_VD.requires_grad


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    network = PretrainedLanguageModel(str(folder), lora_rank=2, lora_targets=["q_proj", "lm_head"], **FACTS)
    with pytest.raises(ConfigError, match=r"output head is a Linear.* take it out of model\.lora_targets"):
        network.hidden_projection(*packed())


@pytest.mark.parametrize(("kind", "changes"), [("cohere", {"logit_scale": 0.25}), ("granite", {"logits_scaling": 4.0})])
def test_a_model_that_scales_its_logits_is_refused(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    network = PretrainedLanguageModel(str(saved(tmp_path, kind, **changes)), **FACTS)
    with pytest.raises(ConfigError, match=rf"logits of a {kind} are not its last hidden states times its head"):
        network.hidden_projection(*packed())


def test_the_check_leaves_dropout_modes_and_random_numbers_alone() -> None:
    network = small("gpt2", dropout=0.5).train()
    network.model.transformer.h[0].eval()
    state = torch.get_rng_state()
    hidden = network.hidden_projection(*packed()).hidden_ND
    modes = [part.training for part in network.modules()]
    torch.set_rng_state(state)
    again = network.hidden_projection(*packed()).hidden_ND
    torch.set_rng_state(state)
    logits = network(*packed())
    assert torch.equal(hidden, again) and [part.training for part in network.modules()] == modes
    torch.testing.assert_close(logits, network.model.lm_head(hidden))
    assert network.training and not network.model.transformer.h[0].training


def test_half_precision_and_other_students_of_the_same_teacher(tmp_path: Path) -> None:
    network = PretrainedLanguageModel(str(saved(tmp_path, "qwen3")), dtype="bfloat16", **FACTS)
    projection, logits = network.hidden_projection(*packed()), network(*packed())
    assert projection.hidden_ND.dtype == torch.bfloat16
    torch.testing.assert_close(project(projection), logits)
    student = small("llama")
    hidden = soft_target(student.hidden_projection(*packed()), projection, divergence="reverse_kl").total
    dense = soft_target(student(*packed()), projection, divergence="reverse_kl").total
    torch.testing.assert_close(hidden, dense)


def test_too_long_a_document_is_refused() -> None:
    with pytest.raises(ValueError, match="max_positions=16"):
        small("llama", max_positions=16).hidden_projection(*packed())
