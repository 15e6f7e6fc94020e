"""A task that a random network solves now and then, tiny students and teachers, and one step of gradient descent."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.methods.base import AbstractMethod, Training
from research.methods.on_policy import OnPolicy
from research.methods.policy_gradient import PolicyGradient
from research.models.build import build_network, describe
from research.records import Completion, Problem, Verdict
from research.tasks.base import AbstractTask, Split
from research.teachers.frozen import FrozenTeacher, LoadedNetwork
from research.text.template import AbstractTemplate, Parsed

Row = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[float]]  # prompt, the teacher's, completion, logprobs
SIZES: dict[str, Any] = {
    "_target_": "research.models.language.LanguageModel", "architecture": "llama", "hidden_size": 16,
    "num_layers": 1, "num_heads": 2, "intermediate_size": 24, "max_positions": 64, "initializer_range": 0.3,
}  # fmt: skip
FIRST_SEED = 5  # a network that ends some of its completions, at all lengths
V = 16  # tokens: ten digits, "=", ":", ";", and those of every tokenizer
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Even(AbstractTask):
    """Write anything of even length: half of what a random network writes is right. Problems are numbers."""

    name, alphabet = "even", "0123456789"

    def __init__(self, unreadable: Sequence[int] = ()) -> None:
        self.unreadable = frozenset(unreadable)

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        first = {"train": "", "val": "0", "test": "00"}[split]
        texts = [first + str(n) * (1 + n % 4) for n in range(num or 0)]
        return [
            Problem(n, text, "" if n in self.unreadable else "12" * (1 + n % 3), details={})
            for n, text in enumerate(texts)
        ]

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        if not answer or not problem.answer:
            return Verdict.UNPARSED
        return Verdict.WRONG if len(answer) % 2 else Verdict.CORRECT


class Bare(AbstractTemplate):
    """The problem and a sign that asks; what follows is the answer."""

    step_separator = ";"

    def __init__(self, sign: str = "=") -> None:
        self.sign, self.alphabet = sign, "=:;"  # of either sign, so that tokenizers agree

    def prompt(self, problem: str) -> str:
        return f"{problem}{self.sign}"

    def completion(self, chain: str, answer: str, layout: str) -> str:
        return answer

    def parse(self, text: str, layout: str) -> Parsed:
        return Parsed("", text or None)


def make_data(task: AbstractTask | None = None, **changes: Any) -> TraceData:
    """Eight problems, all in one step; prompts of two to six tokens."""
    options = {
        "num_train": 8, "num_val": 2, "num_test": 0, "num_prompts": 8, "max_tokens": 24, "trace_format": "answer_only",
        "template": Bare(), **changes,
    }  # fmt: skip
    return TraceData(task=task or Even(), **options)


def make_network(data: TraceData, seed: int = 0, **changes: Any) -> nn.Module:
    facts = {**data.facts(), **{key: changes.pop(key) for key in ("vocab_size",) if key in changes}}
    torch.manual_seed(FIRST_SEED + seed)
    return build_network({**SIZES, **changes}, **facts).double()


def make_teacher(data: TraceData, network: nn.Module | None = None, **options: Any) -> FrozenTeacher:
    network = make_network(data, seed=1) if network is None else network
    return FrozenTeacher(LoadedNetwork(network, None, data.facts()["vocab_size"], "teacher"), **options)


def make_training(data: TraceData, student: nn.Module | None = None, lr: float = 1.0, **changes: Any) -> Training:
    """Plain gradient descent at rate 1 unless changed: a step shows its gradient."""
    student = make_network(data) if student is None else student
    optimizer = changes.get("optimizer", partial(torch.optim.SGD, lr=lr))
    return Training(student, optimizer, changes.get("scheduler"), describe(SIZES, **data.facts()))


def make_on_policy(
    data: TraceData,
    teacher: FrozenTeacher | None = None,
    student: nn.Module | None = None,
    lr: float = 1.0,
    **options: Any,
) -> OnPolicy:
    teacher = make_teacher(data) if teacher is None else teacher
    return OnPolicy(make_training(data, student, lr), teacher, **{"max_new_tokens": 8, **options})


def make_policy_gradient(
    data: TraceData, student: nn.Module | None = None, lr: float = 1.0, **options: Any
) -> PolicyGradient:
    return PolicyGradient(make_training(data, student, lr), **{"max_new_tokens": 8, "num_samples": 4, **options})


def make_trainer(**options: Any) -> L.Trainer:
    plain: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    return L.Trainer(**{**QUIET, "max_steps": 1, **plain, **options})


def fit(method: AbstractMethod, data: TraceData, parts: int = 1, **options: Any) -> L.Trainer:
    trainer = make_trainer(accumulate_grad_batches=parts, **options)
    trainer.fit(method, datamodule=data)
    return trainer


def step_of(method: AbstractMethod, data: TraceData, parts: int = 1, **options: Any) -> list[Tensor]:
    """The gradient of one optimizer step, read off gradient descent with rate 1."""
    before = [parameter.detach().clone() for parameter in method.student.parameters()]
    trainer = fit(method, data, parts, **options)
    assert trainer.global_step == 1
    return [old - new.detach() for old, new in zip(before, method.student.parameters(), strict=True)]


def counted_once(flops_by_length: Callable[..., Callable[[int], float]]) -> Callable[..., Callable[[int], float]]:
    """The same, with one count for all networks of equal shapes."""
    known: dict[Any, Callable[[int], float]] = {}

    def counted(network: nn.Module, inputs: tuple[Tensor, ...], *, backward: bool) -> Callable[[int], float]:
        key = (tuple(parameter.shape for parameter in network.parameters()), backward)
        if key not in known:
            known[key] = flops_by_length(network, inputs, backward=backward)
        return known[key]

    return counted


class Watch(L.Callback):
    """What is logged after every step, the losses of all its micro-batches, and its rollouts."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.rollouts: list[dict[int, list[Completion]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"].detach()))
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.rollouts.append(rollouts_of(pl_module))


