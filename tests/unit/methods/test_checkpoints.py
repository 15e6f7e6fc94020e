"""What is in a checkpoint, what is not, and what may be loaded into what."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from research.data.digits import Digits
from research.errors import CheckpointError, ConfigError
from research.methods.soft_target import SoftTarget
from research.methods.supervised import Supervised
from research.models.build import build_network
from research.models.weights import weights_sha256
from research.teachers.load import load_network

pytestmark = pytest.mark.filterwarnings("ignore")


def data(**changes: Any) -> Digits:
    return Digits(**{"batch_size": 8, "num_train": 21, "holdout": 20, "seed": 3, **changes})


@pytest.fixture
def fitted(kit: SimpleNamespace, tmp_path: Path) -> tuple[SoftTarget, L.Trainer, Path]:
    """A soft-target method after two epochs with Adam, and its checkpoint."""
    method = SoftTarget(kit.make_training(**kit.make_adam()), kit.make_teacher(), temperature=4.0, hard_weight=0.5)
    trainer = kit.fit(method, data(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return method, trainer, tmp_path / "a.ckpt"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            assert isinstance(key, str | int)
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_p84_no_trace_of_the_teacher(kit: SimpleNamespace, fitted: tuple[SoftTarget, L.Trainer, Path]) -> None:
    method, trainer, path = fitted
    own = set(kit.make_student().state_dict())
    checkpoint = load(path)
    assert set(checkpoint["state_dict"]) == set(method.state_dict()) == {f"student.{name}" for name in own}
    assert {name for name, _ in method.named_modules() if name and not name.startswith("student")} == set()
    student = {id(parameter) for parameter in method.student.parameters()}
    assert {id(parameter) for parameter in method.parameters()} == student
    assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == student
    (optimizer_state,) = checkpoint["optimizer_states"]
    assert len(optimizer_state["state"]) == len(student)
    alone = Supervised(kit.make_training(**kit.make_adam()))
    kit.fit(alone, data(), max_epochs=2).save_checkpoint(path.with_name("alone.ckpt"))
    assert abs(path.stat().st_size - path.with_name("alone.ckpt").stat().st_size) < 2000


def test_p84_p53_a_fit_leaves_the_teacher_as_it_was(kit: SimpleNamespace) -> None:
    teacher = kit.make_teacher()
    network: nn.Module = teacher._network
    method = SoftTarget(kit.make_training(dropout=0.5), teacher, temperature=4.0)
    kit.fit(method, data(), max_epochs=1)
    assert weights_sha256(network) == teacher.identity.sha256
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    assert method.teacher is teacher


def test_p53_the_student_trains_in_train_mode(kit: SimpleNamespace) -> None:
    class Modes(L.Callback):
        seen: set[tuple[bool, ...]]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen.add(tuple(module.training for module in pl_module.student.modules()))

    callback = Modes()
    callback.seen = set()
    method = SoftTarget(kit.make_training(dropout=0.5), kit.make_teacher(), temperature=4.0)
    kit.fit(method, data(), max_epochs=2, callbacks=[callback])  # validation stands between the epochs
    assert callback.seen == {tuple(True for _ in method.student.modules())}


def test_p85_a_checkpoint_is_plain(fitted: tuple[SoftTarget, L.Trainer, Path]) -> None:
    """It loads with weights_only=True, which refuses every object; and it holds no hyperparameters but plain values."""
    checkpoint = load(fitted[2])
    for leaf in leaves(checkpoint):
        assert leaf is None or isinstance(leaf, Tensor | str | int | float | bool), type(leaf)
    assert "hyper_parameters" not in checkpoint and fitted[0].hparams == {}


def test_a_checkpoint_can_be_loaded_alone(fitted: tuple[SoftTarget, L.Trainer, Path]) -> None:
    method, _, path = fitted
    loaded = load_network(path, input_shape=(64,), num_classes=10)
    assert weights_sha256(loaded.network) == weights_sha256(method.student)


def test_what_was_spent_is_carried_on(kit: SimpleNamespace, fitted: tuple[SoftTarget, L.Trainer, Path]) -> None:
    method, _, path = fitted
    assert method.rows_seen == method.teacher_rows == 2 * 21
    spent = load(path)["spent"]
    assert spent["rows"] == 42 and spent["teacher_rows"] == 42
    assert 0 < spent["teacher_seconds"] < spent["seconds"]
    again = SoftTarget(kit.make_training(**kit.make_adam()), kit.make_teacher(), temperature=4.0, hard_weight=0.5)
    kit.fit(again, data(), max_epochs=3, ckpt_path=path)
    assert again.rows_seen == again.teacher_rows == 3 * 21
    assert again.earlier_seconds == spent["seconds"] and again.teacher_seconds > spent["teacher_seconds"]
    hard = Supervised(kit.make_training(), kit.make_teacher())
    kit.fit(hard, data())
    assert (hard.rows_seen, hard.teacher_rows, hard.teacher_seconds) == (21, 0, 0.0)


def test_another_architecture_is_refused_by_the_names_of_its_tensors(
    kit: SimpleNamespace, fitted: tuple[SoftTarget, L.Trainer, Path]
) -> None:
    wider = build_network({**kit.MLP, "hidden": [13]}, **kit.FACTS)
    method = Supervised(kit.make_training(wider))
    before = kit.flat(wider)
    with pytest.raises(
        CheckpointError, match=r"another architecture .* body\.1\.weight: file has \(12, 64\), network needs \(13, 64\)"
    ):
        kit.fit(method, data(), ckpt_path=fitted[2])
    assert torch.equal(kit.flat(wider), before)


@pytest.mark.parametrize("missing", ["rng", "spent"])
def test_a_checkpoint_of_another_program_is_refused(
    kit: SimpleNamespace, fitted: tuple[SoftTarget, L.Trainer, Path], missing: str
) -> None:
    checkpoint = load(fitted[2])
    del checkpoint[missing]
    torch.save(checkpoint, fitted[2])
    with pytest.raises(CheckpointError, match="was not written by `distill train`"):
        kit.fit(Supervised(kit.make_training()), data(), ckpt_path=fitted[2])


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_precisions_that_cast_the_batch_are_refused(kit: SimpleNamespace, precision: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.precision is '{precision}'; expected one of 32-true, bf16-mixed"):
        kit.fit(Supervised(kit.make_training()), data(), precision=precision)


# -- compiled students ------------------------------------------------------------------------------------------------


def plain(kit: SimpleNamespace) -> SoftTarget:
    training = kit.make_training(optimizer=partial(torch.optim.Adam, lr=0.01))
    return SoftTarget(training, kit.make_teacher(), temperature=4.0)


def compiled(kit: SimpleNamespace, backend: Any = "eager") -> SoftTarget:
    """As `compile: true` does it: in place, so that nothing is wrapped."""
    method = plain(kit)
    method.student.compile(backend=backend)
    return method


def test_p88_a_compiled_run_has_the_same_keys_and_loads_both_ways(kit: SimpleNamespace, tmp_path: Path) -> None:
    methods, paths = {"on": compiled(kit), "off": plain(kit)}, {}
    for name, method in methods.items():
        trainer = kit.fit(method, data(), max_epochs=1, log_every_n_steps=1)
        paths[name] = tmp_path / f"{name}.ckpt"
        trainer.save_checkpoint(paths[name])
    keys = {name: list(load(path)["state_dict"]) for name, path in paths.items()}
    assert keys["on"] == keys["off"] and not any("_orig_mod" in key for key in keys["on"])
    torch.testing.assert_close(kit.flat(methods["on"].student), kit.flat(methods["off"].student))
    whole = plain(kit)
    kit.fit(whole, data(), max_epochs=2)
    for resumed, path in ((compiled(kit), paths["off"]), (plain(kit), paths["on"])):
        kit.fit(resumed, data(), max_epochs=2, ckpt_path=path)
        torch.testing.assert_close(kit.flat(resumed.student), kit.flat(whole.student), rtol=1e-5, atol=1e-6)


def test_p88_the_compiled_network_is_the_one_that_runs(kit: SimpleNamespace) -> None:
    """Counts the graphs that the backend is given: compiling a copy, or nothing, would train as well."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    kit.fit(compiled(kit, backend), data(), max_epochs=1)
    assert graphs
