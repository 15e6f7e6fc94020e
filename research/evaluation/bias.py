"""The one-parameter bias correction of claims C08 and C09, measured beside the uncorrected student."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from research.evaluation.evaluate import teacher_prediction
from research.evaluation.predictions import Predictions, Teacher, gather, predict_logits
from research.metrics.class_bias import apply_class_bias, fit_class_bias


def evaluate_with_bias(
    student: nn.Module, data: Any, teacher: Teacher | None, classes: Sequence[int], batch_size: int
) -> dict[str, float]:
    """Test metrics after one shared offset on the logits of `classes`.

    bias                    the offset fitted on held-out training rows (`data.holdout` > 0) against the teacher's
                            argmax, or against the label where there is no teacher
    errors_bias_fixed       test errors with that offset
    recall_bias_classes     share of the items of `classes` predicted right without it; with `_bias_fixed`, with it
    errors_bias_on_test     errors with the offset fitted on the test labels themselves, as the paper did: an optimistic
                            number, kept for comparison alone
    """
    held_out = gather(student, data.loader("val", batch_size=batch_size), teacher=teacher)
    signal = held_out.signal
    target_N = held_out.predictions.label_N if signal is None else teacher_prediction(signal)
    chosen = list(classes)
    bias = fit_class_bias(held_out.predictions.logits_NV, target_N, chosen)
    test = predict_logits(student, data.loader("test", batch_size=batch_size))
    on_test = fit_class_bias(test.logits_NV, test.label_N, chosen)
    fixed_NV = apply_class_bias(test.logits_NV, chosen, bias)
    return {
        "test/bias": bias,
        "test/recall_bias_classes": _recall(test.logits_NV, test, chosen),
        "test/errors_bias_fixed": _errors(fixed_NV, test.label_N),
        "test/recall_bias_classes_bias_fixed": _recall(fixed_NV, test, chosen),
        "test/bias_on_test": on_test,
        "test/errors_bias_on_test": _errors(apply_class_bias(test.logits_NV, chosen, on_test), test.label_N),
    }


def _errors(logits_NV: Tensor, label_N: Tensor) -> float:
    return float((logits_NV.argmax(dim=-1) != label_N).sum())


def _recall(logits_NV: Tensor, truth: Predictions, classes: list[int]) -> float:
    """Share of the items of `classes` that are predicted right."""
    of_classes_N = sum((truth.label_N == class_id) for class_id in classes).bool()  # type: ignore[union-attr]
    right_N = logits_NV.argmax(dim=-1) == truth.label_N
    return float(right_N[of_classes_N].double().mean())
