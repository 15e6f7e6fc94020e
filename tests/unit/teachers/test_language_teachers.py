"""Language models as teachers: the same tokens or a refusal, and a signal for every place of a token batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import nn

from research.errors import CheckpointError, ConfigError
from research.losses.projection import project
from research.losses.soft_target import soft_target
from research.models.build import build_network, describe
from research.models.weights import save_network, save_tokenizer, weights_sha256
from research.records import HiddenProjection, TokenBatch
from research.teachers.frozen import FrozenTeacher
from research.teachers.load import cached, ensemble, frozen, load_network
from research.text.tokenizer import build_tokenizer, tokenizer_sha256

LANGUAGE = {
    "_target_": "research.models.language.LanguageModel",
    "architecture": "llama",
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "initializer_range": 0.5,
}
TOKENIZER = build_tokenizer("characters", alphabet="0123456789+=;")
OTHER_TOKENIZER = build_tokenizer("characters", alphabet="abcdefghij+=;")
FACTS: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
    "tokenizer_sha256": tokenizer_sha256(TOKENIZER),
}
CLASS_FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(LANGUAGE, **FACTS)


@pytest.fixture
def run(tmp_path: Path, network: nn.Module) -> Path:
    """A run folder as `distill train` leaves it."""
    save_network(tmp_path / "run" / "student", network, describe(LANGUAGE, **FACTS))
    (tmp_path / "run" / "run.json").write_text('{"ledger": {"student_update": {"flops": 7.0}}}')
    return tmp_path / "run"


def hub_folder(folder: Path, tokenizer: Any = TOKENIZER, vocab_size: int = len(TOKENIZER)) -> Any:
    """A folder as anybody's `save_pretrained` leaves it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=vocab_size, initializer_range=0.5, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


def token_batch(rows: int = 2, length: int = 6) -> TokenBatch:
    """Rows of one document each; the second ends before its row does."""
    ids_BT = torch.randint(2, len(TOKENIZER), (rows, length), generator=torch.Generator().manual_seed(0))
    segment_BT = torch.ones(rows, length, dtype=torch.int64)
    segment_BT[1:, length - 2 :] = 0
    flags_BT = segment_BT.bool()
    return TokenBatch(
        ids_BT=ids_BT,
        label_BT=ids_BT,
        weight_BT=flags_BT.float(),
        completion_BT=flags_BT,
        position_BT=torch.arange(length).expand(rows, length) * segment_BT,
        segment_BT=segment_BT,
        index_D=torch.arange(rows),
        step_weight=float(flags_BT.sum()),
        step_completion_tokens=int(flags_BT.sum()),
        step_rows=rows,
    )


