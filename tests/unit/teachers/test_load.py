"""Networks from wherever they were left, and what is refused on the way."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from research.errors import CheckpointError, ConfigError
from research.models.build import build_network, describe
from research.models.weights import save_network, weights_sha256
from research.records import ClassBatch
from research.teachers.frozen import FrozenTeacher, LoadedNetwork
from research.teachers.load import ensemble, frozen, load_network

MLP = {"_target_": "research.models.classifiers.Mlp", "hidden": [5]}
FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(MLP, **FACTS)


@pytest.fixture
def run(tmp_path: Path, network: nn.Module) -> Path:
    """A run folder as `distill train` leaves it."""
    save_network(tmp_path / "run" / "student", network, describe(MLP, **FACTS))
    (tmp_path / "run" / "run.json").write_text('{"ledger": {"student_update": {"flops": 123.0}}}')
    return tmp_path / "run"


def save_checkpoint(path: Path, network: nn.Module, **changes: Any) -> Path:
    """The parts of a Lightning checkpoint that a teacher is read from."""
    state = {f"student.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "architecture": json.dumps(describe(MLP, **FACTS)), **changes}, path)
    return path


def test_every_way_leads_to_the_same_weights(run: Path, network: nn.Module, tmp_path: Path) -> None:
    paths = (run, run / "student", str(run), save_checkpoint(tmp_path / "a.ckpt", network))
    for path, flops in zip(paths, (123.0, 123.0, 123.0, None), strict=True):
        loaded = load_network(path, **FACTS)
        assert weights_sha256(loaded.network) == weights_sha256(network)
        assert (loaded.input_shape, loaded.num_classes, loaded.training_flops) == ((64,), 10, flops)


def test_a_run_is_loaded_without_drawing_random_numbers(run: Path) -> None:
    before = torch.get_rng_state()
    load_network(run, **FACTS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"ledger": {"student_update": 3}}'])
def test_a_record_that_says_nothing_costs_nothing_but_the_number(run: Path, record: str) -> None:
    (run / "run.json").write_text(record)
    assert load_network(run, **FACTS).training_flops is None


def test_p122_training_costs_what_was_sampled_and_scored_for_it_too(run: Path, network: nn.Module) -> None:
    update, rollout = {"flops": 100.0, "tokens": 10.0, "seconds": 4.0}, {"flops": 20.0, "tokens": 3.0, "seconds": None}
    training = {"flops": 9e9, "tokens": None, "seconds": None}  # of its own teacher: charged where that one teaches
    ledger = {"student_update": update, "rollout": rollout, "teacher_training": training}
    (run / "run.json").write_text(json.dumps({"ledger": ledger}))
    teacher = FrozenTeacher(load_network(run, **FACTS))
    identity = teacher.identity
    assert (identity.training_flops, identity.training_tokens, identity.training_seconds) == (120.0, 13.0, None)
    both = ensemble([str(run)] * 2, **FACTS).identity
    assert (both.training_flops, both.training_tokens, both.training_seconds) == (240.0, 26.0, None)


def test_what_is_not_there_is_named(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file or folder .*nowhere"):
        load_network(tmp_path / "nowhere", **FACTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no network: expected student/architecture\.json"):
        load_network(tmp_path / "empty", **FACTS)
    with pytest.raises(ConfigError, match=r"teacher\.path is not set"):
        frozen("", **FACTS)
    with pytest.raises(ConfigError, match=r"teacher\.paths is empty"):
        ensemble([], **FACTS)


def test_a_network_for_other_data_is_refused(run: Path, tmp_path: Path, network: nn.Module) -> None:
    for path in (run, save_checkpoint(tmp_path / "a.ckpt", network)):
        with pytest.raises(CheckpointError, match="predicts 10 classes, the data have 7"):
            load_network(path, input_shape=(64,), num_classes=7)
        with pytest.raises(CheckpointError, match=r"takes inputs of shape \(64,\), the data have \(784,\)"):
            load_network(path, input_shape=(784,), num_classes=10)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04" + bytes(100), b"\x80\x02." + bytes(10), None],
    ids=["empty", "text", "broken_zip", "broken_pickle", "truncated"],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, network: nn.Module, content: bytes | None) -> None:
    path = save_checkpoint(tmp_path / "a.ckpt", network)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.ckpt"):
        load_network(path, **FACTS)


@pytest.mark.parametrize("stored", [{}, [1, 2], torch.zeros(2), {"state_dict": {}}, {"architecture": "{}"}, 3, "text"])
def test_a_checkpoint_of_something_else_is_named(tmp_path: Path, stored: Any) -> None:
    torch.save(stored, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.ckpt"):
        load_network(tmp_path / "a.ckpt", **FACTS)


def test_a_checkpoint_with_a_damaged_architecture_is_refused(tmp_path: Path, network: nn.Module) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        load_network(save_checkpoint(tmp_path / "a.ckpt", network, architecture="{"), **FACTS)
    for architecture in ("[]", "{}", "3"):
        with pytest.raises(ConfigError, match="architecture is damaged"):
            load_network(save_checkpoint(tmp_path / "a.ckpt", network, architecture=architecture), **FACTS)


def test_p89_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, network: nn.Module) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    path = save_checkpoint(tmp_path / "a.ckpt", network, extra=Attack())
    with pytest.raises(CheckpointError, match="cannot read"):
        load_network(path, **FACTS)
    assert not (tmp_path / "ran").exists()


def test_p115_a_run_folder_names_no_class_of_its_own(run: Path) -> None:
    path = run / "student" / "architecture.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "network": {"_target_": "os.system", "command": "true"}}))
    with pytest.raises(ConfigError, match=r"_target_ is 'os\.system'"):
        load_network(run, **FACTS)


def test_another_architecture_in_a_checkpoint_is_refused_by_name(tmp_path: Path, network: nn.Module) -> None:
    other = {**MLP, "hidden": [6]}
    path = save_checkpoint(tmp_path / "a.ckpt", network, architecture=json.dumps(describe(other, **FACTS)))
    with pytest.raises(CheckpointError, match=r"body\.1\.weight: file has \(5, 64\), network needs \(6, 64\)"):
        load_network(path, **FACTS)


def test_p28_a_frozen_teacher_is_frozen(network: nn.Module) -> None:
    network.train()
    before = weights_sha256(network)
    teacher = FrozenTeacher(LoadedNetwork(network, (64,), 10, "here", training_flops=5.0))
    assert teacher.identity.sha256 == before and teacher.identity.source == "here"
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    inputs = torch.rand(3, 64, requires_grad=True)
    signal = teacher.signal(ClassBatch(inputs, torch.arange(3), torch.arange(3), 3))
    assert not signal.logits_NV.requires_grad
    assert teacher.summary() == {"parameters": 64 * 5 + 5 + 5 * 10 + 10}


def test_p28_a_teacher_of_zeros_is_refused(tmp_path: Path, network: nn.Module) -> None:
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(CheckpointError, match="here holds only zeros"):
        FrozenTeacher(LoadedNetwork(network, (64,), 10, "here"))
    path = save_checkpoint(tmp_path / "a.ckpt", network)
    with pytest.raises(CheckpointError, match=r"a\.ckpt holds only zeros"):
        frozen(str(path), **FACTS)


def test_an_ensemble_reads_its_members_by_path(run: Path, tmp_path: Path, network: nn.Module) -> None:
    other = partial(save_checkpoint, tmp_path / "b.ckpt")
    nn.init.ones_(network.head.bias)
    teacher = ensemble([str(run), str(other(network))], mean="geometric", temperature=2.0, **FACTS)
    assert teacher.identity.source == f"{run / 'student'}, {tmp_path / 'b.ckpt'}"
    assert teacher.identity.details == {"mean": "geometric", "temperature": 2.0, "members": 2}
    assert teacher.identity.training_flops is None  # a checkpoint does not say
