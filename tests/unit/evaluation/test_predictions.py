"""One pass over a split: mode, gradient, order, and each fault that must be refused."""

import math

import pytest
import torch
from torch import nn

from research.evaluation.predictions import gather, predict_logits
from research.records import ClassBatch, DenseLogits, TopKLogprobs


def batches(index_N=None, size=4, num_items=10):
    index_N = torch.arange(num_items) if index_N is None else index_N
    inputs = torch.nn.functional.one_hot(index_N % 3, 3).float() + index_N[:, None]
    return [ClassBatch(inputs[r], index_N[r] % 3, index_N[r], len(r)) for r in torch.arange(len(index_N)).split(size)]


class Sized(list):
    """A loader that knows its rows."""

    num_rows = 10


class Answer:
    def __init__(self, answer):
        self.answer = answer

    def signal(self, batch):
        return self.answer(batch)


class Broken(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, inputs):
        return self.answer(inputs)


def test_rows_come_in_the_order_of_the_index():
    order_N = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    logits_NV, label_N, index_N = predict_logits(nn.Identity(), batches(order_N + 50))
    assert index_N.tolist() == list(range(50, 60))
    assert label_N.tolist() == [i % 3 for i in range(50, 60)]
    assert logits_NV.tolist() == [[i + float(c == i % 3) for c in range(3)] for i in range(50, 60)]


def test_modes_are_restored_one_by_one_also_after_an_error():
    """A frozen batch norm inside a training student must not come back in train mode."""
    student = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)).train()
    student[0].eval()
    predict_logits(student, batches())
    assert [part.training for part in student.modules()] == [True, False, True, True]
    with pytest.raises(ValueError, match="no batch"):
        predict_logits(student, [])
    assert [part.training for part in student.modules()] == [True, False, True, True]


def test_dropout_and_batch_norm_are_in_eval_mode():
    student = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 4)).train()
    mean, state = student[0].running_mean.clone(), torch.get_rng_state()
    first, second = predict_logits(student, batches()), predict_logits(student, batches())
    assert torch.equal(first.logits_NV, second.logits_NV)
    assert torch.equal(student[0].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_and_tensors_that_training_may_save():
    student = nn.Linear(3, 3)
    gathered = gather(student, batches(), teacher=Answer(lambda batch: DenseLogits(student(batch.inputs))))
    logits_NV = gathered.predictions.logits_NV
    assert not logits_NV.requires_grad and not gathered.signal.logits_NV.requires_grad
    seen = []
    predict_logits(Broken(lambda inputs: seen.append(inputs * 2) or inputs), batches())
    assert not seen[0].is_inference()  # a tensor that the student keeps can still enter a backward pass
    assert student.weight.grad is None and torch.is_grad_enabled()


def test_half_precision_logits_are_widened_and_double_kept():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert predict_logits(Broken(lambda x, dtype=dtype: x.to(dtype)), batches()).logits_NV.dtype == wide


def test_duplicate_index_is_refused():
    with pytest.raises(ValueError, match=r"more than once, index \[2\]"):
        predict_logits(nn.Identity(), batches(torch.tensor([0, 1, 2, 3, 4, 2])))


def test_missing_or_foreign_index_is_refused():
    with pytest.raises(ValueError, match=r"1 items of the split did not come \(index \[9\]\)"):
        predict_logits(nn.Identity(), batches(num_items=9), expected_index_N=torch.arange(10))
    with pytest.raises(ValueError, match=r"1 came that it does not have \(index \[10\]\)"):
        predict_logits(nn.Identity(), batches(num_items=11), expected_index_N=torch.arange(10))
    assert predict_logits(nn.Identity(), batches(), expected_index_N=torch.arange(9, -1, -1)).index_N.numel() == 10


def test_one_ranks_share_of_a_split_is_refused():
    with pytest.raises(ValueError, match="6 of its 10 items"):
        predict_logits(nn.Identity(), Sized(batches(num_items=6)))
    assert predict_logits(nn.Identity(), Sized(batches())).index_N.numel() == 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_refused_with_their_index(bad):
    def spoil(inputs):
        return torch.where(inputs.amax(-1, keepdim=True) > 7.5, torch.full_like(inputs, bad), inputs)

    with pytest.raises(ValueError, match=r"not finite on 1 of 4 items, index \[7\]"):
        predict_logits(Broken(spoil), batches())


def test_other_outputs_are_refused():
    for answer, given in (
        (lambda x: x[0], r"\(3,\)"),
        (lambda x: x[:2], r"\(2, 3\)"),
        (lambda x: {"logits": x}, "dict"),
    ):
        with pytest.raises(ValueError, match=f"returned {given}"):
            predict_logits(Broken(answer), batches())


def test_teacher_that_does_not_fit_is_refused():
    width = Answer(lambda batch: DenseLogits(torch.zeros(len(batch), 4)))
    with pytest.raises(ValueError, match="rows of 4 classes; the student gave 4 rows of 3 classes"):
        gather(nn.Identity(), batches(), teacher=width)
    rows = Answer(lambda batch: DenseLogits(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="gave 1 rows of 3"):
        gather(nn.Identity(), batches(), teacher=rows)
    with pytest.raises(TypeError, match="is a Tensor; expected DenseLogits or TopKLogprobs"):
        gather(nn.Identity(), batches(), teacher=Answer(lambda batch: batch.inputs))
    with pytest.raises(ValueError, match="NaN"):
        gather(nn.Identity(), batches(), teacher=Answer(lambda batch: DenseLogits(batch.inputs * math.nan)))


def test_teacher_that_changes_its_signal_is_refused():
    def answer(batch):
        kept = 2 if len(batch) == 4 else 1
        logprobs_NK, ids_NK = batch.inputs.log_softmax(-1).topk(kept)
        return TopKLogprobs(ids_NK, logprobs_NK, logprobs_NK[:, 0], 3)

    with pytest.raises(ValueError, match="changed its kind of signal"):
        gather(nn.Identity(), batches(), teacher=Answer(answer))


def test_device_moves_student_and_batches():
    student = nn.Linear(3, 3)
    predict_logits(student, batches(), device="cpu")
    assert student.weight.device.type == "cpu"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        predict_logits(student, batches(), device="meta")
