"""A language model on disk: plain transformers loads it, and so does this package, to the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from research.errors import CheckpointError
from research.models import language
from research.models.build import build_network, describe, rebuild
from research.models.language import LanguageModel
from research.models.weights import (
    ARCHITECTURE_FILE,
    SHARDS_FILE,
    WEIGHTS_FILE,
    load_weights,
    read_architecture,
    save_network,
    save_tokenizer,
    weights_sha256,
    write_model_card,
)
from research.text.tokenizer import build_tokenizer, tokenizer_sha256

TARGET = "research.models.language.LanguageModel"
SMALL = {"_target_": TARGET, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "initializer_range": 0.5}
FACTS: dict[str, Any] = {"vocab_size": 23, "eos_token_id": [1, 4], "pad_token_id": 0, "tokenizer_sha256": "f00"}
IDS = torch.tensor([[3, 9, 22, 0, 5, 1]])
ARCHITECTURES = ("llama", "qwen3", "gpt2")


def description(architecture: str, **changes: Any) -> dict[str, Any]:
    return {**SMALL, "architecture": architecture, **changes}


def network(description: dict[str, Any], **facts: Any) -> LanguageModel:
    torch.manual_seed(0)
    return build_network(description, **{**FACTS, **facts}).eval()


def logits_of(network: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return network(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_loads_the_folder_to_equal_logits(architecture: str, tied: bool, tmp_path: Path) -> None:
    told = description(architecture, tie_embeddings=tied)
    saved = network(told)
    sha256 = save_network(tmp_path, saved, describe(told, **FACTS))
    assert sha256 == weights_sha256(saved) == read_architecture(tmp_path)["sha256"]
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(plain.eval()(IDS).logits, logits_of(saved))
    assert plain.generation_config.eos_token_id == [1, 4] and plain.generation_config.pad_token_id == 0
    assert plain.config.tie_word_embeddings == tied
    assert plain.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] <= 8


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_folder_rebuilds_to_the_same_weights(architecture: str, tied: bool, tmp_path: Path) -> None:
    told = description(architecture, tie_embeddings=tied)
    saved = network(told)
    save_network(tmp_path, saved, describe(told, **FACTS))
    architecture_file = read_architecture(tmp_path)
    assert architecture_file == {"network": told, **FACTS, "sha256": weights_sha256(saved)}
    loaded = rebuild(architecture_file).eval()
    assert weights_sha256(loaded) != weights_sha256(saved)
    load_weights(loaded, tmp_path, architecture_file["sha256"])
    assert weights_sha256(loaded) == weights_sha256(saved)
    assert torch.equal(logits_of(loaded), logits_of(saved))
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert set(stored) == set(saved.stored_names().values()) and ("lm_head.weight" in stored) != tied


def test_training_a_loaded_tied_model_keeps_it_tied(tmp_path: Path) -> None:
    told = description("llama", tie_embeddings=True)
    save_network(tmp_path, network(told), describe(told, **FACTS))
    loaded = rebuild(read_architecture(tmp_path))
    load_weights(loaded, tmp_path, None)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_half_precision_halves_the_file_and_names_what_it_loads_back(architecture: str, tmp_path: Path) -> None:
    told = description(architecture, hidden_size=64)
    saved = network(told)
    before = weights_sha256(saved)
    save_network(tmp_path / "full", saved, describe(told, **FACTS))
    sha256 = save_network(tmp_path / "half", saved, describe(told, **FACTS), half=True)
    assert weights_sha256(saved) == before and sha256 != before
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("full", "half")]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    loaded = rebuild(read_architecture(tmp_path / "half"))
    load_weights(loaded, tmp_path / "half", sha256)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, saved.state_dict()[name].half().float())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    assert torch.equal(plain(IDS).logits, logits_of(loaded.eval()))


def test_saving_again_leaves_nothing_of_what_was_there(tmp_path: Path) -> None:
    told = description("llama")
    save_network(tmp_path, network(told), describe(told, **FACTS))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"old")
    other = {**told, "num_layers": 1}
    save_network(tmp_path, network(other), describe(other, **FACTS))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [WEIGHTS_FILE]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 1


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tied Llama of 30 KB whose folder was written where several files begin at 5 KB; one file was there before."""
    told = description("llama", tie_embeddings=True)
    assert language.SHARD_SIZE == "5GB"
    save_network(tmp_path, network(description("llama")), describe(told, **FACTS))
    assert not (tmp_path / SHARDS_FILE).exists(), "below 5 GB it is one file"
    monkeypatch.setattr(language, "SHARD_SIZE", "5KB")
    save_network(tmp_path, network(told), describe(told, **FACTS))
    return tmp_path


