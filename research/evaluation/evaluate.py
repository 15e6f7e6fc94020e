"""The one evaluator: used at the end of training, by ``distill evaluate`` and by every study."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from research.evaluation.predictions import Predictions, Teacher, gather
from research.losses.divergences import divergence, forward_kl, reverse_kl, total_variation
from research.losses.logprobs import check_temperature
from research.losses.signal_divergence import teacher_logits
from research.losses.sparse import sparse_divergence
from research.metrics.base import UndefinedMetric
from research.metrics.calibration import EqualMassCalibrationError, ExpectedCalibrationError, confidence_and_right
from research.metrics.classification import (
    BrierScore,
    Errors,
    NegativeLogLikelihood,
    accuracy,
    class_counts,
    negative_log_likelihood,
    recall,
)
from research.metrics.fidelity import AgreementAtK, CentredLogitMSE, ErrorCopying, MeanDivergence, WrongClassSpearman
from research.metrics.temperature_scaling import cross_fitted_logits, fit_temperature
from research.records import ClassBatch, TeacherSignal, TopKLogprobs

# The frozen surface. What each name means stands in the docstring of :func:`evaluate`.
QUALITY_NAMES = (
    "errors", "accuracy", "nll", "brier", "ece", "ece_equal_mass", "fitted_temperature", "nll_scaled", "ece_scaled",
)  # fmt: skip
TEACHER_NAMES = ("teacher_errors", "agreement_at_1", "agreement_at_5", "error_copying")
DENSE_TEACHER_NAMES = (
    "kl_teacher_student", "kl_student_teacher", "kl_teacher_student_at_temperature",
    "kl_student_teacher_at_temperature", "jsd", "total_variation", "wrong_class_spearman",
    "wrong_class_spearman_items", "centred_logit_mse", "teacher_nll", "teacher_ece",
)  # fmt: skip
TOP_K_TEACHER_NAMES = ("kl_teacher_student_top_k", "kl_student_teacher_top_k")
METRIC_NAMES = (*QUALITY_NAMES, *TEACHER_NAMES, *DENSE_TEACHER_NAMES, *TOP_K_TEACHER_NAMES)
ITEM_COLUMNS = ("index", "label", "prediction", "nll", "max_prob", "teacher_prediction")

_CHUNK_ROWS = 4096  # rows per metric update: bounds the float64 temporaries, and fixes the order of summation


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one student on one split.

    metrics    ``split/name`` -> value, names of METRIC_NAMES and ``recall_class_<c>``; never NaN
    items      column of ITEM_COLUMNS -> array [N], rows in ascending index; ``teacher_prediction`` with a teacher only
    omitted    ``split/name`` -> why that metric does not exist here
    student_s, teacher_s, metrics_s    seconds of wall time: forward passes of each, and the metrics
    """

    split: str
    metrics: dict[str, float]
    items: dict[str, np.ndarray]
    omitted: dict[str, str] = field(default_factory=dict)
    student_s: float = 0.0
    teacher_s: float = 0.0
    metrics_s: float = 0.0


def metric_names(num_classes: int) -> tuple[str, ...]:
    """METRIC_NAMES and the recall of each class: every name that a metric can have, without the split."""
    return (*METRIC_NAMES, *(f"recall_class_{class_id}" for class_id in range(num_classes)))


