"""What every training method promises, tested on each of them through a real trainer."""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import research.methods
from research.data.base import AbstractClassData
from research.data.digits import Digits
from research.errors import ConfigError, NonFiniteLoss
from research.methods.base import AbstractMethod, Training
from research.methods.on_policy import OnPolicy
from research.methods.policy_gradient import PolicyGradient
from research.methods.sft_trace import SftTrace
from research.methods.soft_target import LogitMatching, SoftTarget
from research.methods.supervised import Supervised
from research.models.build import build_network, describe
from research.models.weights import weights_sha256
from research.records import ClassBatch
from research.teachers.base import AbstractTeacher
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
MLP = {"_target_": "research.models.classifiers.Mlp", "hidden": [12]}

METHODS: dict[str, Callable[..., AbstractMethod]] = {
    "supervised": Supervised,
    "soft_target": partial(SoftTarget, temperature=4.0, hard_weight=0.5),
    "logit_matching": partial(LogitMatching, hard_weight=0.5),
}


def make_network(seed: int, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    network = build_network(MLP, **FACTS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return network


def make_teacher(seed: int = 1) -> FrozenTeacher:
    return FrozenTeacher(LoadedNetwork(make_network(seed, scale=3.0), (64,), 10, f"network{seed}"))


def make_method(name: str, teacher: AbstractTeacher | None, lr: float = 0.01) -> AbstractMethod:
    training = Training(make_network(0), partial(torch.optim.Adam, lr=lr), None, describe(MLP, **FACTS))
    return METHODS[name](training, teacher)


def fit(method: AbstractMethod, data: AbstractClassData, **options: Any) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    plain: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0}
    trainer = L.Trainer(**{**dict.fromkeys(quiet, False), **plain, **options})
    trainer.fit(method, datamodule=data)
    return trainer


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def data() -> Digits:
    return Digits(batch_size=8, num_train=40, holdout=20)


@pytest.fixture
def batch(data: Digits) -> ClassBatch:
    return next(iter(data.train_dataloader()))


def test_every_method_of_the_package_is_tested_here() -> None:
    modules = [
        importlib.import_module(f"research.methods.{info.name}")
        for info in pkgutil.iter_modules(research.methods.__path__)
    ]
    found = {
        made
        for module in modules
        for made in vars(module).values()
        if inspect.isclass(made) and issubclass(made, AbstractMethod) and not inspect.isabstract(made)
    }
    tested = {getattr(made, "func", made) for made in METHODS.values()}
    of_text = {SftTrace, OnPolicy, PolicyGradient}
    assert found == tested | of_text, "methods of text have a loop over documents of their own in tests/unit/methods"


def test_components_are_named_sums_over_rows(name: str, batch: ClassBatch) -> None:
    parts = make_method(name, make_teacher()).components(batch)
    assert parts and len({part.name for part in parts}) == len(parts)
    for part in parts:
        assert part.weight > 0 and int(part.loss.count) == len(batch)
        assert part.loss.total.ndim == 0 and part.loss.total.requires_grad
        doubled = ClassBatch(*(torch.cat([t, t]) for t in (batch.inputs, batch.label_B, batch.index_B)), 16)
        twice = {p.name: p for p in make_method(name, make_teacher()).components(doubled)}[part.name]
        torch.testing.assert_close(twice.loss.total, 2 * part.loss.total)  # a sum, no mean


def test_forward_is_the_student(name: str, batch: ClassBatch) -> None:
    method = make_method(name, make_teacher())
    assert torch.equal(method(batch.inputs), method.student(batch.inputs))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_learns(name: str, data: Digits, precision: str) -> None:
    """The weighted loss on the training rows falls by more than a third in 20 epochs."""
    method = make_method(name, make_teacher(), lr=0.03)
    (whole,) = data.loader("train", batch_size=40)

    def value() -> float:
        with torch.no_grad():
            return float(sum(part.weight * part.loss.mean() for part in method.components(whole)))

    before = value()
    fit(method, data, max_epochs=20, precision=precision)
    assert value() < before * 2 / 3
    assert {parameter.dtype for parameter in method.student.parameters()} == {torch.float32}


def test_two_runs_of_one_seed_are_equal_and_neighbouring_seeds_are_not(name: str) -> None:
    ends = []
    for seed in (4, 4, 5):
        method = make_method(name, make_teacher())
        fit(method, Digits(batch_size=8, num_train=40, holdout=0, seed=seed))
        ends.append(flat(method.student))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_p27_another_teacher_changes_what_is_learned_where_one_is_needed(name: str, data: Digits) -> None:
    ends = []
    for seed in (1, 2):
        method = make_method(name, make_teacher(seed))
        fit(method, data)
        ends.append(flat(method.student))
    assert torch.equal(*ends) != method.needs_teacher


def test_a_teacher_is_asked_for_where_it_is_needed_and_left_alone_elsewhere(name: str, data: Digits) -> None:
    if METHODS[name] is Supervised:
        method = make_method(name, None)
        fit(method, data)
        assert method.rows_seen == 40 and method.teacher_rows == 0
    else:
        with pytest.raises(ConfigError, match="needs a teacher"):
            make_method(name, None)


def test_p84_p53_checkpoints_and_teacher(name: str, data: Digits, tmp_path: Path) -> None:
    teacher = make_teacher()
    method = make_method(name, teacher)
    trainer = fit(method, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"student.{key}" for key in make_network(0).state_dict()}
    assert weights_sha256(teacher._network) == teacher.identity.sha256


def test_declared_validation_metrics_are_measured(name: str, data: Digits) -> None:
    method = make_method(name, make_teacher())
    measured = {key for key in fit(method, data).callback_metrics if key.startswith("val/")}
    assert measured == set(method.validation_metrics)


def test_without_a_validation_split_nothing_is_measured(name: str) -> None:
    trainer = fit(make_method(name, make_teacher()), Digits(batch_size=8, num_train=40, holdout=0))
    assert not [key for key in trainer.callback_metrics if key.startswith("val/")]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(name: str) -> None:
    data, method = Digits(batch_size=8, num_train=40, holdout=0, seed=1), make_method(name, make_teacher())
    inputs, _, index_N = data.split_tensors("train")
    order_N = data.train_dataloader().order(0)
    inputs[order_N[20]] = math.nan  # the third step's fifth row
    with pytest.raises(NonFiniteLoss) as told:
        fit(method, data)
    assert "the loss is not finite at step 2 (" in str(told.value)
    assert f"batch indices {index_N[order_N[16:24]].tolist()}" in str(told.value)
    assert bool(flat(method.student).isfinite().all()) and method.rows_seen == 16
