"""One pass over a split: the student's logits and the teacher's signal for every item, in the order of the index."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from research.models.modes import eval_mode
from research.records import ClassBatch, DenseLogits, TeacherSignal, TopKLogprobs


class Teacher(Protocol):
    """Whatever answers a batch with its signal: live, ensemble, cached, served."""

    def signal(self, batch: ClassBatch) -> TeacherSignal: ...


class Predictions(NamedTuple):
    """Logits of a whole split, rows in ascending ``index``, on the CPU; logits at least float32."""

    logits_NV: Tensor
    label_N: Tensor
    index_N: Tensor


@dataclass(frozen=True)
class Gathered:
    """A split's predictions, the teacher's signal for the same rows (None without a teacher), and what they cost.

    ``student_s`` and ``teacher_s`` are seconds of wall time in the forward passes, copies to the CPU included.
    """

    predictions: Predictions
    signal: TeacherSignal | None
    student_s: float
    teacher_s: float


def predict_logits(
    module: nn.Module,
    loader: Iterable[ClassBatch],
    *,
    device: torch.device | str | None = None,
    expected_index_N: Tensor | None = None,
) -> Predictions:
    """The module's logits for every item of ``loader``; see :func:`gather` for mode, order, memory and errors."""
    return gather(module, loader, device=device, expected_index_N=expected_index_N).predictions


def gather(
    student: nn.Module,
    loader: Iterable[ClassBatch],
    *,
    teacher: Teacher | None = None,
    device: torch.device | str | None = None,
    expected_index_N: Tensor | None = None,
) -> Gathered:
    """Run student and teacher once over ``loader``, without gradient, the student in eval mode.

    Each submodule's own train or eval mode is restored afterwards, also after an error. Batches go to ``device``
    and so does the student; without it, batches go to where the student's parameters are. All logits are kept in
    memory: 4 bytes per item and class, twice with a teacher (10,000 items of 10 classes: 0.8 MB), so this is for
    classification and not for vocabularies.

    Raises ValueError where the loader is empty, an index comes twice, an index of ``expected_index_N`` (the ids that
    the split has) does not come or another one does, the loader yields other than its own ``num_rows`` rows (as one
    rank's share of a split does), the logits are not finite [B, V], the teacher's rows or class count do not fit;
    TypeError on an unknown kind of signal.
    """
    if device is not None:
        student.to(device)
    target = torch.device(device) if device is not None else _device_of(student)
    logits, labels, indices, signals = [], [], [], []
    student_s = teacher_s = 0.0
    with torch.no_grad(), eval_mode(student):
        for batch in loader:
            batch = batch if target is None else batch.to(target)
            started = time.perf_counter()
            logits.append(_checked_logits(student(batch.inputs), batch))
            student_s += time.perf_counter() - started
            labels.append(batch.label_B.cpu())
            indices.append(batch.index_B.cpu())
            if teacher is not None:
                started = time.perf_counter()
                signals.append(_checked_signal(teacher.signal(batch), logits[-1], batch))
                teacher_s += time.perf_counter() - started
    if not logits:
        raise ValueError("the loader gave no batch; expected at least one item to evaluate")
    index_N, order_N = torch.cat(indices).sort()
    _check_index(index_N, expected_index_N, getattr(loader, "num_rows", None))
    predictions = Predictions(torch.cat(logits)[order_N], torch.cat(labels)[order_N], index_N)
    return Gathered(predictions, _joined(signals, order_N), student_s, teacher_s)


def _device_of(module: nn.Module) -> torch.device | None:
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def _checked_logits(logits_BV: Tensor, batch: ClassBatch) -> Tensor:
    if not isinstance(logits_BV, Tensor) or logits_BV.ndim != 2 or logits_BV.shape[0] != len(batch):
        given = tuple(logits_BV.shape) if isinstance(logits_BV, Tensor) else type(logits_BV).__name__
        raise ValueError(f"the student returned {given} for a batch of {len(batch)}; expected logits [B, V]")
    finite_B = logits_BV.isfinite().all(dim=-1)
    if not bool(finite_B.all()):
        bad = batch.index_B[~finite_B].tolist()
        raise ValueError(
            f"the student's logits are not finite on {len(bad)} of {len(batch)} items, index {bad[:10]}; "
            "no metric of it has a meaning: look at its training loss and weights"
        )
    return logits_BV.detach().to("cpu", torch.promote_types(logits_BV.dtype, torch.float32))


