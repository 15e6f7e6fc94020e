"""Methods whose student's logits are made some places at a time: the same steps, all logits never written out."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from research.errors import ConfigError
from research.methods.base import Training
from research.methods.completion_places import teacher_logprobs
from research.methods.sft_trace import SftTrace
from research.methods.student_form import StudentForm
from research.models.build import describe
from research.records import DenseLogits, HiddenProjection
from research.teachers.top_k import keep_top_k, spread_tail

pytestmark = pytest.mark.filterwarnings("ignore")
Step = tuple[list[Tensor], dict[str, float]]  # its gradient, and what is logged
CHUNK_ROWS = 5


# -- the same step ----------------------------------------------------------------------------------------------------

REWARDED = {"reward_weight": 0.5, "num_samples": 4}
ON_POLICY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "divergence": ({"temperature": 1.5, "num_samples": 2}, {}),
    "divergence_and_reward": ({"divergence": "jsd", "teacher_mixture_weight": 0.3, **REWARDED}, {}),
    "sampled_token": ({"objective": "sampled_token", "sampling_temperature": 1.4, "credit": "sequence"}, {}),
    "sampled_token_clipped": ({"objective": "sampled_token", "clip_low": 0.1, "reduction": "sequence"}, {}),
    "reward_alone": ({"soft_weight": 0.0, **REWARDED}, {}),
    "total_variation": ({"divergence": "total_variation"}, {}),
    "top_k": ({"teacher_top_k": 3}, {}),
    "top_k_sampled_token": ({"objective": "sampled_token", "teacher_top_k": 3, "sampling_temperature": 1.4}, {}),
    "stored": ({"on_policy_fraction": 0.0, "hard_weight": 0.5}, {"num_stored": 8}),
}


def on_policy_step(
    words: Any, name: str, signal: str = "dense", **chunks: Any
) -> tuple[list[Tensor], dict[str, float]]:
    options, changes = ON_POLICY[name]
    data, watch = words.make_data(**changes), words.Watch()
    method = words.make_on_policy(data, words.make_teacher(data, signal=signal), **options, **chunks)
    return words.step_of(method, data, 2, log_every_n_steps=1, callbacks=[watch], logger=False), watch.logged[-1]


@pytest.mark.parametrize("name", ON_POLICY)
def test_p15_p52_on_policy_takes_the_same_step(words: Any, name: str) -> None:
    """Student and teacher are in float64 and float32; every log (entropy, sampler's KL, losses) is the same as well."""
    gradient, logged = on_policy_step(words, name)
    assert logged["train/loss"] != 0
    for signal in ("dense", "hidden"):
        ours, told = on_policy_step(words, name, signal, chunk_rows=CHUNK_ROWS)
        words.assert_same(ours, gradient, rtol=1e-5 if signal == "hidden" else 1e-9)  # the dense teacher is rounded
        assert told == pytest.approx(logged, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"reduction": "token", "kl_weight": 0.3, "sampling_temperature": 1.3}])