def evaluate(
    student: nn.Module,
    loader: Iterable[ClassBatch],
    *,
    split: str,
    num_classes: int,
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    device: torch.device | str | None = None,
    expected_index_N: Tensor | None = None,
) -> Evaluation:
    """Every metric of ``student`` on the items of ``loader``, in float64, means over items; KL and NLL in nats.

    errors, accuracy, nll, brier, ece, ece_equal_mass, recall_class_<c>   against the labels, at temperature 1; Brier
        sums over classes; both ECEs have 15 bins
    fitted_temperature       the temperature that minimises the NLL of the whole split
    nll_scaled, ece_scaled   with temperatures fitted on the other half of the split, see ``cross_fitted_logits``
    agreement_at_1, _at_5    share of items with the teacher's argmax among the student's 1 or 5 largest logits
    teacher_errors, error_copying, teacher_nll, teacher_ece    the teacher's errors, the share of them that the student
        repeats, the teacher's own NLL and ECE
    kl_teacher_student, kl_student_teacher    forward and reverse KL at temperature 1, by the training functions; with
        ``_at_temperature`` both sides softened by ``temperature`` (the training temperature), no T-squared factor
    jsd, total_variation     temperature 1; the JSD with weight one half
    wrong_class_spearman     rank correlation of the logits of all classes but the label, over
        ``wrong_class_spearman_items`` items (those where it exists); centred_logit_mse: mean squared difference of
        logits less their mean
    kl_*_top_k               from a teacher that gives its top K only: KL over K classes and one bucket for the rest, at
        temperature 1, a lower bound of the KL; what needs the whole distribution is omitted

    A metric that does not exist for these items is not in ``metrics`` but, with its reason, in ``omitted``.

    Student mode, devices, memory and errors are those of :func:`research.evaluation.predictions.gather`; besides,
    ValueError where the logits have other than ``num_classes`` classes or ``temperature`` is not above 0 and finite.
    """
    if not split or "/" in split:
        raise ValueError(f"split={split!r}: expected a name without '/', which separates split and metric")
    check_temperature(temperature)
    gathered = gather(student, loader, teacher=teacher, device=device, expected_index_N=expected_index_N)
    started = time.perf_counter()
    predictions, signal = gathered.predictions, gathered.signal
    given = predictions.logits_NV.shape[1]
    if given != num_classes:
        raise ValueError(f"the student gives {given} classes; the data have num_classes={num_classes}")
    sheet = _Sheet(split)
    _add_quality(sheet, predictions)
    if signal is not None:
        _add_teacher(sheet, predictions, signal, temperature)
    return Evaluation(
        split=split,
        metrics=sheet.metrics,
        items=_items(predictions, signal),
        omitted=sheet.omitted,
        student_s=gathered.student_s,
        teacher_s=gathered.teacher_s,
        metrics_s=time.perf_counter() - started,
    )


