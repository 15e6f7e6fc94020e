"""The arms of losses_benchmark.py: a mean divergence and both gradients from the same hidden states and heads.

An arm is a function of :class:`Work` that returns the mean loss, to be differentiated. Public implementations are
imported when they are asked for; where one is not installed its row says so.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from research.losses.linear import automatic_chunk_rows, linear_divergence
from research.losses.projection import project
from research.losses.soft_target import soft_target
from research.records import HiddenProjection

Arm = Callable[["Work"], Tensor]
BETA = {"forward_kl": 0.0, "jsd": 0.5}


@dataclass(frozen=True)
class Shape:
    """V classes, N positions, hidden widths of student and teacher, precision and divergence of one comparison."""

    classes: int
    positions: int
    student_width: int
    teacher_width: int
    dtype: str
    divergence: str

    def __str__(self) -> str:
        widths = f"{self.student_width}/{self.teacher_width}"
        return f"{self.divergence} {self.dtype} V={self.classes} N={self.positions} H={widths}"


class Work:
    """The tensors of one comparison: student hidden states and head with gradient, the teacher's without."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, shape.dtype)

        def drawn(rows: int, width: int, scale: float) -> Tensor:
            return (torch.randn(rows, width, generator=generator) * scale).to(dtype)

        self.shape = shape
        self.hidden = drawn(shape.positions, shape.student_width, 1.0).requires_grad_()
        self.head = drawn(shape.classes, shape.student_width, shape.student_width**-0.5).requires_grad_()
        self.teacher_hidden = drawn(shape.positions, shape.teacher_width, 1.0)
        self.teacher_head = drawn(shape.classes, shape.teacher_width, shape.teacher_width**-0.5)
        self.labels = torch.zeros(shape.positions, dtype=torch.int64)

    def run(self, arm: Arm) -> Tensor | None:
        """Loss and both gradients, as one training step has them."""
        self.hidden.grad = self.head.grad = None
        loss = arm(self)
        if not loss.requires_grad:
            return None
        loss.backward()
        return loss.detach()

    @property
    def student(self) -> HiddenProjection:
        return HiddenProjection(self.hidden, self.head)

    @property
    def teacher(self) -> HiddenProjection:
        return HiddenProjection(self.teacher_hidden, self.teacher_head)

    @property
    def options(self) -> dict[str, Any]:
        """Of our losses."""
        weight = BETA[self.shape.divergence]
        return {"divergence": self.shape.divergence} | ({"teacher_mixture_weight": weight} if weight else {})

    def logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = linear(self.teacher_hidden, self.teacher_head)
        return linear(self.hidden, self.head), teacher


def floor(work: Work) -> Tensor:
    """The four matrix products that nobody can leave out, in the same chunks, buffers reused; no loss."""
    rows = min(automatic_chunk_rows(work.shape.classes, work.hidden.device), work.shape.positions)
    hidden, head = work.hidden.detach(), work.head.detach()
    logits, teacher_logits = (hidden.new_empty(rows, work.shape.classes) for _ in range(2))
    in_hidden, in_head = torch.empty_like(hidden), torch.zeros_like(head)
    for first in range(0, len(hidden), rows):
        part = slice(first, first + rows)
        number = len(hidden[part])
        torch.mm(hidden[part], head.T, out=logits[:number])
        torch.mm(work.teacher_hidden[part], work.teacher_head.T, out=teacher_logits[:number])
        torch.mm(logits[:number], head, out=in_hidden[part])
        in_head.addmm_(logits[:number].T, hidden[part])
    return in_hidden.sum()


def chunked(work: Work, compiled: bool = False) -> Tensor:
    return linear_divergence(work.student, work.teacher, compiled=compiled, **work.options).mean()


def dense(work: Work) -> Tensor:
    return soft_target(project(work.student), work.teacher, **work.options).mean()


def log_softmax_and_kl_div(work: Work) -> Tensor:
    student, teacher = (logits.float().log_softmax(-1) for logits in work.logits())
    return kl_div(student, teacher, log_target=True, reduction="batchmean")


def trl_generalized_jsd(work: Work) -> Tensor:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = work.logits()
    return GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], work.labels[None], beta=BETA[work.shape.divergence]
    )


def trl_chunked(work: Work) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    tensors = (work.hidden[None], work.teacher_hidden[None], work.head, work.teacher_head)
    mask = torch.ones_like(work.labels)[None]
    return _chunked_divergence_loss(*tensors, mask, beta=BETA[work.shape.divergence])[0]


def torchtune_forward_kl(work: Work) -> Tensor:
    return _torchtune().ForwardKLLoss()(*work.logits(), work.labels)


def torchtune_chunked(work: Work) -> Tensor:
    """Its loss of chunked logits, which are projected chunk by chunk; all of them are kept."""
    students, teachers = [], []
    for hidden, teacher_hidden in zip(work.hidden.chunk(8), work.teacher_hidden.chunk(8), strict=True):
        students.append(linear(hidden, work.head)[None])
        with torch.no_grad():
            teachers.append(linear(teacher_hidden, work.teacher_head)[None])
    loss = _torchtune().ForwardKLWithChunkedOutputLoss(num_output_chunks=len(students))
    return loss(students, teachers, work.labels[None])


def liger(work: Work, compiled: bool = False, chunk_size: int = 1024) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {"beta": BETA[work.shape.divergence], "compiled": compiled, "chunk_size": chunk_size}
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **options)
    return loss(work.hidden, work.head, work.teacher_hidden, work.teacher_head, work.labels)


def liger_256(work: Work) -> Tensor:
    return liger(work, chunk_size=256)


def chunked_compiled(work: Work) -> Tensor:
    return chunked(work, compiled=True)


def liger_compiled(work: Work) -> Tensor:
    return liger(work, compiled=True)


OURS: dict[str, Arm] = {"chunked": chunked, "chunked, compiled": chunked_compiled, "dense": dense}
PEERS: dict[str, Arm] = {
    "log_softmax + kl_div": log_softmax_and_kl_div,
    "TRL generalized_jsd_loss": trl_generalized_jsd,
    "TRL chunked divergence": trl_chunked,
    "torchtune": torchtune_forward_kl,
    "torchtune chunked": torchtune_chunked,
    "Liger": liger,
    "Liger, chunks of 256": liger_256,
    "Liger, compiled": liger_compiled,
}
FORWARD_KL_ONLY = ("log_softmax + kl_div", "torchtune", "torchtune chunked")
ARMS: dict[str, Arm] = {"floor": floor, **OURS, **PEERS}


def arms_of(shape: Shape, names: tuple[str, ...] = tuple(ARMS)) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms that can run at this shape, tried on a small one first, and why the others are missing."""
    ready, missing = {}, {}
    small = Work(Shape(64, 16, 8, 8, shape.dtype, shape.divergence))
    for name in names:
        if name in FORWARD_KL_ONLY and shape.divergence != "forward_kl":
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                small.run(ARMS[name])
            ready[name] = ARMS[name]
        except ImportError as error:
            missing[name] = f"not installed ({str(error).strip().splitlines()[0]}); pip install '.[benchmark]'"
    return ready, missing


def _torchtune() -> ModuleType:
    """Its file of losses alone: the package as a whole wants torchao."""
    if "torchtune_kd_losses" not in sys.modules:
        package = importlib.util.find_spec("torchtune")
        if package is None or not package.submodule_search_locations:
            raise ImportError("No module named 'torchtune'")
        path = f"{package.submodule_search_locations[0]}/modules/loss/kd_losses.py"
        spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no losses at {path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["torchtune_kd_losses"] = module
    return sys.modules["torchtune_kd_losses"]