def test_p15_policy_gradient_takes_the_same_step(words: Any, options: dict[str, Any]) -> None:
    """Two steps on one set of rollouts: in the second the ratio and the distance to the start are not trivial."""
    ends, logged = [], []
    for chunks in ({}, {"chunk_rows": CHUNK_ROWS, "float32_head_gradient": True}):
        data, watch = words.make_data(steps_per_rollout=2), words.Watch()
        method = words.make_policy_gradient(data, lr=0.1, **options, **chunks)
        words.fit(method, data, 2, max_steps=2, log_every_n_steps=1, callbacks=[watch])
        ends.append(list(method.student.parameters()))
        logged.append(watch.logged)
    words.assert_same(ends[1], ends[0], rtol=1e-10)
    for ours, theirs in zip(*logged, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    assert logged[0][-1]["rollout/sampler_kl"] > 1e-5


def sft_method(words: Any, data: Any, signal: str | None, **options: Any) -> SftTrace:
    teacher = None if signal is None else words.make_teacher(data, signal=signal)
    training = Training(
        words.make_network(data), partial(torch.optim.SGD, lr=1.0), None, describe(words.SIZES, **data.facts())
    )
    return SftTrace(training, teacher, **options)


SFT: dict[str, dict[str, Any]] = {
    "hard": {},
    "sequence": {"reduction": "sequence"},
    "soft_and_hard": {"soft_weight": 2.0, "hard_weight": 0.5, "temperature": 1.5},
    "soft_alone": {"soft_weight": 1.0, "hard_weight": 0.0, "divergence": "reverse_kl"},
}


@pytest.mark.parametrize("name", SFT)
@pytest.mark.parametrize("packed_to", [None, 24])
def test_p15_sft_trace_takes_the_same_step(words: Any, name: str, packed_to: int | None) -> None:
    options = SFT[name]

    def step(signal: str | None, **chunks: Any) -> Step:
        own = {} if packed_to is None else {"packed_to": packed_to}
        data = words.make_data(num_prompts=0, batch_size=8, prompt_loss_weight=0.25, **own)
        method, watch = sft_method(words, data, signal, **options, **chunks), words.Watch()
        watch.on_train_batch_end = lambda trainer, *_: watch.logged.append(  # type: ignore[method-assign]
            {key: float(value) for key, value in trainer.logged_metrics.items()}
        )
        return words.step_of(method, data, 2, log_every_n_steps=1, callbacks=[watch], logger=False), watch.logged[-1]

    with_teacher = "soft_weight" in options
    gradient, logged = step("dense" if with_teacher else None)
    for signal in ("dense", "hidden") if with_teacher else (None,):
        ours, told = step(signal, chunk_rows=CHUNK_ROWS)
        words.assert_same(ours, gradient, rtol=1e-5 if signal == "hidden" else 1e-9)
        assert told == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("chunks", [{}, {"chunk_rows": CHUNK_ROWS}], ids=str)
@pytest.mark.parametrize("name", ["divergence", "sampled_token"])
def test_p60_mixed_precision_samples_the_policy_that_is_trained(words: Any, name: str, chunks: dict[str, Any]) -> None:
    """bf16 products in sampler, its check and the loss alike: the step is float32's to three digits."""
    data, found = words.make_data(), []
    for precision, own in (("32-true", {}), ("bf16-mixed", chunks)):
        student, teacher = (words.make_network(data, seed).float() for seed in (0, 1))
        method = words.make_on_policy(data, words.make_teacher(data, teacher), student, objective=name, **own)
        watch = words.Watch()
        step = words.step_of(method, data, 2, precision=precision, log_every_n_steps=1, callbacks=[watch])
        assert watch.logged[-1]["rollout/sampler_kl"] < 1e-6
        found.append(words.flat(step))
    assert float(torch.cosine_similarity(*found, dim=0)) > 0.99


@pytest.mark.slow  # the C++ compiler
def test_a_compiled_divergence_takes_the_same_step(words: Any) -> None:
    torch.compiler.reset()
    plain = on_policy_step(words, "divergence", "hidden", chunk_rows=8)
    compiled = on_policy_step(words, "divergence", "hidden", chunk_rows=8, compiled=True)
    words.assert_same(compiled[0], plain[0], rtol=1e-9)
    assert compiled[1] == pytest.approx(plain[1], rel=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


# -- what a step writes out and keeps ---------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The most rows of any floating-point tensor as wide as the vocabulary, and where the graph keeps any."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows, self.kept = width, 0, 0

    def rows_of(self, tensor: Tensor) -> int:
        wide = tensor.is_floating_point() and tensor.ndim > 1 and tensor.shape[-1] == self.width
        return tensor.numel() // self.width if wide and tensor.shape[-2] != SIZE else 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.rows = max(self.rows, self.rows_of(tensor))
        return out


SIZE = 12  # of hidden states: a head is [V, 12], its transpose [12, V]


@contextmanager
def watched(width: int) -> Iterator[Watch]:
    watch = Watch(width)

    def pack(tensor: Tensor) -> Tensor:
        watch.kept += watch.rows_of(tensor)
        return tensor

    with watch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield watch


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "divergence"},
        {"objective": "sampled_token"},
        {"objective": "sampled_token", "teacher_top_k": 3},
        {"objective": "divergence", "reward_weight": 1.0},
        {"soft_weight": 0.0, "reward_weight": 1.0},
        None,
    ],
    ids=str,
)
def test_p29_no_part_of_a_step_writes_out_all_logits(words: Any, options: dict[str, Any] | None) -> None:
    """Sampler's check, log-probabilities, entropy, loss and backward pass; sampling itself is a row a completion."""
    data, rows = words.make_data(), {}
    for chunk_rows in (None, CHUNK_ROWS):
        student, teacher = (words.make_network(data, seed, hidden_size=SIZE) for seed in (0, 1))
        signal = "hidden" if chunk_rows else "dense"
        given = {"num_samples": 4, "chunk_rows": chunk_rows, **(options or {})}
        if options is None:
            method = words.make_policy_gradient(data, student, kl_weight=0.1, **given)
        else:
            method = words.make_on_policy(data, words.make_teacher(data, teacher, signal=signal), student, **given)
        with watched(words.V) as watch:
            words.step_of(method, data, log_every_n_steps=1, logger=False)
        rows[chunk_rows] = watch.rows, watch.kept
        places = sum(len(one.ids) for drawn in words.rollouts_of(method).values() for one in drawn)
    sampled = 4 * 8
    assert places > 3 * sampled and rows[CHUNK_ROWS] == (sampled, 0)
    assert rows[None][0] >= places and rows[None][1] >= places, "the fault is seen"