def rollouts_of(method: Any) -> dict[int, list[Completion]]:
    """Index of the problem -> its completions, of the block that was drawn last."""
    drawn = method._own_words.state_dict()["rollouts"]["drawn"]
    return {
        index: [Completion(**{**one, "ids": tuple(one["ids"]), "logprobs": tuple(one["logprobs"])}) for one in rows]
        for index, rows in drawn.items()
    }


def logits_after(network: Any, prompt: Sequence[int], completion: Sequence[int], vocab_size: int) -> Tensor:
    """Logits [T, V] of every completion token, from one unpadded row without any mask or label of ours."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = network.model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1, :vocab_size]


def gradient_of(loss: Tensor, network: nn.Module) -> list[Tensor]:
    loss.backward()
    return [parameter.grad for parameter in network.parameters()]


def assert_same(given: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-5) -> None:
    scale = max(float(part.abs().max()) for part in expected)
    assert scale > 1e-4
    for left, right in zip(given, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=rtol, atol=rtol * scale)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def rows_of(method: Any, data: Any) -> list[Row]:
    """What the method drew in its last block, from the checkpoint's own record of it."""
    prompts = {row.problem.index: row for row in data.prompts()}
    return [
        (prompts[index].ids, prompts[index].teacher_ids, one.ids, one.logprobs)
        for index, drawn in rollouts_of(method).items()
        for one in drawn
    ]


def stored_of(data: Any) -> list[Row]:
    return [
        (row.ids[: row.prompt_length], row.teacher_prompt_ids, row.ids[row.prompt_length :], ())
        for row in data.stored_rows()
    ]


def is_right(one: Completion) -> bool:
    """What Even calls right."""
    return one.stop == "eos" and one.text != "" and len(one.text) % 2 == 0


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def loop(
    data: Any, rows: Sequence[Row], formula: Callable[[Tensor, Tensor], Tensor], *,
    temperature: float = 1.0, reduction: str = "token", fixed_length: int = 1, student: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradient of ``T^2 formula`` at every completion token, one document at a time; the teacher is in float32."""
    student = student or make_network(data)
    teacher = teacher or make_network(data, seed=1)
    size, values = data.codec.vocab_size, []
    for prompt, teacher_prompt, completion, _ in rows:
        q = (logits_after(student, prompt, completion, size) / temperature).log_softmax(-1)
        raw = logits_after(teacher, teacher_prompt, completion, size).float().double().detach()
        values.append(temperature**2 * formula((raw / temperature).log_softmax(-1), q))
    total = torch.cat(values).sum()
    tokens = sum(len(row[2]) for row in rows)
    loss = {
        "token": total / tokens,
        "sequence": torch.stack([value.mean() for value in values]).mean(),
        "fixed": total / (len(rows) * fixed_length),
    }[reduction]
    return gradient_of(loss, student)
