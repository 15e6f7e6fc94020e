"""The gradient that reaches the optimizer, through a real trainer, against a loop over rows in float64."""

import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from research.data.digits import Digits
from research.errors import ConfigError
from research.methods.base import AbstractMethod
from research.methods.soft_target import LogitMatching, SoftTarget
from research.records import ClassBatch

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ("supervised", "soft", "soft_and_hard", "reverse", "logit_matching")


def ragged() -> Digits:
    """21 rows in steps of 8, 8 and 5: four micro-batches cut the last into 1, 1, 1 and 2 rows."""
    return Digits(batch_size=8, num_train=21, holdout=0, seed=3)


class Wide(nn.Module):
    """The same network in float64, so that a tolerance of 1e-6 is about the method and not about rounding."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs.double())


def gradients(kit: SimpleNamespace, name: str, **options: Any) -> tuple[list[Tensor], Tensor]:
    """The gradient before every optimizer step, and the weights after the last."""
    method, callback = kit.make_method(name, student=Wide(kit.make_student())), kit.Gradients()
    kit.fit(method, ragged(), callbacks=[callback], max_epochs=2, **options)
    return callback.steps, kit.flat(method.student)


@pytest.mark.parametrize("micro_batches", [2, 4, 5])
@pytest.mark.parametrize("name", METHODS)
def test_p44_p46_accumulated_micro_batches_are_one_large_batch(
    kit: SimpleNamespace, name: str, micro_batches: int
) -> None:
    whole, end = gradients(kit, name)
    parts, parts_end = gradients(kit, name, accumulate_grad_batches=micro_batches)
    assert len(whole) == len(parts) == 6
    for one, many in zip(whole, parts, strict=True):
        assert float((one - many).norm() / one.norm()) < 1e-6
    assert float((parts_end - end).norm() / end.norm()) < 1e-6


def test_p46_micro_batches_are_weighed_by_their_rows(kit: SimpleNamespace) -> None:
    """The sums of 1 + 1 + 1 + 2 rows over 5, not the mean of the four means: in single precision the same holds."""
    whole, parts = kit.Gradients(), kit.Gradients()
    kit.fit(kit.make_method("soft"), ragged(), callbacks=[whole])
    kit.fit(kit.make_method("soft"), ragged(), callbacks=[parts], accumulate_grad_batches=4)
    for one, many in zip(whole.steps, parts.steps, strict=True):
        assert float((one - many).norm() / one.norm()) < 1e-6


# -- the loop over rows -----------------------------------------------------------------------------------------------


def row_softmax(logits: list[Tensor], temperature: float) -> list[Tensor]:
    largest = max(float(z) for z in logits)
    weights = [((z - largest) / temperature).exp() for z in logits]
    return [weight / sum(weights) for weight in weights]


def row_cross_entropy(z: list[Tensor], v: list[Tensor], label: int, smoothing: float = 0.0) -> Tensor:
    q = row_softmax(z, 1.0)
    targets = [smoothing / 10 + (1 - smoothing) * (i == label) for i in range(10)]
    return sum(-t * q_i.log() for t, q_i in zip(targets, q, strict=True))


def row_kl(z: list[Tensor], v: list[Tensor], temperature: float, reverse: bool = False) -> Tensor:
    p, q = row_softmax(v, temperature), row_softmax(z, temperature)
    if reverse:
        p, q = q, p
    return temperature**2 * sum(p_i * (p_i / q_i).log() for p_i, q_i in zip(p, q, strict=True))


def row_logit_matching(z: list[Tensor], v: list[Tensor]) -> Tensor:
    z_mean, v_mean = sum(z) / 10, sum(v) / 10
    return sum(((z_i - z_mean) - (v_i - v_mean)) ** 2 for z_i, v_i in zip(z, v, strict=True)) / 20


def row_loss(name: str, z: list[Tensor], v: list[Tensor], label: int) -> Tensor:
    if name == "supervised":
        return row_cross_entropy(z, v, label, smoothing=0.1)
    if name == "soft":
        return row_kl(z, v, 4.0)
    if name == "soft_and_hard":
        return 0.7 * row_kl(z, v, 2.0) + 0.3 * row_cross_entropy(z, v, label)
    if name == "reverse":
        return row_kl(z, v, 3.0, reverse=True)
    return row_logit_matching(z, v) + 0.2 * row_cross_entropy(z, v, label)


def steps_of(data: Digits) -> Iterator[ClassBatch]:
    return iter(data.train_dataloader())


@pytest.mark.parametrize("name", METHODS)
def test_p47_the_absolute_gradient_is_that_of_the_mean_over_rows(kit: SimpleNamespace, name: str) -> None:
    taken, _ = gradients(kit, name, accumulate_grad_batches=2)
    student, teacher = kit.make_student().double(), kit.make_teacher()
    batch = next(steps_of(ragged()))  # the first step: the student still has its initial weights
    losses = []
    for row, label in zip(batch.inputs.double(), batch.label_B.tolist(), strict=True):
        one = ClassBatch(row[None].float(), torch.tensor([label]), torch.tensor([0]), 1)
        z, v = student(row[None])[0], teacher.signal(one).logits_NV[0].double()
        losses.append(row_loss(name, list(z), list(v), label))
    (sum(losses) / 8).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert float(taken[0].norm()) == pytest.approx(float(expected.norm()), rel=1e-6)
    assert float((taken[0] - expected).norm() / expected.norm()) < 1e-6


# -- terms ------------------------------------------------------------------------------------------------------------


def gradient_of(method: AbstractMethod) -> Tensor:
    """The gradient of the weighted sum of a method's terms on one batch, without a trainer."""
    batch = next(steps_of(ragged()))
    method.zero_grad()
    sum(part.weight * part.loss.mean() for part in method.components(batch)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in method.student.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_p50_each_term_alone_reaches_the_student(kit: SimpleNamespace, name: str) -> None:
    batch = next(steps_of(ragged()))
    parts = len(kit.make_method(name).components(batch))
    assert parts == (2 if name in ("soft_and_hard", "logit_matching") else 1)
    for part in range(parts):
        method = kit.make_method(name)
        method.components(batch)[part].loss.mean().backward()
        norms = [float(parameter.grad.norm()) for parameter in method.student.parameters()]
        assert all(math.isfinite(norm) and norm > 1e-4 for norm in norms)


def test_p50_a_run_on_one_term_alone_trains_on_it(kit: SimpleNamespace) -> None:
    """Through the trainer: a loss that is logged and reaches no weight would look right everywhere else."""
    for weights in ({"hard_weight": 1.0, "soft_weight": 0.0}, {"hard_weight": 0.0, "soft_weight": 1.0}):
        for made in (SoftTarget, LogitMatching):
            method = made(kit.make_training(), kit.make_teacher(), **weights)
            before = kit.flat(method.student)
            kit.fit(method, ragged(), max_steps=1)
            assert float((kit.flat(method.student) - before).norm()) > 1e-3


@pytest.mark.parametrize("made", [SoftTarget, LogitMatching])
def test_p51_terms_do_not_dilute_each_other(kit: SimpleNamespace, made: Any) -> None:
    def gradient(**weights: float) -> Tensor:
        return gradient_of(made(kit.make_training(), kit.make_teacher(), **weights))

    hard, soft = gradient(hard_weight=1.0, soft_weight=0.0), gradient(hard_weight=0.0, soft_weight=1.0)
    both = gradient(hard_weight=0.3, soft_weight=2.0)
    torch.testing.assert_close(both, 0.3 * hard + 2.0 * soft, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("made", [SoftTarget, LogitMatching])
@pytest.mark.parametrize("key", ["hard_weight", "soft_weight"])
def test_p13_no_jump_at_weight_zero(kit: SimpleNamespace, made: Any, key: str) -> None:
    options = {"temperature": 4.0} if made is SoftTarget else {}
    other = {"hard_weight": 1.0, "soft_weight": 1.0}
    batch = next(steps_of(ragged()))

    def value(weight: float) -> tuple[float, Tensor]:
        method = made(kit.make_training(), kit.make_teacher(), **options, **{**other, key: weight})
        return float(sum(c.weight * c.loss.mean() for c in method.components(batch))), gradient_of(method)

    at_zero, beside = value(0.0), value(1e-6)
    assert abs(at_zero[0] - beside[0]) < 1e-4
    assert float((at_zero[1] - beside[1]).norm()) < 1e-4


def test_p12_recorded_factor_of_temperature(kit: SimpleNamespace) -> None:
    """With the factor the loss and gradient are T^2 times those without; it is an option of the method."""
    options = {"temperature": 4.0}
    scaled = gradient_of(SoftTarget(kit.make_training(), kit.make_teacher(), **options))
    plain = gradient_of(
        SoftTarget(kit.make_training(), kit.make_teacher(), **options, scale_by_temperature_squared=False)
    )
    torch.testing.assert_close(scaled, 16 * plain)


# -- ranks ------------------------------------------------------------------------------------------------------------

RANK_PROGRAM = f"""
import sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
import conftest as kit
from research.data.digits import Digits
method = kit.make_method("soft_and_hard")
data = Digits(batch_size=8, num_train=21, holdout=20, seed=3)
trainer = kit.fit(method, data, devices=2, strategy="ddp", accumulate_grad_batches=2, max_epochs=2)
if trainer.is_global_zero:
    metrics = {{name: float(value) for name, value in trainer.callback_metrics.items()}}
    torch.save({{"weights": kit.flat(method.student), "metrics": metrics, "rows": method.rows_seen}}, sys.argv[1])
"""


@pytest.mark.slow  # two processes that load everything
def test_p46_two_ranks_are_one_rank(kit: SimpleNamespace, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(tmp_path / "end.pt")],
            env={**os.environ, **shared, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=600)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    two = torch.load(tmp_path / "end.pt", weights_only=True)
    method = kit.make_method("soft_and_hard")
    trainer = kit.fit(method, Digits(batch_size=8, num_train=21, holdout=20, seed=3), max_epochs=2)
    torch.testing.assert_close(two["weights"], kit.flat(method.student), rtol=1e-5, atol=1e-6)
    assert two["rows"] == method.rows_seen == 42
    assert two["metrics"]["val/errors"] == float(trainer.callback_metrics["val/errors"])
    assert two["metrics"]["val/nll"] == pytest.approx(float(trainer.callback_metrics["val/nll"]), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_clipped_step_is_as_long_as_the_bound(kit: SimpleNamespace, precision: str, fused: bool) -> None:
    """Gradient descent at rate 1 whose gradients are longer than the bound: every step has the bound's length."""
    method = kit.make_method("supervised", optimizer=partial(torch.optim.SGD, lr=1.0, fused=fused))
    start = kit.flat(method.student)
    kit.fit(method, ragged(), max_steps=1, precision=precision, gradient_clip_val=1e-2)
    assert float((kit.flat(method.student) - start).norm()) == pytest.approx(1e-2, rel=1e-3)


def test_clipping_by_value_bounds_every_entry_of_a_fused_step(kit: SimpleNamespace) -> None:
    method = kit.make_method("supervised", optimizer=partial(torch.optim.SGD, lr=1.0, fused=True))
    start = kit.flat(method.student)
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    kit.fit(method, ragged(), max_steps=1, precision="bf16-mixed", **options)
    assert float((kit.flat(method.student) - start).abs().max()) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_scale_that_the_fused_step_undoes_is_refused_with_a_bound(kit: SimpleNamespace) -> None:
    method = kit.make_method("supervised", optimizer=partial(torch.optim.SGD, lr=1.0, fused=True))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match=r"optimizer\.fused=false"):
        kit.fit(method, ragged(), max_steps=1, plugins=[plugin], gradient_clip_val=1e-2)
