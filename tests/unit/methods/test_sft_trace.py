"""Trace fine-tuning against a float64 loop over single, unpadded documents; padded, packed and accumulated alike."""

import math
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.errors import ConfigError
from research.methods.base import Training
from research.methods.sft_trace import SftTrace
from research.models.build import build_network, describe
from research.tasks.addition import Addition
from research.teachers.frozen import FrozenTeacher, LoadedNetwork
from research.text.document import Document
from research.text.templates import Plain

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES: dict[str, Any] = {
    "_target_": "research.models.language.LanguageModel", "architecture": "llama", "hidden_size": 16,
    "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "max_positions": 128, "initializer_range": 0.3,
}  # fmt: skip
ROWS = 8
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "padded": ({}, 1),
    "packed": ({"packed_to": 96}, 1),
    "accumulated": ({}, 4),
    "packed_and_accumulated": ({"packed_to": 128}, 2),
    "grouped": ({"length_grouping": 2}, 1),
}


def make_data(**changes: Any) -> TraceData:
    """Eight additions of one to four digits: documents of many lengths."""
    options = {"num_train": ROWS, "num_val": 4, "num_test": 4, "batch_size": ROWS, "max_tokens": 96, **changes}
    return TraceData(task=Addition(min_digits=1, max_digits=4), template=Plain(), **options)