def test_a_large_model_leaves_in_several_files_and_comes_back(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 2 and WEIGHTS_FILE not in files and (sharded / SHARDS_FILE).exists()
    saved, told = network(description("llama", tie_embeddings=True)), read_architecture(sharded)
    loaded = rebuild(told)
    load_weights(loaded, sharded, told["sha256"])
    assert weights_sha256(loaded) == weights_sha256(saved) == told["sha256"]
    plain, report = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not report["missing_keys"] and torch.equal(plain.eval()(IDS).logits, logits_of(saved))
    save_network(sharded, saved, told)
    assert len([*sharded.glob("*.safetensors")]) == len(files), "written again, nothing of before is left"


def test_p28_several_files_of_which_one_is_damaged_or_missing_are_refused(sharded: Path) -> None:
    told, path = read_architecture(sharded), sorted(sharded.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(bytes([*content[:-3], content[-3] ^ 0x11, *content[-2:]]))
    with pytest.raises(CheckpointError, match="do not hash to"):
        load_weights(rebuild(told), sharded, told["sha256"])
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read the weights .*{path.name}"):
        load_weights(rebuild(told), sharded, told["sha256"])
    for damaged in ("{", "[]", '{"weight_map": []}', "{}"):
        (sharded / SHARDS_FILE).write_text(damaged)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
            load_weights(rebuild(told), sharded, told["sha256"])


def test_p28_damaged_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    told = description("llama")
    sha256 = save_network(tmp_path, network(told), describe(told, **FACTS))
    with pytest.raises(CheckpointError, match=r"layers\.1\..*network needs nothing"):
        load_weights(network({**told, "num_layers": 1}), tmp_path, None)
    with pytest.raises(CheckpointError, match=r"another architecture.*q_norm.*file has nothing"):
        load_weights(network(description("qwen3")), tmp_path, None)
    path = tmp_path / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x11
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not hash to"):
        load_weights(network(told), tmp_path, sha256)


def test_the_folder_names_no_place_of_this_machine(tmp_path: Path) -> None:
    told = description("llama")
    save_network(tmp_path, network(told), describe(told, **FACTS))
    for path in tmp_path.glob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_a_student_leaves_with_its_tokenizer_and_its_record(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("characters", alphabet="0123456789+=;")
    facts = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }
    told = description("llama")
    saved = network(told, **facts)
    folder = tmp_path / "run" / "student"
    save_network(folder, saved, describe(told, **facts))
    save_tokenizer(folder, tokenizer)
    record = {"experiment": "sum5", "seed": 3, "metrics": {"test/pass_at_1": 0.87654321}, "student": {"sha256": "ab"}}
    write_model_card(folder, record)
    read = AutoTokenizer.from_pretrained(folder)
    ids = read("12+30=", return_tensors="pt", add_special_tokens=False).input_ids
    assert read.decode(ids[0]) == "12+30=" and tokenizer_sha256(read) == facts["tokenizer_sha256"]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(plain(ids).logits, logits_of(saved, ids))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# sum5" in card
    assert "| test/pass_at_1 | 0.876543 |" in card and "* seed: `3`" in card
    assert str(tmp_path) not in card
    expected = {ARCHITECTURE_FILE, WEIGHTS_FILE, "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert expected <= {path.name for path in folder.iterdir()}


def test_a_card_of_a_record_that_says_little(tmp_path: Path) -> None:
    folder = tmp_path / "some_run" / "student"
    folder.mkdir(parents=True)
    write_model_card(folder, {"metrics": None, "seed": 0})
    card = (folder / "README.md").read_text()
    assert "# some_run" in card and "## Metrics" not in card and "* seed: `0`" in card


def test_the_architecture_of_text_is_plain(tmp_path: Path) -> None:
    told = description("llama")
    save_network(tmp_path, network(told), describe(told, **FACTS))
    read = json.loads((tmp_path / ARCHITECTURE_FILE).read_text())
    assert list(read) == ["network", "vocab_size", "eos_token_id", "pad_token_id", "tokenizer_sha256", "sha256"]
