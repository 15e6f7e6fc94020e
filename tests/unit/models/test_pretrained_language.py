"""Language models that this project did not train, whole and with adapters."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from research.errors import CheckpointError, ConfigError
from research.losses.projection import project
from research.models.build import build_network, describe, rebuild
from research.models.flops import flops_per_row_of
from research.models.pretrained_language import PretrainedLanguageModel
from research.models.weights import (
    SELF,
    at_home,
    count_parameters,
    has_own_path,
    read_architecture,
    save_network,
    weights_sha256,
)
from research.text.tokenizer import build_tokenizer, tokenizer_sha256

FACTS: dict[str, Any] = {"vocab_size": 23, "eos_token_id": 1, "pad_token_id": 0}
IDS = torch.tensor([[3, 9, 22, 0, 5, 1]])
ARCHITECTURES = ("llama", "qwen3", "gpt2")
TARGET = "research.models.pretrained_language.PretrainedLanguageModel"


def saved_model(folder: Path, architecture: str = "llama", vocab_size: int = 23, **changes: Any) -> Any:
    """A folder as anybody's `save_pretrained` leaves it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    if architecture != "gpt2":
        sizes |= {"intermediate_size": 24, "head_dim": 8, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(architecture, vocab_size=vocab_size, **{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def logits_of(network: Any) -> torch.Tensor:
    return network(IDS, torch.arange(IDS.shape[1])[None], torch.ones_like(IDS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_direct_call(architecture: str, tmp_path: Path) -> None:
    model = saved_model(tmp_path, architecture)
    network = PretrainedLanguageModel(str(tmp_path), **FACTS)
    assert network.training
    assert torch.equal(logits_of(network.eval()), model(IDS).logits)
    assert network.model.generation_config.eos_token_id == 1 and network.model.generation_config.pad_token_id == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [8, 136])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_p18_a_padded_head_is_cut_so_that_kl_is_that_of_the_unpadded(
    architecture: str, padding: int, tied: bool, tmp_path: Path
) -> None:
    padded = saved_model(tmp_path / "padded", architecture, 23 + padding, tie_word_embeddings=tied)
    network = PretrainedLanguageModel(str(tmp_path / "padded"), **FACTS).eval().double()
    expected_BTV = padded.double()(IDS).logits[..., :23].detach()
    logits_BTV = logits_of(network).detach()
    assert logits_BTV.shape[-1] == network.vocab_size == network.model.config.vocab_size == 23
    student_BTV = torch.randn(expected_BTV.shape, dtype=torch.float64)
    kls = [
        F.kl_div(student_BTV.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        for teacher in (expected_BTV, logits_BTV)
    ]
    assert float(kls[0]) > 1 and abs(float(kls[0] - kls[1])) < 1e-12 * float(kls[0])
    drawn = network.model.generate(IDS.repeat(64, 1), max_new_tokens=4, do_sample=True, temperature=5.0)
    assert int(drawn.max()) < 23


def test_a_model_of_fewer_tokens_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path)
    with pytest.raises(CheckpointError, match="knows 23 tokens, the tokenizer has 24"):
        PretrainedLanguageModel(str(tmp_path), **{**FACTS, "vocab_size": 24})


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    """As many ids of another meaning would train without a word; a folder without a tokenizer is taken as it is."""
    model = saved_model(tmp_path / "model")
    own, other = (build_tokenizer("characters", alphabet=letters) for letters in ("abcdef", "abcdeg"))
    sha256 = [tokenizer_sha256(tokenizer) for tokenizer in (own, other)]
    assert sha256[0] != sha256[1] and len(own) == len(other)
    for given in sha256:
        PretrainedLanguageModel(str(tmp_path / "model"), **FACTS, tokenizer_sha256=given)
    own.save_pretrained(tmp_path / "model")
    facts = FACTS | {"tokenizer_sha256": sha256[0]}
    network = build_network({"_target_": TARGET, "path": str(tmp_path / "model")}, **facts)
    assert torch.equal(logits_of(network.eval()), model(IDS).logits)
    with pytest.raises(CheckpointError, match=rf"of its own \({sha256[0][:12]}.*{sha256[1][:12]}.*Give data"):
        build_network({"_target_": TARGET, "path": str(tmp_path / "model")}, **facts | {"tokenizer_sha256": sha256[1]})


def test_a_run_s_folder_is_told_where_its_network_is(tmp_path: Path) -> None:
    saved_model(tmp_path / "run" / "student")
    with pytest.raises(CheckpointError, match=r"run's folder, and its network is in .*run/student: give that"):
        PretrainedLanguageModel(str(tmp_path / "run"), **FACTS)


def test_p28_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    saved_model(tmp_path).model.save_pretrained(tmp_path)  # the body, without the head
    with pytest.raises(CheckpointError, match=r"lacks 1 of its tensors \(lm_head\.weight\)"):
        PretrainedLanguageModel(str(tmp_path), **FACTS)


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a causal language model"):
        PretrainedLanguageModel(str(tmp_path), **FACTS)
    with pytest.raises(ConfigError, match=r"model\.path is not set"):
        PretrainedLanguageModel("", **FACTS)


def test_p89_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        PretrainedLanguageModel(str(tmp_path), **FACTS)


def test_p117_a_folder_s_own_code_is_not_run(tmp_path: Path) -> None:
    saved_model(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(CheckpointError, match="not a causal language model"):
        PretrainedLanguageModel(str(tmp_path), **FACTS)
    assert not (tmp_path / "ran").exists()


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    saved_model(tmp_path)
    before = torch.get_rng_state()
    PretrainedLanguageModel(str(tmp_path), **FACTS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_have_the_precision_that_is_asked_for(tmp_path: Path, dtype: Any, expected: torch.dtype) -> None:
    saved_model(tmp_path)
    network = PretrainedLanguageModel(str(tmp_path), dtype=dtype, **FACTS)
    assert {parameter.dtype for parameter in network.parameters()} == {expected}
    assert logits_of(network).dtype == expected


def test_a_trained_pretrained_model_is_rebuilt_from_its_own_folder(tmp_path: Path) -> None:
    saved_model(tmp_path / "base")
    told = {"_target_": TARGET, "path": str(tmp_path / "base"), "revision": "abc"}
    network = build_network(told, **FACTS).eval()
    with torch.no_grad():
        network.model.lm_head.weight.mul_(1.5)
    sha256 = save_network(tmp_path / "student", network, describe(told, **FACTS))
    (tmp_path / "base").rename(tmp_path / "gone")
    architecture = read_architecture(tmp_path / "student")
    assert architecture["network"] == {"_target_": TARGET, "path": SELF} and has_own_path(architecture)
    assert architecture["base"] == {"path": "base", "revision": "abc"}
    loaded = rebuild(at_home(architecture, tmp_path / "student")).eval()
    assert weights_sha256(loaded) == sha256 == weights_sha256(network)
    assert torch.equal(logits_of(loaded), logits_of(network))


# -- packed rows ------------------------------------------------------------------------------------------------------

WINDOW = {"sliding_window": 4}
BOTH = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = {
    "mistral": WINDOW,  # all layers, without a word on their types
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "gemma2": BOTH,
    "gemma3_text": BOTH,
}
KERNELS = [(name, kernel) for name in WINDOWED for kernel in ("sdpa", "eager") if (name, kernel) != ("gemma2", "sdpa")]
LENGTHS = (11, 3, 9)


def packed() -> tuple[torch.Tensor, ...]:
    """(ids, position, segment), each [1, T], of documents laid end to end and two places of padding."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(23, (1, sum(LENGTHS) + 2), generator=generator)
    position_T = torch.cat([*(torch.arange(length) for length in LENGTHS), torch.zeros(2, dtype=torch.int64)])
    segment_T = torch.repeat_interleave(torch.tensor([1, 2, 3, 0]), torch.tensor([*LENGTHS, 2]))
    return ids_BT, position_T[None], segment_T[None]


def one_by_one(network: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the same documents, each in a row of its own."""
    pieces = ids_BT[0, : sum(LENGTHS)].split(LENGTHS)
    rows = [(piece[None], torch.arange(len(piece))[None], torch.ones(1, len(piece)).long()) for piece in pieces]
    return torch.cat([network(*row)[0] for row in rows])


@pytest.mark.parametrize(("architecture", "attention"), KERNELS)
@torch.no_grad()
def test_p43_packed_documents_keep_the_model_s_window(architecture: str, attention: Any, tmp_path: Path) -> None:
    saved_model(tmp_path, architecture, **WINDOWED[architecture])
    network = PretrainedLanguageModel(str(tmp_path), attention=attention, **FACTS).eval().double()
    inputs, near = packed(), {"atol": 1e-5, "rtol": 1e-5}  # eager attention rounds to float32
    expected_TV = one_by_one(network, inputs[0])
    torch.testing.assert_close(network(*inputs)[0, : sum(LENGTHS)], expected_TV, **near)
    projected_BTV = project(network.hidden_projection(*inputs))
    torch.testing.assert_close(projected_BTV[0, : sum(LENGTHS)], expected_TV, **near)
    network.model.config.sliding_window = 64
    unlimited_TV = one_by_one(network, inputs[0])
    assert float((unlimited_TV - expected_TV).abs().max()) > 0.1, "the example's window hides nothing"
    torch.testing.assert_close(network(*inputs)[0, : sum(LENGTHS)], unlimited_TV, **near)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_flops_are_those_without_a_window(architecture: str, tmp_path: Path) -> None:
    saved_model(tmp_path, architecture, **WINDOWED[architecture])
    network = PretrainedLanguageModel(str(tmp_path), **FACTS)
    counted = flops_per_row_of(network, packed(), backward=True)
    network.model.config.sliding_window = 64
    assert counted == flops_per_row_of(network, packed(), backward=True) > 0


@pytest.mark.parametrize(
    ("architecture", "changes", "told"),
    [
        ("llama4_text", {"intermediate_size_mlp": 24, "num_local_experts": 2}, "chunked_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
        ("rwkv", {}, "a recurrent state"),
    ],
)
@torch.no_grad()
def test_layers_that_no_mask_keeps_to_one_document_are_refused(
    architecture: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    saved_model(tmp_path, architecture, **changes)
    network = PretrainedLanguageModel(str(tmp_path), attention="eager", **FACTS).eval()
    inputs = packed()
    assert bool(one_by_one(network, inputs[0]).isfinite().all())
    assert flops_per_row_of(network, inputs, backward=False) > 0
    message = rf"a {architecture} has layers of {told}, .* leave data\.packed_to null for this model"
    with pytest.raises(ConfigError, match=message):
        network(*inputs)


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapted(folder: Path, **changes: Any) -> PretrainedLanguageModel:
    pytest.importorskip("peft")
    options = {"lora_rank": 2, **changes}
    torch.manual_seed(1)
    return PretrainedLanguageModel(str(folder), **FACTS, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_adapters_are_trained_and_they_start_at_the_base(architecture: str, tmp_path: Path) -> None:
    model = saved_model(tmp_path, architecture)
    network = adapted(tmp_path)
    torch.testing.assert_close(logits_of(network.eval()), model(IDS).logits)
    logits_of(network.train()).square().sum().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all((parameter.grad is not None) == (name in trained) for name, parameter in network.named_parameters())


@torch.no_grad()
def test_p43_adapted_models_keep_their_window_too(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen2", **WINDOWED["qwen2"])
    network, inputs = adapted(tmp_path).eval().double(), packed()
    torch.testing.assert_close(network(*inputs)[0, : sum(LENGTHS)], one_by_one(network, inputs[0]))


def test_adapter_parameters_by_hand(tmp_path: Path) -> None:
    saved_model(tmp_path)
    # rank x (inputs + outputs) of every target: q, k, v, o are 16 x 16, the MLP's three 16 x 24
    assert count_parameters(adapted(tmp_path, lora_targets=["q_proj", "v_proj"])) == 2 * 2 * 2 * (16 + 16)
    assert count_parameters(adapted(tmp_path, lora_rank=3)) == 2 * 3 * (4 * (16 + 16) + 3 * (16 + 24))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_are_merged_into_what_is_saved(architecture: str, tmp_path: Path) -> None:
    saved_model(tmp_path / "base", architecture)
    network = adapted(tmp_path / "base", gradient_checkpointing=True)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        logits_of(network).square().mean().backward()
        optimizer.step()
    told = {"_target_": TARGET, "path": str(tmp_path / "base"), "lora_rank": 2}
    sha256 = save_network(tmp_path / "student", network, describe(told, **FACTS))
    expected = logits_of(network.eval()).detach()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert float((expected - base(IDS).logits.detach()).abs().max()) > 1e-3
    plain, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    torch.testing.assert_close(plain.eval()(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    architecture_file = read_architecture(tmp_path / "student")
    assert "lora_rank" not in architecture_file["network"]
    assert weights_sha256(rebuild(at_home(architecture_file, tmp_path / "student"))) == sha256
    assert any("lora_" in name for name, _ in network.named_parameters())  # what is in memory stays as it was


def test_bad_adapters_are_named(tmp_path: Path) -> None:
    saved_model(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.lora_rank is 0"):
        adapted(tmp_path, lora_rank=0)
    with pytest.raises(ConfigError, match=r"model\.lora_targets is \['nothing'\]"):
        adapted(tmp_path, lora_targets=["nothing"])


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'research-distillation\[lora\]'"):
        PretrainedLanguageModel(str(tmp_path), **FACTS, lora_rank=2)