# -- what the teacher says of single tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("kept", [1, 4, 9])
def test_p23_a_top_k_signal_spreads_its_tail_evenly_over_the_tokens_it_lacks(kept: int, temperature: float) -> None:
    logits_NV = 2 * torch.randn(30, 9, generator=torch.Generator().manual_seed(0)).double()
    label_N = torch.arange(30) % 9
    signal = keep_top_k(DenseLogits(logits_NV), kept)
    spread_NV = spread_tail(signal).double() / (temperature or 1.0)
    expected_N = spread_NV.log_softmax(-1).gather(-1, label_N[:, None]).squeeze(-1)
    with_watch = Watch(9)
    with with_watch:
        found_N = teacher_logprobs(signal, label_N, temperature)
    torch.testing.assert_close(found_N.double(), expected_N, atol=2e-6, rtol=0)
    assert kept == 9 or with_watch.rows == 0, "nothing is as wide as the vocabulary"


# -- which form, and what is refused ----------------------------------------------------------------------------------


def test_the_form_is_the_teacher_s_unless_chunks_are_asked_for(words: Any) -> None:
    data = words.make_data()
    network, flat = words.make_network(data), nn.Linear(2, 2)
    dense, hidden = (words.make_teacher(data, signal=signal) for signal in ("dense", "hidden"))
    assert not StudentForm(network).is_hidden and not StudentForm(network, dense).is_hidden
    assert StudentForm(network, hidden).is_hidden and not StudentForm(flat, hidden).is_hidden
    assert StudentForm(network, chunk_rows=1).is_hidden and StudentForm(network, dense, chunk_rows=1).is_hidden


def test_the_precision_of_logits_that_were_never_made_is_that_of_their_product(words: Any) -> None:
    """The sampler's check takes its bound from it: a norm's output may be wider than the product."""
    student = HiddenProjection(torch.zeros(3, 2), torch.zeros(5, 2))
    assert StudentForm.dtype_of(student) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert StudentForm.dtype_of(student) == torch.bfloat16
    assert StudentForm.dtype_of(torch.zeros(3, 5).double()) == torch.float64


BAD: list[tuple[dict[str, Any], str]] = [
    ({"chunk_rows": 0}, "method.chunk_rows is 0; expected at least 1 place, or null"),
    ({"compiled": True}, "method.compiled is true, and all logits are written out at once"),
    ({"float32_head_gradient": True}, "method.float32_head_gradient is true, and all logits"),
    ({"chunk_rows": 4, "compiled": True, "divergence": "total_variation"}, "total_variation has no part that can be"),
    (
        {"chunk_rows": 4, "compiled": True, "divergence": "jsd", "teacher_mixture_weight": 0.01},
        "jsd has no part that can be compiled",
    ),
    ({"chunk_rows": 4, "compiled": True, "objective": "sampled_token"}, "this method trains with none, leave it false"),
]


@pytest.mark.parametrize(("options", "told"), BAD, ids=[told for _, told in BAD])
def test_bad_options_are_refused_by_name(words: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        words.make_on_policy(words.make_data(), **options)


def test_compiled_belongs_to_a_divergence_that_is_trained_with(words: Any) -> None:
    data = words.make_data(num_stored=8)
    words.make_on_policy(data, chunk_rows=4, compiled=True, objective="sampled_token", on_policy_fraction=0.5)
    with pytest.raises(ConfigError, match="this method trains with none"):
        sft_method(words, data, None, chunk_rows=4, compiled=True)


def test_a_student_without_a_head_of_its_own_cannot_be_taken_in_chunks(words: Any) -> None:
    data = words.make_data()
    with pytest.raises(ConfigError, match=r"method.chunk_rows is 4, and the student is a Linear, which has no output"):
        words.make_policy_gradient(data, nn.Linear(2, 2), chunk_rows=4)


def test_chunk_options_with_whole_logits_are_refused_by_the_loss() -> None:
    from research.losses.soft_target import soft_target

    logits = torch.zeros(2, 3)
    for given in ({"chunk_rows": 2}, {"compiled": True}, {"float32_head_gradient": True}):
        with pytest.raises(ValueError, match="these are for a student given by hidden states and head"):
            soft_target(logits, DenseLogits(logits), **given)
    assert math.isclose(float(soft_target(logits, DenseLogits(logits)).total), 0.0)
