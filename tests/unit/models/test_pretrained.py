"""Networks that this project did not train: Hugging Face folders against the direct call of the library."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import research
from research.errors import CheckpointError
from research.models.flops import flops_per_row
from research.models.pretrained import PREPROCESSOR_FILE, HuggingFaceClassifier

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS = {"input_shape": (784,), "num_classes": 10}


def vit_config(**changes: Any) -> transformers.ViTConfig:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.ViTConfig(**{**small, "image_size": 28, "patch_size": 14, "num_channels": 1, **changes})


def saved_vit(folder: Path, num_labels: int = 10, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(vit_config(num_labels=num_labels, **changes)).eval()
    model.save_pretrained(folder)
    return model


def saved_res_net(folder: Path) -> Any:
    torch.manual_seed(1)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=10
    )
    model = transformers.ResNetForImageClassification(config).eval()
    model.save_pretrained(folder)
    return model


def test_logits_are_those_of_the_direct_call(tmp_path: Path) -> None:
    inputs = torch.rand(5, 784)
    vit, res_net = saved_vit(tmp_path / "vit"), saved_res_net(tmp_path / "resnet")
    ours = HuggingFaceClassifier(tmp_path / "vit", **FACTS).eval()
    assert torch.equal(ours(inputs), vit(pixel_values=inputs.reshape(5, 1, 28, 28)).logits)
    ours = HuggingFaceClassifier(tmp_path / "resnet", **FACTS).eval()
    three = inputs.reshape(5, 1, 28, 28).repeat(1, 3, 1, 1)
    assert torch.equal(ours(inputs), res_net(pixel_values=three).logits)
    assert flops_per_row(ours, (784,), backward=False) > 0


def test_half_precision_weights_run_in_float32(tmp_path: Path) -> None:
    saved_vit(tmp_path).half().save_pretrained(tmp_path)
    logits_NV = HuggingFaceClassifier(tmp_path, **FACTS).eval()(torch.rand(2, 784))
    assert logits_NV.dtype == torch.float32 and bool(logits_NV.isfinite().all())


def test_the_folder_s_own_normalisation_is_applied(tmp_path: Path) -> None:
    model, inputs = saved_vit(tmp_path), torch.rand(5, 784)
    options = {"do_normalize": True, "image_mean": [0.13], "image_std": [0.31], "do_rescale": True}
    (tmp_path / PREPROCESSOR_FILE).write_text(json.dumps({**options, "rescale_factor": 1 / 127.5}))
    pixels = (255 * inputs / 127.5 - 0.13) / 0.31
    expected = model(pixel_values=pixels.reshape(5, 1, 28, 28)).logits
    torch.testing.assert_close(HuggingFaceClassifier(tmp_path, **FACTS).eval()(inputs), expected)
    (tmp_path / PREPROCESSOR_FILE).write_text(json.dumps({**options, "image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(CheckpointError, match=r"of 3 channels, the model of 1"):
        HuggingFaceClassifier(tmp_path, **FACTS)
    (tmp_path / PREPROCESSOR_FILE).write_text('{"do_normalize": true}')
    with pytest.raises(CheckpointError, match=f"{PREPROCESSOR_FILE} is damaged.*image_mean"):
        HuggingFaceClassifier(tmp_path, **FACTS)


def test_p28_a_folder_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    transformers.ViTModel(vit_config(num_labels=10)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 2 of its tensors \(classifier.bias, classifier.weight\)"):
        HuggingFaceClassifier(tmp_path, **FACTS)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    saved_vit(tmp_path)
    before = torch.get_rng_state()
    HuggingFaceClassifier(tmp_path, **FACTS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        ({"num_labels": 7}, FACTS, "predicts 7 classes, the data have 10"),
        ({"image_size": 42}, FACTS, r"images of \(42, 42\), the data have \(28, 28\)"),
        ({"image_size": [28, 42]}, FACTS, r"images of \(28, 42\)"),
        ({}, {"input_shape": (3, 28, 28), "num_classes": 10}, "expects 1 channels, the data have 3"),
    ],
)
def test_a_model_for_other_data_is_refused(tmp_path: Path, changes: dict, facts: dict, message: str) -> None:
    saved_vit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceClassifier(tmp_path, **facts)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an image classifier"):
        HuggingFaceClassifier(tmp_path, **FACTS)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="not an image classifier"):
        HuggingFaceClassifier(tmp_path, **FACTS)


def test_p89_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = saved_vit(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        HuggingFaceClassifier(tmp_path, **FACTS)


def test_p117_a_folder_s_own_code_is_not_run(tmp_path: Path) -> None:
    """The folder asks for code of its own by `auto_map`; that code would leave a file."""
    saved_vit(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForImageClassification": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(CheckpointError, match="not an image classifier"):
        HuggingFaceClassifier(tmp_path, **FACTS)
    assert not (tmp_path / "ran").exists()


def test_p117_nothing_turns_remote_code_on() -> None:
    """Every call that names trust_remote_code gives the constant False; every from_pretrained names it."""
    package = Path(research.__file__).parent
    named = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            loads = isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
            if loads or "trust_remote_code" in given:
                value = given.get("trust_remote_code")
                assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{node.lineno}"
                named += 1
    assert named >= 1
    folder = package.parent / "conf"
    assert not [path for path in folder.rglob("*.yaml") if "trust_remote_code" in path.read_text()]
