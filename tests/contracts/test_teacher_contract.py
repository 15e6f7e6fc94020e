"""What every teacher promises, tested on each way of having one: they differ in their signal, never in their use."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import nn

from research.data.digits import Digits
from research.methods.base import Training
from research.methods.soft_target import SoftTarget
from research.methods.supervised import Supervised
from research.models.build import build_network, describe
from research.models.weights import save_network
from research.records import ClassBatch, DenseLogits, TeacherSignal, TokenBatch, TopKLogprobs
from research.teachers.base import AbstractTeacher
from research.teachers.cache import CachedTeacher, CacheFingerprint, CacheWriter
from research.teachers.load import cached, ensemble, frozen
from research.teachers.served import ServedTeacher
from research.teachers.top_k import keep_top_k
from research.teachers.transforms import PermutedWrongClasses, VirtualTeacher
from research.text.document import Document, collate

pytestmark = pytest.mark.filterwarnings("ignore")
FACTS: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
MLP = {"_target_": "research.models.classifiers.Mlp", "hidden": [12], "dropout": 0.5}
MLP_FLOPS = 2 * (64 * 12 + 12 * 10)


def make_network(seed: int) -> nn.Module:
    """Random weights large enough for distributions that are far from uniform; dropout, to be seen in train mode."""
    torch.manual_seed(seed)
    network = build_network(MLP, **FACTS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    return network


class Shelf:
    """Every kind of teacher on disk, once, made from the networks of two seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed in (1, 2, 3):
            save_network(self.run(seed) / "student", make_network(seed), describe(MLP, **FACTS))
            (self.run(seed) / "run.json").write_text('{"ledger": {"student_update": {"flops": 7.0}}}')
            if seed < 3:
                self._checkpoint(seed)
                self._hugging_face(seed)
                for dtype, top_k in (("float32", None), ("float16", None), ("bfloat16", None), ("float32", 3)):
                    self._cache(seed, dtype, top_k)

    def run(self, seed: int) -> Path:
        return self.folder / f"run{seed}"

    def path(self, seed: int, kind: str) -> str:
        return str(self.folder / f"{kind}{seed}")

    def _checkpoint(self, seed: int) -> None:
        training = Training(make_network(seed), partial(torch.optim.SGD, lr=0.0), None, describe(MLP, **FACTS))
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        options: dict[str, Any] = {**quiet, "enable_checkpointing": False, "num_sanity_val_steps": 0}
        trainer = L.Trainer(accelerator="cpu", max_steps=1, **options)
        trainer.fit(Supervised(training), datamodule=Digits(num_train=8, holdout=0))
        trainer.save_checkpoint(self.path(seed, "ckpt") + ".ckpt")

    def _hugging_face(self, seed: int) -> None:
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.5, initializer_range=0.5,
        )  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained(self.path(seed, "vit"))

    def _cache(self, seed: int, dtype: str, top_k: int | None) -> None:
        data, teacher = Digits(holdout=0), frozen(str(self.run(seed)), **FACTS)
        mark = CacheFingerprint(
            teacher_sha256=teacher.identity.sha256,
            teacher_details=teacher.identity.details,
            data_sha256=data.source_fingerprint("train"),
            view="identity",
            num_classes=10,
            top_k=top_k,
            dtype=dtype,
        )
        writer = CacheWriter(Path(self.path(seed, f"cache-{dtype}-{top_k}-")), mark, rows=1437, shard_rows=500)
        list(writer.write(teacher, data, "train"))


Make = Callable[[Shelf, int], AbstractTeacher]


def _ensemble(mean: str, streamed: bool) -> Make:
    def make(shelf: Shelf, seed: int) -> AbstractTeacher:
        return ensemble([str(shelf.run(seed)), str(shelf.run(3))], mean=mean, streamed=streamed, **FACTS)

    return make