def make_network(data: TraceData, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(SIZES, **data.facts()).double()


def make_method(data: TraceData, lr: float = 1.0, **options: Any) -> SftTrace:
    network = make_network(data)
    training = Training(network, partial(torch.optim.SGD, lr=lr), None, describe(SIZES, **data.facts()))
    teacher = None
    if options.get("soft_weight"):
        teacher_network = make_network(data, seed=1)
        teacher = FrozenTeacher(LoadedNetwork(teacher_network, None, data.facts()["vocab_size"], "teacher"))
    return SftTrace(training, teacher, **options)


def step_of(data: TraceData, parts: int, **options: Any) -> tuple[list[Tensor], SftTrace]:
    """The gradient of one optimizer step, read off plain gradient descent with rate 1."""
    method = make_method(data, **options)
    before = [parameter.detach().clone() for parameter in method.student.parameters()]
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=parts, num_sanity_val_steps=0,
        limit_val_batches=0, **dict.fromkeys(quiet, False),
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    assert trainer.global_step == 1
    pairs = zip(before, method.student.parameters(), strict=True)
    return [old - new.detach() for old, new in pairs], method


def completion_nll(network: nn.Module, document: Document) -> list[Tensor]:
    """-log p of each completion token (EOS included), from one unpadded row without any mask or label of ours."""
    ids = torch.tensor([document.ids])
    logprobs = network.model(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
    return [-logprobs[place - 1, document.ids[place]] for place in range(document.prompt_length, len(document.ids))]


def reference(data: TraceData, reduction: str, fixed_length: int | None = None) -> list[Tensor]:
    network = make_network(data)
    rows = [torch.stack(completion_nll(network, document)) for document in data.documents("train")]
    loss = {
        "token": lambda: torch.cat(rows).mean(),
        "sequence": lambda: torch.stack([row.mean() for row in rows]).mean(),
        "fixed": lambda: torch.cat(rows).sum() / (len(rows) * fixed_length),
    }[reduction]()
    loss.backward()
    return [parameter.grad for parameter in network.parameters()]


def assert_same(given: list[Tensor], expected: list[Tensor]) -> None:
    scale = max(float(part.abs().max()) for part in expected)
    for left, right in zip(given, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9 * scale)


@pytest.mark.parametrize("reduction", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("way", WAYS)
def test_p44_p46_every_way_to_lay_out_a_step_gives_the_loop_s_gradient(way: str, reduction: str) -> None:
    changes, parts = WAYS[way]
    fixed = 20 if reduction == "fixed" else None
    gradient, _ = step_of(make_data(**changes), parts, reduction=reduction, fixed_length=fixed)
    assert_same(gradient, reference(make_data(), reduction, fixed))


def test_the_documents_are_ragged_enough_for_the_reductions_to_differ() -> None:
    token, sequence = reference(make_data(), "token"), reference(make_data(), "sequence")
    lengths = {len(document.ids) for document in make_data().documents("train")}
    assert len(lengths) > 3
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(token, sequence, strict=True))
    assert difference > 0.05


def test_p32_the_prompt_s_weight_enters_sum_and_count() -> None:
    """With weight w: (completion + w * prompt) / (completion places + w * prompt places), from a loop."""
    weight = 0.25
    data = make_data(prompt_loss_weight=weight)
    gradient, _ = step_of(data, 2)
    network, total, count = make_network(data), torch.zeros((), dtype=torch.float64), 0.0
    for document in data.documents("train"):
        ids = torch.tensor([document.ids])
        logprobs = network.model(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
        for place in range(1, len(document.ids)):
            share = 1.0 if place >= document.prompt_length else weight
            total, count = total - share * logprobs[place - 1, document.ids[place]], count + share
    (total / count).backward()
    assert_same(gradient, [parameter.grad for parameter in network.parameters()])


def test_p51_the_soft_term_has_its_own_places_and_denominator() -> None:
    """Cross-entropy with weight 0.5 and T^2 KL(teacher || student) at T = 2 over completion places alone."""
    data = make_data(prompt_loss_weight=0.5)
    options = {"hard_weight": 0.0, "soft_weight": 1.5, "temperature": 2.0}
    gradient, method = step_of(data, 4, **options)
    network, teacher = make_network(data), make_network(data, seed=1)
    terms = []
    for document in data.documents("train"):
        ids = torch.tensor([document.ids])
        places = slice(document.prompt_length - 1, len(document.ids) - 1)
        q = (network.model(input_ids=ids, use_cache=False).logits[0, places] / 2).log_softmax(dim=-1)
        p = (teacher.model(input_ids=ids, use_cache=False).logits[0, places].float() / 2).log_softmax(-1).detach()
        terms.append(4 * (p.exp() * (p - q)).sum(dim=-1))
    (1.5 * torch.cat(terms).mean()).backward()
    expected = [parameter.grad for parameter in network.parameters()]
    scale = max(float(part.abs().max()) for part in expected)  # the teacher answers in float32
    for left, right in zip(gradient, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5 * scale)
    assert method.teacher_rows == ROWS and method.teacher_flops > 0


def test_p36_a_batch_without_a_graded_place_gives_zero_and_a_zero_gradient() -> None:
    data = make_data()
    method = make_method(data)
    batch = next(iter(data.loader("train")))
    batch = type(batch)(**{**vars(batch), "weight_BT": torch.zeros_like(batch.weight_BT), "step_weight": 0.0})
    (part,) = method.components(batch)
    loss = part.loss.total / max(part.step_count, 1e-12)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(parameter.grad.abs().max()) == 0.0 for parameter in method.student.parameters())


def test_the_ledger_counts_tokens_without_padding_and_flops_with_it() -> None:
    data = make_data()
    documents = data.documents("train")
    _, method = step_of(data, 1)
    assert method.rows_seen == ROWS
    assert method.tokens_seen == sum(len(document.ids) for document in documents)
    longest = max(len(document.ids) for document in documents)
    matrices = sum(p.numel() for name, p in method.student.named_parameters() if p.ndim == 2 and "embed" not in name)
    # 6 N per place, and attention's two products of 2 * T * T * width a layer, forward once and backward twice
    expected = ROWS * (6 * matrices * longest + 3 * 2 * 2 * longest**2 * 16 * 2)
    assert method.update_flops == pytest.approx(expected, rel=0.02)


def test_validation_measures_the_completion_alone() -> None:
    data = make_data(prompt_loss_weight=1.0)
    method = make_method(data, lr=0.0)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(accelerator="cpu", devices=1, **dict.fromkeys(quiet, False))
    (told,) = trainer.validate(method, datamodule=data, verbose=False)
    network = make_network(data)
    rows = [value for document in data.documents("val") for value in completion_nll(network, document)]
    assert told["val/nll"] == pytest.approx(float(torch.stack(rows).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reduction": "mean"}, "method.reduction is 'mean'"),
        ({"reduction": "fixed"}, "method.fixed_length is None"),
        ({"fixed_length": 5}, "method.fixed_length is 5"),
        ({"hard_weight": 0.0}, "both 0"),
        ({"hard_weight": math.inf}, "method.hard_weight is inf"),
        ({"temperature": 0.0}, "method.temperature is 0.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_method(make_data(), **options)


def test_a_soft_term_needs_a_teacher() -> None:
    data = make_data()
    training = Training(make_network(data), partial(torch.optim.SGD, lr=1.0), None, describe(SIZES, **data.facts()))
    with pytest.raises(ConfigError, match="there is no teacher"):
        SftTrace(training, soft_weight=1.0)