class _Sheet:
    """Metrics under their split's name; one that is undefined goes to ``omitted`` with its reason."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.metrics: dict[str, float] = {}
        self.omitted: dict[str, str] = {}

    def add(self, name: str, value: Callable[[], Tensor | float]) -> None:
        try:
            self.metrics[f"{self.split}/{name}"] = float(value())
        except UndefinedMetric as error:
            self.omitted[f"{self.split}/{name}"] = str(error)

    def add_all(self, metrics: Mapping[str, Metric], *tensors: Tensor) -> None:
        """Update all ``metrics`` with the rows of ``tensors``, chunk by chunk, and add each."""
        for chunk in zip(*(tensor.split(_CHUNK_ROWS) for tensor in tensors), strict=True):
            for metric in metrics.values():
                metric.update(*chunk)
        for name, metric in metrics.items():
            self.add(name, metric.compute)


def _add_quality(sheet: _Sheet, predictions: Predictions) -> None:
    logits_NV, label_N, index_N = predictions
    counts = class_counts(logits_NV.shape[1])
    raw = {
        "errors": Errors(),
        "nll": NegativeLogLikelihood(),
        "brier": BrierScore(),
        "ece": ExpectedCalibrationError(),
        "ece_equal_mass": EqualMassCalibrationError(),
    }
    sheet.add_all(raw, logits_NV, label_N)
    counts.update(logits_NV.argmax(dim=-1), label_N)
    counts_V5 = counts.compute()
    sheet.add("accuracy", lambda: accuracy(counts_V5))
    for class_id in range(logits_NV.shape[1]):
        sheet.add(f"recall_class_{class_id}", partial(recall, counts_V5, class_id))
    sheet.add("fitted_temperature", lambda: fit_temperature(logits_NV, label_N))
    scaled = {"nll_scaled": NegativeLogLikelihood(), "ece_scaled": ExpectedCalibrationError()}
    try:
        scaled_NV = cross_fitted_logits(logits_NV, label_N, index_N)
    except UndefinedMetric as error:
        sheet.omitted.update({f"{sheet.split}/{name}": str(error) for name in scaled})
    else:
        sheet.add_all(scaled, scaled_NV, label_N)


def _add_teacher(sheet: _Sheet, predictions: Predictions, signal: TeacherSignal, temperature: float) -> None:
    logits_NV, label_N, _ = predictions
    teacher_N = teacher_prediction(signal)
    sheet.add("teacher_errors", lambda: (teacher_N != label_N).sum())
    sheet.add_all({"agreement_at_1": AgreementAtK(1), "agreement_at_5": AgreementAtK(5)}, logits_NV, teacher_N)
    sheet.add_all({"error_copying": ErrorCopying()}, logits_NV, teacher_N, label_N)
    if isinstance(signal, TopKLogprobs):
        _add_top_k_teacher(sheet, logits_NV, signal)
    else:
        _add_dense_teacher(sheet, predictions, teacher_logits(signal), temperature)


def _add_dense_teacher(sheet: _Sheet, predictions: Predictions, teacher_NV: Tensor, temperature: float) -> None:
    logits_NV, label_N, _ = predictions
    pairs = {
        "kl_teacher_student": MeanDivergence(forward_kl),
        "kl_student_teacher": MeanDivergence(reverse_kl),
        "kl_teacher_student_at_temperature": MeanDivergence(forward_kl, temperature),
        "kl_student_teacher_at_temperature": MeanDivergence(reverse_kl, temperature),
        "jsd": MeanDivergence(divergence("jsd", teacher_mixture_weight=0.5)),
        "total_variation": MeanDivergence(total_variation),
        "centred_logit_mse": CentredLogitMSE(),
    }
    sheet.add_all(pairs, logits_NV, teacher_NV)
    spearman = WrongClassSpearman()
    sheet.add_all({"wrong_class_spearman": spearman}, logits_NV, teacher_NV, label_N)
    sheet.add("wrong_class_spearman_items", lambda: spearman.count)
    teacher = {"teacher_nll": NegativeLogLikelihood(), "teacher_ece": ExpectedCalibrationError()}
    sheet.add_all(teacher, teacher_NV, label_N)


def _add_top_k_teacher(sheet: _Sheet, logits_NV: Tensor, signal: TopKLogprobs) -> None:
    wide_NV = logits_NV.double()
    sheet.add("kl_teacher_student_top_k", lambda: sparse_divergence("forward_kl", wide_NV, signal).mean())
    sheet.add("kl_student_teacher_top_k", lambda: sparse_divergence("reverse_kl", wide_NV, signal).mean())
    reason = (
        f"the teacher's signal keeps the top {signal.ids_NK.shape[1]} of {signal.num_classes} classes; "
        "this metric needs all of them: use a dense signal"
    )
    sheet.omitted.update({f"{sheet.split}/{name}": reason for name in DENSE_TEACHER_NAMES})


def teacher_prediction(signal: TeacherSignal) -> Tensor:
    """The teacher's argmax per row, int64 [N]; of a top-k signal the first kept class, its logprobs being in order."""
    return signal.ids_NK[:, 0] if isinstance(signal, TopKLogprobs) else teacher_logits(signal).argmax(dim=-1)


def _items(predictions: Predictions, signal: TeacherSignal | None) -> dict[str, np.ndarray]:
    logits_NV, label_N, index_N = predictions
    columns = {
        "index": index_N,
        "label": label_N,
        "prediction": logits_NV.argmax(dim=-1),
        "nll": negative_log_likelihood(logits_NV, label_N),
        "max_prob": confidence_and_right(logits_NV, label_N)[0],
    }
    if signal is not None:
        columns["teacher_prediction"] = teacher_prediction(signal)
    return {name: column.numpy() for name, column in columns.items()}