def _cached(dtype: str, top_k: int | None) -> Make:
    return lambda shelf, seed: cached(shelf.path(seed, f"cache-{dtype}-{top_k}-"), **FACTS)


def _transformed(change: Callable[[AbstractTeacher, int], AbstractTeacher]) -> Make:
    return lambda shelf, seed: change(frozen(str(shelf.run(seed)), **FACTS), seed)


TEACHERS: dict[str, Make] = {
    "frozen_run": lambda shelf, seed: frozen(str(shelf.run(seed)), **FACTS),
    "frozen_student_folder": lambda shelf, seed: frozen(str(shelf.run(seed) / "student"), **FACTS),
    "frozen_checkpoint": lambda shelf, seed: frozen(shelf.path(seed, "ckpt") + ".ckpt", **FACTS),
    "frozen_hugging_face": lambda shelf, seed: frozen(shelf.path(seed, "vit"), **FACTS),
    "ensemble_arithmetic_streamed": _ensemble("arithmetic", True),
    "ensemble_arithmetic_kept": _ensemble("arithmetic", False),
    "ensemble_geometric_streamed": _ensemble("geometric", True),
    "ensemble_geometric_kept": _ensemble("geometric", False),
    "cached_float32": _cached("float32", None),
    "cached_float16": _cached("float16", None),
    "cached_bfloat16": _cached("bfloat16", None),
    "cached_top_3": _cached("float32", 3),
    "permuted_per_example": _transformed(lambda teacher, _: PermutedWrongClasses(teacher)),
    "permuted_fixed": _transformed(lambda teacher, _: PermutedWrongClasses(teacher, scope="fixed")),
    "virtual_matched": _transformed(lambda teacher, _: VirtualTeacher(teacher, temperature=4.0)),
    "virtual_given": _transformed(lambda teacher, seed: VirtualTeacher(teacher, true_class_probability=1 - 0.1 * seed)),
}
SAME_NETWORK = ("frozen_run", "frozen_student_folder", "frozen_checkpoint", "cached_float32")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("teachers"))


@pytest.fixture(scope="module")
def data() -> Digits:
    made = Digits(batch_size=8, num_train=40, holdout=20, seed=5)
    made.setup()
    return made