def checkpoint(path: Path, network: nn.Module, **changes: Any) -> Path:
    state = {f"student.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "architecture": json.dumps(describe(LANGUAGE, **{**FACTS, **changes}))}, path)
    return path


def test_every_way_leads_to_the_same_weights(run: Path, network: nn.Module, tmp_path: Path) -> None:
    paths = (run, run / "student", checkpoint(tmp_path / "a.ckpt", network))
    for path, flops in zip(paths, (7.0, 7.0, None), strict=True):
        loaded = load_network(path, **FACTS)
        assert weights_sha256(loaded.network) == weights_sha256(network)
        assert (loaded.input_shape, loaded.num_classes, loaded.training_flops) == (None, len(TOKENIZER), flops)


def test_the_signal_is_the_network_s_own_logits(run: Path, network: nn.Module) -> None:
    teacher, batch = frozen(str(run), **FACTS), token_batch()
    signal = teacher.signal(batch)
    assert torch.equal(signal.logits_NV, network.eval()(*batch.network_inputs()))
    assert signal.logits_NV.shape == (2, 6, len(TOKENIZER)) and not signal.logits_NV.requires_grad
    assert signal.num_classes == teacher.num_classes == len(TOKENIZER)


def test_the_signal_is_float32_whatever_the_student_trains_in(run: Path) -> None:
    teacher, batch = frozen(str(run), **FACTS), token_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher.signal(batch).logits_NV
    assert inside.dtype == torch.float32 and torch.equal(inside, teacher.signal(batch).logits_NV)


def test_flops_are_those_of_the_batch(run: Path) -> None:
    teacher = frozen(str(run), **FACTS)
    layer = 4 * 16 * 16 + 3 * 16 * 48  # a gated MLP of 8/3 x 16, rounded up to a multiple of 8
    for rows, length in ((2, 6), (3, 6), (4, 9)):
        products = length * (2 * layer + 16 * len(TOKENIZER)) + 2 * 2 * length * length * 16
        assert teacher.flops_of(token_batch(rows, length)) == rows * 2 * products
    with pytest.raises(TypeError, match="flops_of"):
        teacher.flops_per_row()


def test_an_ensemble_of_language_models(run: Path, network: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        network.model.lm_head.weight.mul_(-1)
    other = checkpoint(tmp_path / "b.ckpt", network)
    batch = token_batch()
    members = [frozen(str(path), **FACTS) for path in (run, other)]
    probs = [member.signal(batch).logits_NV.softmax(-1) for member in members]
    for streamed in (True, False):
        teacher = ensemble([str(run), str(other)], streamed=streamed, **FACTS)
        torch.testing.assert_close(teacher.signal(batch).logits_NV.exp(), (probs[0] + probs[1]) / 2)
        assert teacher.flops_of(batch) == 2 * members[0].flops_of(batch)
        with pytest.raises(TypeError, match="flops_of"):
            teacher.flops_per_row()


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_p18_the_same_number_of_tokens_with_other_meanings_is_refused(run: Path, network: nn.Module) -> None:
    other = {**FACTS, "tokenizer_sha256": tokenizer_sha256(OTHER_TOKENIZER)}
    assert len(OTHER_TOKENIZER) == len(TOKENIZER)
    for path in (run, checkpoint(run / "a.ckpt", network)):
        with pytest.raises(CheckpointError, match="was made for another tokenizer"):
            load_network(path, **other)
        load_network(path, **{**FACTS, "tokenizer_sha256": None})
    with pytest.raises(CheckpointError, match=r"predicts 16 tokens, the data's tokenizer has 17"):
        load_network(run, **{**FACTS, "vocab_size": len(TOKENIZER) + 1})


def test_p18_a_hugging_face_teacher_is_cut_to_the_tokenizer(tmp_path: Path) -> None:
    model = hub_folder(tmp_path, vocab_size=len(TOKENIZER) + 8)
    batch = token_batch()
    signal = frozen(str(tmp_path), **FACTS).signal(batch)
    expected = model(batch.ids_BT[:1]).logits[..., : len(TOKENIZER)].detach()
    torch.testing.assert_close(signal.logits_NV[:1], expected)
    assert signal.num_classes == len(TOKENIZER)


def test_p18_a_hugging_face_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    hub_folder(tmp_path / "other", OTHER_TOKENIZER)
    with pytest.raises(CheckpointError, match=r"was made for another tokenizer.*stand for other text"):
        frozen(str(tmp_path / "other"), **FACTS)
    hub_folder(tmp_path / "bare", None)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer .*save the teacher's tokenizer into the folder"):
        frozen(str(tmp_path / "bare"), **FACTS)
    assert frozen(str(tmp_path / "bare"), **{**FACTS, "tokenizer_sha256": None}).num_classes == len(TOKENIZER)


def test_a_student_s_own_folder_without_its_architecture_is_a_hugging_face_folder(
    run: Path, network: nn.Module
) -> None:
    save_tokenizer(run / "student", TOKENIZER)
    (run / "student" / "architecture.json").unlink()
    teacher, batch = frozen(str(run / "student"), **FACTS), token_batch()
    assert teacher.identity.sha256 == weights_sha256(network)
    torch.testing.assert_close(teacher.signal(batch).logits_NV, network.eval()(*batch.network_inputs()).detach())


def test_a_bf16_teacher_gives_float32_logits(tmp_path: Path) -> None:
    hub_folder(tmp_path)
    teacher, batch = frozen(str(tmp_path), dtype="bfloat16", **FACTS), token_batch()
    logits_BTV = teacher.signal(batch).logits_NV
    assert logits_BTV.dtype == torch.float32
    expected = frozen(str(tmp_path), **FACTS).signal(batch).logits_NV
    assert not torch.equal(logits_BTV, expected)
    torch.testing.assert_close(logits_BTV, expected, atol=0.1, rtol=0.1)


# -- hidden states and precision -------------------------------------------------------------------------------------


def test_hidden_states_say_what_the_logits_say(run: Path, network: nn.Module) -> None:
    dense, hidden = (frozen(str(run), signal=kind, **FACTS) for kind in ("dense", "hidden"))
    assert dense.identity == hidden.identity and dense.num_classes == hidden.num_classes == len(TOKENIZER)
    batch = token_batch()
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        signal = hidden.signal(batch)
    assert isinstance(signal, HiddenProjection) and signal.num_classes == len(TOKENIZER)
    assert signal.hidden_ND.shape == (2, 6, 16) and signal.hidden_ND.dtype == torch.float32
    assert not signal.hidden_ND.requires_grad and not signal.weight_VD.requires_grad
    torch.testing.assert_close(project(signal), dense.signal(batch).logits_NV)
    assert hidden.flops_of(batch) == dense.flops_of(batch)
    student = torch.randn(2, 6, len(TOKENIZER), generator=torch.Generator().manual_seed(3))
    losses = [
        soft_target(student, teacher.signal(batch), loss_mask_N=batch.completion_BT) for teacher in (dense, hidden)
    ]
    torch.testing.assert_close(losses[0].total, losses[1].total)
    assert torch.equal(losses[0].count, losses[1].count)


def test_hidden_states_of_a_classifier_are_refused(tmp_path: Path) -> None:
    mlp = {"_target_": "research.models.classifiers.Mlp", "hidden": [5]}
    save_network(tmp_path / "mlp", build_network(mlp, **CLASS_FACTS), describe(mlp, **CLASS_FACTS))
    with pytest.raises(ConfigError, match=r"teacher\.signal is hidden, and .* is a Mlp"):
        frozen(str(tmp_path / "mlp"), signal="hidden", **CLASS_FACTS)
    with pytest.raises(ConfigError, match=r"teacher\.signal is 'states'; expected dense or hidden"):
        frozen(str(tmp_path / "mlp"), signal="states", **CLASS_FACTS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"teacher\.dtype is bfloat16, and a classifier runs in float32"):
        frozen(str(tmp_path / "mlp"), dtype="bfloat16", **CLASS_FACTS)


def test_a_run_is_rounded_where_a_half_precision_is_asked_for(run: Path, network: nn.Module) -> None:
    """The weights that teach are those hashed; buffers of the rotary positions keep their precision."""
    plain, half = load_network(run, **FACTS), load_network(run, dtype="bfloat16", **FACTS)
    for parameter, rounded in zip(network.parameters(), half.network.parameters(), strict=True):
        assert rounded.dtype == torch.bfloat16 and torch.equal(parameter.bfloat16(), rounded)
    assert all(buffer.dtype == torch.float32 for buffer in half.network.buffers())
    teachers = FrozenTeacher(plain), FrozenTeacher(half)
    assert teachers[0].identity.sha256 != teachers[1].identity.sha256
    logits = [teacher.signal(token_batch()).logits_NV for teacher in teachers]
    assert logits[1].dtype == torch.float32 and not torch.equal(*logits)
    torch.testing.assert_close(logits[1], logits[0], atol=0.1, rtol=0.1)
    for dtype in ("float32", "auto"):
        assert weights_sha256(load_network(run, dtype=dtype, **FACTS).network) == weights_sha256(network)
    with pytest.raises(ConfigError, match=r"teacher\.dtype is 'half'; expected one of float32, bfloat16"):
        load_network(run, dtype="half", **FACTS)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_network_for_the_other_kind_of_data_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a language model, the data are classes"):
        load_network(run, **CLASS_FACTS)
    mlp = {"_target_": "research.models.classifiers.Mlp", "hidden": [5]}
    save_network(tmp_path / "mlp", build_network(mlp, **CLASS_FACTS), describe(mlp, **CLASS_FACTS))
    with pytest.raises(CheckpointError, match="is a classifier, the data are text"):
        load_network(tmp_path / "mlp", **FACTS)
    with pytest.raises(ConfigError, match="these data are text; choose teacher=frozen"):
        cached(str(run), **FACTS)


def test_p28_a_language_teacher_of_zeros_is_refused(run: Path, network: nn.Module) -> None:
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(CheckpointError, match=r"a\.ckpt holds only zeros"):
        frozen(str(checkpoint(run / "a.ckpt", network)), **FACTS)
    save_network(run / "zero", network, describe(LANGUAGE, **FACTS))
    with pytest.raises(CheckpointError, match="holds only zeros"):
        frozen(str(run / "zero"), **FACTS)


def test_p28_a_language_teacher_is_frozen(run: Path) -> None:
    loaded = load_network(run, **FACTS)
    teacher = FrozenTeacher(loaded)
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())
    assert teacher.identity.sha256 == weights_sha256(loaded.network) and teacher.identity.training_flops == 7.0


def test_a_pretrained_student_s_run_is_a_teacher(tmp_path: Path) -> None:
    hub_folder(tmp_path / "base")
    told = {
        "_target_": "research.models.pretrained_language.PretrainedLanguageModel",
        "path": str(tmp_path / "base"),
    }
    student = build_network(told, **FACTS)
    with torch.no_grad():
        student.model.lm_head.weight.mul_(1.5)
    sha256 = save_network(tmp_path / "run" / "student", student, describe(told, **FACTS))
    teacher = frozen(str(tmp_path / "run"), **FACTS)
    assert teacher.identity.sha256 == sha256
    path = tmp_path / "run" / "student" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x11
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not hash to"):
        frozen(str(tmp_path / "run"), **FACTS)


def test_a_teacher_of_the_hub_is_read_from_its_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as the hub's own library lays it out; the hub itself is not asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--nobody--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    tokenizer = build_tokenizer("characters", alphabet="abc")
    tokenizer.save_pretrained(snapshot)
    facts: dict[str, Any] = {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(snapshot)
    loaded = load_network("nobody/tiny", **facts)
    ids = torch.arange(3)[None]
    logits = loaded.network.eval()(ids, torch.arange(3)[None], torch.ones_like(ids))
    assert torch.equal(logits, model(ids).logits) and loaded.source == "nobody/tiny"
    with pytest.raises(CheckpointError, match="no file or folder nobody/else"):
        load_network("nobody/else", **facts)
