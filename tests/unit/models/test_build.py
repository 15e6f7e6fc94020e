"""Descriptions are data, wherever they come from: only networks of the allowed packages are ever made of them."""

import pytest
import torch
from torch import nn

from research.errors import ConfigError
from research.models import build
from research.models.build import allow_prefix, build_network, describe, rebuild
from research.models.classifiers import Mlp

FACTS = {"input_shape": (4,), "num_classes": 3}
MLP = {"_target_": "research.models.classifiers.Mlp", "hidden": [5]}


def test_builds_with_the_data_s_facts() -> None:
    network = build_network(MLP, **FACTS)
    assert isinstance(network, Mlp) and network(torch.zeros(2, 4)).shape == (2, 3)
    torch_s_own = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3}
    assert isinstance(build_network(torch_s_own, **FACTS), nn.Linear)


def test_a_description_survives_storing() -> None:
    architecture = describe(MLP, input_shape=(2, 2), num_classes=3)
    assert architecture == {"network": MLP, "input_shape": [2, 2], "num_classes": 3}
    assert rebuild(architecture)(torch.zeros(1, 2, 2)).shape == (1, 3)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "logging.os.system",
        "research.models.build.locate_target",
        "research.models.build.inspect.os.system",
        "research.models.build.difflib.SequenceMatcher",
        "research.models.weights.hashlib.sha256",
        "research.models.weights.json.loads",
        "research.models.weights.load_weights",
        "research.models.weights.Path",
        "research.models",
        "research.models.nothing.Here",
        "torch.nn.functional.relu",
        "torch.nn.init.torch.hub.load",
        "torch.nn.modules.module.torch.load",
        "torch.nn",
        "torch.nnX.Linear",
        "",
        None,
        7,
        ["torch.nn.Linear"],
    ],
)
def test_p115_targets_that_are_no_network_of_the_allowed_packages_are_refused(target: object) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        build_network({"_target_": target}, **FACTS)
    with pytest.raises(ConfigError, match="_target_"):
        rebuild({"network": {"_target_": target}, "input_shape": [4], "num_classes": 3})


def test_p115_a_refused_target_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple] = []
    monkeypatch.setattr("os.system", lambda *arguments: called.append(arguments))
    for target in ("os.system", "research.models.build.inspect.os.system", "torch.nn.functional.os.system"):
        with pytest.raises(ConfigError):
            build_network({"_target_": target, "command": "true"}, **FACTS)
    assert called == []


def test_p115_a_network_that_an_allowed_module_only_imports_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(nn.Module):
        pass

    monkeypatch.setattr(build, "Foreign", Foreign, raising=False)
    with pytest.raises(ConfigError, match="Foreign"):
        build_network({"_target_": "research.models.build.Foreign"}, **FACTS)


def test_a_prefix_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ALLOWED_PREFIXES", ("research.models.",))
    description = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3}
    with pytest.raises(ConfigError, match="allow_prefix"):
        build_network(description, **FACTS)
    allow_prefix("torch.nn.")
    assert isinstance(build_network(description, **FACTS), nn.Linear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden": [5]}, "unknown key student.hiden for .*Mlp; nearest valid: student.hidden"),
        ({"wolf": 1}, "unknown key student.wolf for .*Mlp. Valid keys: dropout, hidden"),
        ({"hidden": None}, "student.hidden is"),
        ({"hidden": 800}, "student.hidden is 800"),
        ({"hidden": ["a"]}, "student.hidden"),
        ({"dropout": "half"}, "student.dropout is 'half'"),
        ({"num_classes": 10}, "student.num_classes is set by the data, which have 3"),
        ({"input_shape": [4]}, "student.input_shape is set by the data"),
    ],
)
def test_p111_bad_keys_are_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network({**MLP, **change}, **FACTS, key="student")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.hidden is not set"):
        build_network({"_target_": MLP["_target_"]}, **FACTS)


TEXT = {"vocab_size": 23, "eos_token_id": (1, 4), "pad_token_id": 0, "tokenizer_sha256": "f00"}
LANGUAGE = {
    "_target_": "research.models.language.LanguageModel",
    "architecture": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
}


def test_text_has_facts_of_its_own() -> None:
    architecture = describe(LANGUAGE, **TEXT)
    assert architecture == {"network": LANGUAGE, **TEXT, "eos_token_id": [1, 4]}
    network = rebuild(architecture)
    assert network.model.config.vocab_size == 23 and network.model.generation_config.eos_token_id == [1, 4]
    unknown_tokenizer = {name: fact for name, fact in architecture.items() if name != "tokenizer_sha256"}
    assert rebuild(unknown_tokenizer).vocab_size == 23


def test_a_model_for_other_data_is_named() -> None:
    with pytest.raises(ConfigError, match=r"student is a LanguageModel, which is for text and needs vocab_size; these"):
        build_network(LANGUAGE, **FACTS, key="student")
    with pytest.raises(ConfigError, match=r"student is a Mlp, which is for classes and needs input_shape; these data"):
        build_network(MLP, **TEXT, key="student")


@pytest.mark.parametrize("name", ["vocab_size", "eos_token_id", "tokenizer_sha256", "num_classes"])
def test_facts_are_not_for_a_config_to_set(name: str) -> None:
    accepted = {**LANGUAGE, name: 5}
    with pytest.raises(ConfigError, match=rf"model\.{name}"):
        build_network(accepted, **TEXT)


def test_what_is_no_fact_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab: no fact of the data"):
        describe(LANGUAGE, vocab=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="vocab: no fact of the data"):
        build_network(LANGUAGE, **TEXT, vocab=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("missing", ["vocab_size", "eos_token_id", "pad_token_id", "network"])
def test_a_damaged_architecture_of_text_is_refused(missing: str) -> None:
    architecture = describe(LANGUAGE, **TEXT)
    del architecture[missing]
    with pytest.raises(ConfigError, match="architecture is damaged"):
        rebuild(architecture)


@pytest.mark.parametrize(
    "architecture", [{}, {"network": MLP}, {"network": 3, "input_shape": [4], "num_classes": 3}, []]
)
def test_a_damaged_architecture_is_refused(architecture: object) -> None:
    with pytest.raises(ConfigError, match="architecture is damaged"):
        rebuild(architecture)