@pytest.fixture(params=TEACHERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def teacher(kind: str, shelf: Shelf, data: Digits) -> AbstractTeacher:
    return made(kind, shelf, data)


def made(kind: str, shelf: Shelf, data: Digits, seed: int = 1) -> AbstractTeacher:
    """A teacher as a method has it: moved to its device, then connected to the data."""
    teacher = TEACHERS[kind](shelf, seed)
    assert teacher.to("cpu") is teacher
    teacher.connect(data)
    return teacher


def batches(data: Digits) -> Iterator[ClassBatch]:
    return iter(data.train_dataloader())


def logprobs(signal: TeacherSignal) -> torch.Tensor:
    """All that a signal says, as logprobs that sum to one: classes, or kept classes and the tail."""
    if isinstance(signal, DenseLogits):
        return signal.logits_NV.double().log_softmax(-1)
    return torch.cat([signal.logprobs_NK, signal.tail_logprob_N[:, None]], dim=-1).double()


def test_shape_dtype_and_mass(teacher: AbstractTeacher, kind: str, data: Digits) -> None:
    batch = next(batches(data))
    signal = teacher.signal(batch)
    assert teacher.num_classes == signal.num_classes == 10
    if isinstance(signal, TopKLogprobs):
        assert signal.ids_NK.shape == signal.logprobs_NK.shape == (8, 3) and signal.tail_logprob_N.shape == (8,)
        assert signal.ids_NK.dtype == torch.int64
        assert bool((signal.logprobs_NK.diff(dim=-1) <= 0).all())
    else:
        assert signal.logits_NV.shape == (8, 10) and signal.logits_NV.dtype == torch.float32
    told = logprobs(signal)
    assert told.device == batch.inputs.device and bool(told.isfinite().all())
    torch.testing.assert_close(told.exp().sum(-1), torch.ones(8, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(told.exp().std(dim=-1).mean()) > 0.05  # far from uniform: it says something


def test_p53_no_gradient_and_the_same_twice(teacher: AbstractTeacher, data: Digits) -> None:
    batch = next(batches(data))
    with torch.enable_grad():
        first, again = logprobs(teacher.signal(batch)), logprobs(teacher.signal(batch))
    assert torch.equal(first, again)  # dropout of .5 in every live network: eval mode, or this differs
    assert not first.requires_grad


def test_draws_no_random_numbers(teacher: AbstractTeacher, data: Digits) -> None:
    batch = next(batches(data))
    before = torch.get_rng_state()
    teacher.signal(batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_student_s_precision_does_not_reach_the_teacher(teacher: AbstractTeacher, data: Digits) -> None:
    batch = next(batches(data))
    plain = logprobs(teacher.signal(batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logprobs(teacher.signal(batch)), plain)


def test_p26_a_row_s_signal_follows_the_row(teacher: AbstractTeacher, data: Digits) -> None:
    """Neither its place in a batch nor its company changes what is said about a row."""
    whole: dict[int, torch.Tensor] = {}
    for batch in batches(data):
        whole |= dict(zip(batch.index_B.tolist(), logprobs(teacher.signal(batch)), strict=True))
    for batch in Digits(batch_size=13, num_train=40, holdout=20, seed=6).train_dataloader():
        for index, row in zip(batch.index_B, logprobs(teacher.signal(batch)), strict=True):
            torch.testing.assert_close(row, whole.pop(int(index)), atol=1e-6, rtol=0)
    assert not whole


def test_identity_is_plain_and_repeatable(teacher: AbstractTeacher, kind: str, shelf: Shelf, data: Digits) -> None:
    mark = teacher.identity
    assert mark == made(kind, shelf, data).identity
    assert mark.sha256 != made(kind, shelf, data, seed=2).identity.sha256
    assert len(mark.sha256) == 64 and int(mark.sha256, 16) >= 0
    assert mark.source and mark.kind == kind.split("_")[0].replace("permuted", "frozen").replace("virtual", "frozen")
    assert json.loads(json.dumps(mark.details)) == mark.details
    assert ("transform" in mark.details) == kind.startswith(("permuted", "virtual"))


def test_identities_of_different_signals_differ(shelf: Shelf, data: Digits) -> None:
    marks = {
        kind: json.dumps([teacher.identity.sha256, teacher.identity.details], sort_keys=True)
        for kind in TEACHERS
        for teacher in [made(kind, shelf, data)]
    }
    live = {kind: mark for kind, mark in marks.items() if kind not in SAME_NETWORK and not kind.endswith("_kept")}
    assert len(set(live.values())) == len(live)
    assert len({marks[kind] for kind in SAME_NETWORK[:3]}) == 1


def test_the_same_network_says_the_same_wherever_it_lies(shelf: Shelf, data: Digits) -> None:
    batch = next(batches(data))
    network = make_network(1).eval()
    with torch.no_grad():
        expected = network(batch.inputs)
    for kind in SAME_NETWORK:
        torch.testing.assert_close(made(kind, shelf, data).signal(batch).logits_NV, expected, atol=1e-6, rtol=0)
    for dtype in (torch.float16, torch.bfloat16):
        signal = made(f"cached_{str(dtype).removeprefix('torch.')}", shelf, data).signal(batch)
        torch.testing.assert_close(signal.logits_NV, expected, atol=0, rtol=torch.finfo(dtype).eps)


def test_flops_count_what_is_computed(teacher: AbstractTeacher, kind: str) -> None:
    if kind.startswith(("cached", "virtual")):
        assert teacher.flops_per_row() == 0
    elif kind == "frozen_hugging_face":
        assert teacher.flops_per_row() > 0
    else:
        assert teacher.flops_per_row() == MLP_FLOPS * (2 if kind.startswith("ensemble") else 1)


def test_training_flops_come_from_the_run_s_record(teacher: AbstractTeacher, kind: str) -> None:
    members = 2 if kind.startswith("ensemble") else 1
    known = kind not in ("frozen_checkpoint", "frozen_hugging_face")
    assert teacher.identity.training_flops == (7.0 * members if known else None)


def one_step(teacher: AbstractTeacher, data: Digits) -> tuple[float, torch.Tensor]:
    """The soft-target loss of one batch, and its gradient in the student's weights."""
    torch.manual_seed(9)
    student = build_network({**MLP, "dropout": 0.0}, **FACTS)
    training = Training(student, partial(torch.optim.SGD, lr=0.1), None, {})
    method = SoftTarget(training, teacher, temperature=2.0, soft_weight=1.0)
    (component,) = method.components(next(batches(data)))
    component.loss.mean().backward()
    return float(component.loss.mean()), torch.cat([p.grad.flatten() for p in student.parameters()])


def test_p27_every_teacher_teaches_and_another_one_teaches_something_else(
    teacher: AbstractTeacher, kind: str, shelf: Shelf, data: Digits
) -> None:
    loss, gradient = one_step(teacher, data)
    other_loss, other_gradient = one_step(made(kind, shelf, data, seed=2), data)
    assert loss > 0 and float(gradient.norm()) > 0
    assert abs(loss - other_loss) > 1e-3
    assert float((gradient - other_gradient).norm()) > 1e-2 * float(gradient.norm())


def test_no_teacher_is_a_module(teacher: AbstractTeacher) -> None:
    assert not isinstance(teacher, nn.Module)
    assert [base.__name__ for base in type(teacher).__bases__] == ["AbstractTeacher"]  # final: nothing below it


def test_p26_a_cache_refuses_a_view_and_the_others_do_not(teacher: AbstractTeacher, kind: str) -> None:
    jittered = Digits(num_train=8, holdout=0, shift_pixels=1)
    if isinstance(teacher, CachedTeacher):
        with pytest.raises(ValueError, match=r"view: cache has 'identity', needed 'pixel_shift\(1\)'"):
            teacher.connect(jittered)
    else:
        teacher.connect(jittered)
        teacher.signal(next(batches(jittered)))


# -- teachers of text -------------------------------------------------------------------------------------------------

TEXT_FACTS: dict[str, Any] = {"vocab_size": 20, "eos_token_id": 1, "pad_token_id": 0, "tokenizer_sha256": None}
LANGUAGE = {
    "_target_": "research.models.language.LanguageModel",
    "architecture": "llama",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "initializer_range": 0.5,
}
TOP_K = 5
MakeText = Callable[[str, str], AbstractTeacher]
TEXT_TEACHERS: dict[str, MakeText] = {
    "frozen": lambda path, url: frozen(path, **TEXT_FACTS),
    "ensemble": lambda path, url: ensemble([path], **TEXT_FACTS),
    "served_vllm": lambda path, url: ServedTeacher(url, "tiny", top_k=TOP_K, protocol="vllm", **TEXT_FACTS),
    "served_sglang": lambda path, url: ServedTeacher(url, "tiny", top_k=TOP_K, protocol="sglang", **TEXT_FACTS),
}


@pytest.fixture(scope="module")
def text_sources(logprob_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[str, str]]]:
    """The same two networks, in a folder each and behind a server each: seed -> (folder, address)."""
    made = {}
    with ExitStack() as stack:
        for seed in (1, 2):
            torch.manual_seed(seed)
            network, folder = build_network(LANGUAGE, **TEXT_FACTS), tmp_path_factory.mktemp("text")
            save_network(folder, network, describe(LANGUAGE, **TEXT_FACTS))
            server = stack.enter_context(logprob_server.serving(partial(logits_of, network.eval())))
            server.card["root"] = str(seed)
            made[seed] = (str(folder), server.base_url)
        yield made


def logits_of(network: nn.Module, ids: list[int]) -> torch.Tensor:
    ids_BT = torch.tensor([ids])
    return network(ids_BT, torch.arange(len(ids))[None], torch.ones_like(ids_BT))[0]


@pytest.fixture(params=TEXT_TEACHERS)
def text_kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_batch(packed_to: int | None = None, order: int = 1) -> TokenBatch:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 20, (length,), generator=draw).tolist() for length in (4, 7, 5, 9)]
    documents = [Document(tuple(row), 2, index) for index, row in enumerate(rows)]
    return collate(documents[::order], prompt_loss_weight=0.0, pad_id=0, packed_to=packed_to)


def told(teacher: AbstractTeacher, batch: TokenBatch, places_alone: bool = False) -> torch.Tensor:
    """Logprobs at the places of the completions: the likeliest five and the rest."""
    place_BT = batch.completion_BT
    signal = teacher.signal_at(batch, place_BT) if places_alone else teacher.signal(batch).at(place_BT)
    cut = keep_top_k(signal, TOP_K) if isinstance(signal, DenseLogits) else signal
    assert isinstance(cut, TopKLogprobs) and cut.num_classes == teacher.num_classes == 20
    return torch.cat([cut.ids_NK.double(), cut.logprobs_NK.double(), cut.tail_logprob_N[:, None].double()], dim=-1)


def test_teachers_of_text_say_the_same_of_one_network(text_kind: str, text_sources: dict[int, tuple[str, str]]) -> None:
    """Whatever row a place stands in; twice the same; without gradient or random numbers; unmoved by autocast."""
    teacher, batch = TEXT_TEACHERS[text_kind](*text_sources[1]), text_batch()
    before, reference = torch.get_rng_state(), told(TEXT_TEACHERS["frozen"](*text_sources[1]), batch)
    with torch.enable_grad():
        first = told(teacher, batch)
    torch.testing.assert_close(first, reference, atol=1e-4, rtol=0)
    assert not first.requires_grad and torch.equal(told(teacher, batch), first)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(told(teacher, batch), first)
        at_places = told(teacher, batch, places_alone=True)
    torch.testing.assert_close(at_places, first, atol=1e-6, rtol=0)
    assert not at_places.requires_grad and torch.equal(torch.get_rng_state(), before)
    by_length = [
        rows.sort(dim=0).values.sum() for rows in (told(teacher, text_batch(20)), told(teacher, text_batch(order=-1)))
    ]
    torch.testing.assert_close(torch.stack(by_length), first.sum().expand(2), atol=1e-3, rtol=0)


def test_a_teacher_of_text_says_how_long_a_document_may_be(
    text_kind: str, text_sources: dict[int, tuple[str, str]]
) -> None:
    """The model's positions; of a server what its card says, less the one token that it writes."""
    teacher = TEXT_TEACHERS[text_kind](*text_sources[1])
    assert teacher.max_positions == (511 if text_kind.startswith("served") else 512)


def test_another_teacher_of_text_says_something_else_and_is_somebody_else(
    text_kind: str, text_sources: dict[int, tuple[str, str]]
) -> None:
    one, two = (TEXT_TEACHERS[text_kind](*text_sources[seed]) for seed in (1, 2))
    assert float((told(one, text_batch()) - told(two, text_batch())).abs().max()) > 0.1
    mark = one.identity
    assert mark == TEXT_TEACHERS[text_kind](*text_sources[1]).identity and mark.sha256 != two.identity.sha256
    assert mark.kind == text_kind.split("_")[0] and len(mark.sha256) == 64
    assert json.loads(json.dumps(mark.details)) == mark.details
    assert not isinstance(one, nn.Module) and type(one).__bases__ == (AbstractTeacher,)
    assert one.to("cpu") is one and (one.flops_of(text_batch()) > 0) == (mark.kind != "served")