def _checked_signal(signal: TeacherSignal, student_logits_BV: Tensor, batch: ClassBatch) -> TeacherSignal:
    """The signal on the CPU, once its rows and class count are the student's."""
    if isinstance(signal, DenseLogits):
        rows = signal.logits_NV.shape[0]
    elif isinstance(signal, TopKLogprobs):
        rows = signal.ids_NK.shape[0]
    else:
        raise TypeError(f"the teacher's signal is a {type(signal).__name__}; expected DenseLogits or TopKLogprobs")
    if rows != len(batch) or signal.num_classes != student_logits_BV.shape[1]:
        raise ValueError(
            f"the teacher gave {rows} rows of {signal.num_classes} classes; the student gave {len(batch)} rows of "
            f"{student_logits_BV.shape[1]} classes: expected the same items and the same classes"
        )
    if isinstance(signal, DenseLogits):
        if bool((signal.logits_NV.isnan() | signal.logits_NV.isposinf()).any()):
            raise ValueError("the teacher's logits hold NaN or +inf; expected finite values (-inf: class excluded)")
        return DenseLogits(signal.logits_NV.detach().cpu())
    return TopKLogprobs(
        signal.ids_NK.cpu().long(),
        signal.logprobs_NK.detach().cpu(),
        signal.tail_logprob_N.detach().cpu(),
        signal.num_classes,
    )


def _joined(signals: list[TeacherSignal], order_N: Tensor) -> TeacherSignal | None:
    """All batches' signals as one, in the order of the index; a top-k signal that kept every class becomes dense."""
    if not signals:
        return None
    dense = [signal for signal in signals if isinstance(signal, DenseLogits)]
    if len(dense) == len(signals):
        return DenseLogits(torch.cat([signal.logits_NV for signal in dense])[order_N])
    kept = [signal for signal in signals if isinstance(signal, TopKLogprobs)]
    widths = sorted({signal.ids_NK.shape[1] for signal in kept})
    if dense or len(widths) != 1:
        raise ValueError(
            f"the teacher changed its kind of signal between batches: {len(dense)} dense, {len(kept)} top-k with "
            f"K in {widths}; expected one kind and one K for a split"
        )
    ids_NK = torch.cat([signal.ids_NK for signal in kept])[order_N]
    logprobs_NK = torch.cat([signal.logprobs_NK for signal in kept])[order_N]
    if widths[0] == kept[0].num_classes:
        return DenseLogits(torch.zeros_like(logprobs_NK).scatter_(1, ids_NK, logprobs_NK))
    tail_logprob_N = torch.cat([signal.tail_logprob_N for signal in kept])[order_N]
    return TopKLogprobs(ids_NK, logprobs_NK, tail_logprob_N, kept[0].num_classes)


def _check_index(index_N: Tensor, expected_index_N: Tensor | None, num_rows: int | None) -> None:
    """``index_N`` is sorted; ``num_rows`` is what the loader says of itself."""
    twice_N = index_N[1:][index_N[1:] == index_N[:-1]].unique()
    if twice_N.numel():
        raise ValueError(
            f"{twice_N.numel()} items came more than once, index {twice_N[:10].tolist()}; expected each item once: "
            "evaluate over one pass of an unshuffled, unsharded loader"
        )
    if num_rows is not None and index_N.numel() != num_rows:
        raise ValueError(
            f"the loader gave {index_N.numel()} of its {num_rows} items; expected all: it is one rank's share, or it "
            "was resumed in the middle; evaluate with a fresh loader over the whole split"
        )
    if expected_index_N is None:
        return
    expected, seen = set(expected_index_N.tolist()), set(index_N.tolist())
    if expected != seen:
        missing, unknown = sorted(expected - seen), sorted(seen - expected)
        raise ValueError(
            f"{len(missing)} items of the split did not come (index {missing[:10]}) and {len(unknown)} came that it "
            f"does not have (index {unknown[:10]}); expected exactly the split's {len(expected)} items"
        )
