"""A small student, a small teacher and a quiet trainer, on the digits: what the tests of methods share."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from research.data.digits import Digits
from research.methods.base import AbstractMethod, Training
from research.methods.schedules import warmup_then_linear
from research.methods.soft_target import LogitMatching, SoftTarget
from research.methods.supervised import Supervised
from research.models.build import build_network, describe
from research.models.flops import flops_by_length
from research.teachers.base import AbstractTeacher
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
MLP: dict[str, Any] = {"_target_": "research.models.classifiers.Mlp", "hidden": [12]}

METHODS: Mapping[str, Callable[[Training, AbstractTeacher], AbstractMethod]] = {
    "supervised": lambda training, teacher: Supervised(training, label_smoothing=0.1),
    "soft": lambda training, teacher: SoftTarget(training, teacher, temperature=4.0),
    "soft_and_hard": lambda training, teacher: SoftTarget(
        training, teacher, temperature=2.0, hard_weight=0.3, soft_weight=0.7
    ),
    "reverse": lambda training, teacher: SoftTarget(training, teacher, temperature=3.0, divergence="reverse_kl"),
    "logit_matching": lambda training, teacher: LogitMatching(training, teacher, hard_weight=0.2),
}


def make_teacher(seed: int = 1) -> FrozenTeacher:
    """A network with dropout, and weights large enough for peaked distributions."""
    torch.manual_seed(seed)
    network = build_network({**MLP, "dropout": 0.5}, **FACTS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    return FrozenTeacher(LoadedNetwork(network, (64,), 10, f"network{seed}"))


def make_student(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return build_network({**MLP, "dropout": dropout}, **FACTS)


def make_training(student: nn.Module | None = None, dropout: float = 0.0, **changes: Any) -> Training:
    """Plain gradient descent unless changed: a step shows its gradient."""
    return Training(
        **{
            "student": make_student(dropout=dropout) if student is None else student,
            "optimizer": partial(torch.optim.SGD, lr=0.05),
            "scheduler": None,
            "architecture": describe({**MLP, "dropout": dropout}, **FACTS),
            **changes,
        }
    )


def make_method(name: str, **changes: Any) -> AbstractMethod:
    return METHODS[name](make_training(**changes), make_teacher())


def make_adam(dropout: float = 0.5) -> dict[str, Any]:
    """The pieces with the most state: Adam, a schedule that must know the length of the run, dropout."""
    return {
        "optimizer": partial(torch.optim.Adam, lr=0.01),
        "scheduler": partial(warmup_then_linear, warmup_fraction=0.2),
        "dropout": dropout,
    }


def make_trainer(**options: Any) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    plain: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0}
    return L.Trainer(**{**dict.fromkeys(quiet, False), **plain, **options})


def fit(method: AbstractMethod, data: Digits, **options: Any) -> L.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(**options)
    trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def flat(module: nn.Module) -> torch.Tensor:
    """All weights in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Gradients(L.Callback):
    """The gradient in all weights before every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(torch.cat([p.grad.flatten().double() for p in pl_module.student.parameters()]))


def make_kit() -> SimpleNamespace:
    """All of the above by name; test modules cannot import a conftest, a process of its own can."""
    names = (
        "FACTS", "MLP", "METHODS", "Gradients", "fit", "flat", "make_adam", "make_method", "make_student",
        "make_teacher", "make_trainer", "make_training",
    )  # fmt: skip
    return SimpleNamespace(**{name: globals()[name] for name in names})


@pytest.fixture(scope="session")
def words() -> Iterator[Any]:
    """The module ``own_words_kit.py`` beside this file: students that write, and what they need.

    FLOPs of equal networks are counted once: that takes longer than all the rest of a step.
    """
    spec = importlib.util.spec_from_file_location("own_words_kit", Path(__file__).with_name("own_words_kit.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patched:
        counted = module.counted_once(flops_by_length)
        patched.setattr("research.models.flops.flops_by_length", counted)
        yield module


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    return make_kit()
