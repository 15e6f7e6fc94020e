"""The preflight against teachers that are wrong in one way each."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from research.data.traces import TraceData
from research.data.train_traces import reference_trace
from research.evaluation.preflight import Preflight, preflight
from research.evaluation.preflight_distributions import Pair, agreement
from research.evaluation.preflight_text import thinking_mode
from research.models.build import build_network, describe
from research.models.weights import save_network, save_tokenizer
from research.records import DenseLogits, HiddenProjection, TeacherSignal, TokenBatch
from research.tasks.arithmetic import ChainedSums
from research.teachers.base import AbstractTeacher, TeacherIdentity
from research.teachers.load import frozen
from research.teachers.served import ServedTeacher
from research.teachers.top_k import keep_top_k
from research.text.document import Document
from research.text.templates import Plain, Think
from research.text.tokenizer import build_tokenizer

LANGUAGE: dict[str, Any] = {
    "_target_": "research.models.language.LanguageModel",
    "architecture": "llama",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
}
TASK = ChainedSums(num_terms=3, highest=6)


def make_data(**changes: Any) -> TraceData:
    options: dict[str, Any] = {"num_train": 250, "num_val": 24, "num_test": 4, "max_tokens": 40, "batch_size": 50}
    return TraceData(**{"task": TASK, "template": Plain(), **options, **changes})


@pytest.fixture(scope="module")
def data() -> TraceData:
    made = make_data()
    made.setup()
    return made


def make_network(data: TraceData, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(LANGUAGE, **data.facts())


@pytest.fixture(scope="module")
def skilled(data: TraceData) -> nn.Module:
    """A network that solves some of the problems: trained for a few seconds."""
    network, documents = make_network(data, seed=1), data.loader("train", batch_size=50)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    for _ in range(16):
        for batch in documents:
            logits_NV = network(*batch.network_inputs())[batch.completion_BT]
            loss = nn.functional.cross_entropy(logits_NV, batch.label_BT[batch.completion_BT])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


@pytest.fixture(scope="module")
def teacher_run(data: TraceData, skilled: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run of the skilled network would have left."""
    return run_folder(tmp_path_factory.mktemp("teacher"), skilled, data)


def run_folder(folder: Path, network: nn.Module, data: TraceData, config: dict[str, Any] | None = None) -> Path:
    save_network(folder / "student", network, describe(LANGUAGE, **data.facts()))
    save_tokenizer(folder / "student", data.codec.tokenizer)
    told = {"template": {"_target_": "research.text.templates.Plain"}, "data": {"trace_format": "chain_then_answer"}}
    (folder / "run.json").write_text(json.dumps({"config": {**told, **(config or {})}}))
    return folder


def found(report: Preflight) -> dict[str, tuple[str, str]]:
    assert len({finding.name for finding in report.findings}) == len(report.findings)
    return {finding.name: (finding.level, finding.told) for finding in report.findings}


def test_a_teacher_that_fits_and_knows_more(data: TraceData, teacher_run: Path) -> None:
    report = preflight(make_network(data), frozen(str(teacher_run), **data.facts()), data, num_problems=24)
    levels = {name: level for name, (level, _) in found(report).items()}
    assert levels == {
        "tokens": "ok", "vocabulary": "ok", "eos": "ok", "template": "ok", "thinking": "ok", "overlap": "warning",
        "gain": "ok", "stopping": "ok",
    }  # fmt: skip
    assert report.level == "warning" and report.of_level("warning")[0].name == "overlap"
    assert "train on its traces first" in found(report)["overlap"][1]
    learning = preflight(
        make_network(data), frozen(str(teacher_run), **data.facts()), data, num_problems=24, on_policy=False
    )
    level, told = found(learning)["overlap"]
    assert (learning.level, level) == ("ok", "ok") and "on-policy" not in told and learning.figures == report.figures
    figures = report.figures
    assert figures["accuracy_student"] == 0.0 and figures["accuracy_teacher"] > 0.2
    assert figures["reference/teacher_nll"] < 0.5 < 2.0 < figures["reference/student_nll"]
    assert figures["reference/eos_probability"] > 0.9
    text = data.problems("val")[0].text
    assert report.prompts == {"student": f"{text}=", "teacher": f"{text}="}
    printed = "\n".join(report.lines())
    assert "of 24 problems; the teacher" in printed and "-- the teacher's prompt" in printed
    assert json.loads(json.dumps(report.plain()))["level"] == "warning"


def test_a_teacher_weaker_than_the_student_is_warned_of_with_figures(
    data: TraceData, skilled: nn.Module, tmp_path: Path
) -> None:
    weak = frozen(str(run_folder(tmp_path, make_network(data, seed=4), data)), **data.facts())
    level, told = found(preflight(skilled, weak, data, num_problems=24))["gain"]
    assert level == "warning"
    right = round(24 * preflight(skilled, weak, data, num_problems=24).figures["accuracy_student"])
    assert right > 0 and f"the teacher is weaker: the student solves {right} of 24 problems; the teacher 0;" in told


def test_the_same_network_overlaps_wholly_and_gains_nothing(
    data: TraceData, skilled: nn.Module, teacher_run: Path
) -> None:
    report = preflight(skilled, frozen(str(teacher_run), **data.facts()), data)
    assert report.level == "ok"
    for where in ("reference", "student"):
        assert report.figures[f"{where}/teacher_top_in_student_top_k"] == 1.0
        assert report.figures[f"{where}/teacher_share"] == pytest.approx(1.0)
        assert report.figures[f"{where}/teacher_mass"] == pytest.approx(
            report.figures[f"{where}/student_mass"], abs=1e-5
        )
        assert report.figures[f"{where}/student_nll"] == pytest.approx(report.figures[f"{where}/teacher_nll"], abs=1e-5)
    assert report.figures["accuracy_student"] == report.figures["accuracy_teacher"]


# -- what is refused --------------------------------------------------------------------------------------------------


def unmarked(folder: Path) -> Path:
    """A run folder whose architecture does not say which tokenizer it was made for."""
    path = folder / "student" / "architecture.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "tokenizer_sha256": None}))
    return folder


def test_p18_the_same_number_of_tokens_with_permuted_ids_is_refused(
    data: TraceData, skilled: nn.Module, tmp_path: Path
) -> None:
    folder = unmarked(run_folder(tmp_path, skilled, data))
    alphabet = sorted(set(data.codec.tokenizer.get_vocab()) - {"<pad>", "<eos>"})
    other = build_tokenizer("characters", alphabet="".join(alphabet[:-1]) + "z")
    assert len(other) == len(data.codec.tokenizer)
    save_tokenizer(folder / "student", other)
    report = preflight(make_network(data), frozen(str(folder), **data.facts()), data)
    level, told = found(report)["tokens"]
    assert level == report.level == "refusal" and "ids mean other text to the teacher" in told
    assert report.figures == {}, "nothing is measured on tokens that mean nothing"


def test_tokenizers_that_differ_in_their_rules_alone_share_their_ids(
    data: TraceData, skilled: nn.Module, tmp_path: Path
) -> None:
    folder = run_folder(tmp_path, skilled, data)
    path = folder / "student" / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(rules))
    level, told = found(preflight(make_network(data), frozen(str(folder), **data.facts()), data))["tokens"]
    assert level == "ok" and "every id of the data means the same" in told


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_another_end_of_text_is_refused(name: str, data: TraceData, skilled: nn.Module, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, skilled, data)
    (folder / "student" / "generation_config.json").unlink()
    path = folder / "student" / name
    told = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**told, "eos_token_id": [5, 6]}))
    level, told = found(preflight(make_network(data), frozen(str(folder), **data.facts()), data))["eos"]
    assert level == "refusal" and "end in '<eos>' (1), the teacher stops at" in told and "(5)" in told
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [5, 1]}))
    assert found(preflight(make_network(data), frozen(str(folder), **data.facts()), data))["eos"][0] == "ok"


class Other(AbstractTeacher):
    """A teacher of any width that says the same everywhere, or fails."""

    def __init__(self, width: int, error: Exception | None = None) -> None:
        self.num_classes, self._error = width, error
        self.identity = TeacherIdentity("other", "0" * 64, "nowhere", {})

    def signal(self, batch: TokenBatch) -> TeacherSignal:
        if self._error is not None:
            raise self._error
        return DenseLogits(torch.zeros(*batch.ids_BT.shape, self.num_classes))


def test_p18_heads_of_other_widths_are_refused(data: TraceData) -> None:
    width = data.codec.vocab_size
    report = found(preflight(make_network(data), Other(width + 8), data))
    assert report["vocabulary"] == (
        "refusal",
        f"different numbers of tokens: the tokenizer {width}, the teacher {width + 8}, the student {width}; a "
        "divergence compares equal lists",
    )
    assert report["tokens"][0] == "skipped"


def test_p18_what_is_cut_from_a_padded_head_is_told(data: TraceData, skilled: nn.Module, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, skilled, data)
    path = folder / "student" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": data.codec.vocab_size + 136}))
    level, told = found(preflight(make_network(data), frozen(str(folder), **data.facts()), data))["vocabulary"]
    assert level == "ok" and "the teacher's head is padded by 136 rows" in told


def test_a_teacher_that_cannot_be_asked_is_refused_in_its_words(data: TraceData) -> None:
    for error in (ConnectionError("it is down"), ValueError("too long for me")):
        report = preflight(make_network(data), Other(data.codec.vocab_size, error), data)
        assert found(report)["teacher"] == ("refusal", str(error))


# -- what is warned of ------------------------------------------------------------------------------------------------


def test_p41_a_teacher_under_a_template_that_it_was_not_taught(
    data: TraceData, skilled: nn.Module, tmp_path: Path
) -> None:
    told = {"template": {"_target_": "research.text.templates.Alpaca"}}
    folder = run_folder(tmp_path, skilled, data, told)
    level, words = found(preflight(make_network(data), frozen(str(folder), **data.facts()), data))["template"]
    assert level == "warning" and "trained under the template Alpaca, it is asked under Plain" in words
    folder = run_folder(tmp_path, skilled, data, {"data": {"trace_format": "answer_only"}})
    level, words = found(preflight(make_network(data), frozen(str(folder), **data.facts()), data))["template"]
    assert level == "warning" and "trained on answer_only, the data are chain_then_answer" in words


def test_p41_each_side_is_asked_under_its_own_template(tmp_path: Path) -> None:
    """The same ids behind two prompts: what the teacher reads begins with its own."""
    letters = "".join(sorted({*Think.alphabet, *Plain.alphabet, *(TASK.alphabet or "")}))
    asked = make_data(template=Think(), teacher_template=Plain(), max_tokens=120)
    asked._tokenizer_kind = "characters"
    asked._build_tokenizer = lambda: build_tokenizer("characters", alphabet=letters)  # type: ignore[method-assign]
    seen: list[TokenBatch] = []

    class Listening(Other):
        def signal(self, batch: TokenBatch) -> TeacherSignal:
            seen.append(batch)
            return super().signal(batch)

    report = preflight(make_network(asked), Listening(asked.codec.vocab_size), asked, num_problems=3)
    text = asked.problems("val")[0].text
    assert report.prompts == {"student": Think().prompt(text), "teacher": f"{text}="}
    own = asked.codec.encode(reference_trace(asked.problems("val")[0]))
    its = [*asked.teacher_codec.prompt_ids(text), *own.completion_ids]
    assert seen[0].ids_BT[0, : len(its)].tolist() == its
    assert int(seen[0].completion_BT[0].sum()) == len(own.completion_ids)


def test_both_sides_are_asked_for_the_mode_and_compared_on_what_it_writes() -> None:
    """Without a chain where none is asked for; the prompts that are shown ask for it."""
    asked, seen = make_data(modes="two", mode="no_think"), []

    class Listening(Other):
        def signal(self, batch: TokenBatch) -> TeacherSignal:
            seen.append(batch)
            return super().signal(batch)

    report = preflight(make_network(asked), Listening(asked.codec.vocab_size), asked, num_problems=3)
    problem = asked.problems("val")[0]
    assert report.prompts == dict.fromkeys(("student", "teacher"), f"{problem.text}N=")
    length = int((seen[0].segment_BT[0] > 0).sum())
    assert asked.codec.tokenizer.decode(seen[0].ids_BT[0, : length - 1]) == f"{problem.text}N=#{problem.answer}"


@pytest.mark.parametrize(
    ("prompt", "mode"),
    [
        ("ask P\n", "leaves reasoning to the answer"),
        ("ask P\n<think>\n", "opens the reasoning"),
        ("ask P\n<think>\n\n</think>\n", "closes the reasoning"),
        ("write <think> first. P\n", "leaves reasoning to the answer"),
    ],
)
def test_thinking_mode_is_read_off_the_prompt(prompt: str, mode: str) -> None:
    assert thinking_mode(prompt, "P") == mode


def test_a_teacher_that_never_ends_is_warned_of(data: TraceData) -> None:
    class Endless(Other):
        def signal(self, batch: TokenBatch) -> TeacherSignal:
            logits = torch.zeros(*batch.ids_BT.shape, self.num_classes)
            logits[..., 1] = -20.0
            return DenseLogits(logits)

    level, told = found(preflight(make_network(data), Endless(data.codec.vocab_size), data))["stopping"]
    assert level == "warning" and "ends with probability 0.000" in told


# -- figures ----------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that are looked up by the token that stands there."""

    def __init__(self, table_VV: Tensor) -> None:
        super().__init__()
        self.table_VV = nn.Parameter(table_VV)

    def forward(self, ids_BT: Tensor, position_BT: Tensor, segment_BT: Tensor) -> Tensor:
        return self.table_VV[ids_BT]


class Told(AbstractTeacher):
    def __init__(self, make: Callable[[Tensor], TeacherSignal]) -> None:
        self._make = make

    def signal(self, batch: TokenBatch) -> TeacherSignal:
        return self._make(batch.ids_BT)


def test_figures_against_a_hand_count() -> None:
    """A vocabulary of eight and so two tokens compared; three places of one document, whose last token is the EOS."""
    student, teacher = torch.full((8, 8), -9.0), torch.full((8, 8), -9.0)
    student[2, [3, 4]], teacher[2, [3, 4]] = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0])  # both in common
    student[3, [4, 5]], teacher[3, [6, 4]] = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0])  # 4 in common
    student[4, [1, 7]], teacher[4, [5, 6]] = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0])  # none
    document = Document((2, 3, 4, 1), 1, 0)
    p, q = student[[2, 3, 4]].double().softmax(-1), teacher[[2, 3, 4]].double().softmax(-1)
    kinds: dict[str, Callable[[Tensor], TeacherSignal]] = {
        "dense": lambda ids_BT: DenseLogits(teacher[ids_BT]),
        "hidden": lambda ids_BT: HiddenProjection(torch.eye(8)[ids_BT], teacher.T.contiguous()),
        "sparse": lambda ids_BT: keep_top_k(DenseLogits(teacher[ids_BT]), 3),
    }
    for kind, make in kinds.items():
        found = agreement(
            Fixed(student), Told(make), [Pair(document, document)], pad_id=0, eos_ids=[1], device=torch.device("cpu")
        )
        assert (found.places, found.top_k) == (3, 2)
        assert found.teacher_top_in_student_top_k == pytest.approx(1 / 3)
        assert found.teacher_mass == pytest.approx(float(q[0, 3] + q[0, 4] + q[1, 4]) / 3)
        assert found.teacher_share == pytest.approx((1 + float(q[1, 4] / (q[1, 4] + q[1, 6]))) / 3)
        assert found.student_mass == pytest.approx(float(p[0, 3] + p[0, 4] + p[1, 4]) / 3)
        assert found.student_nll == pytest.approx(-float((p[0, 3] * p[1, 4] * p[2, 1]).log()) / 3)
        assert found.teacher_nll == pytest.approx(-float((q[0, 3] * q[1, 4] * q[2, 1]).log()) / 3, rel=1e-5), kind
        assert found.eos_probability == pytest.approx(float(q[2, 1]), rel=1e-4)


# -- at a distance ----------------------------------------------------------------------------------------------------


def test_a_served_teacher_is_looked_at_without_its_accuracy(
    data: TraceData, skilled: nn.Module, teacher_run: Path, logprob_server: Any
) -> None:
    network = frozen(str(teacher_run), **data.facts()).network

    def logits_of(ids: Any) -> Tensor:
        ids_BT = torch.tensor([ids])
        return network(ids_BT, torch.arange(len(ids))[None], torch.ones_like(ids_BT))[0]

    def spell(token: int) -> str:
        return data.codec.pieces([token])[0]

    local = preflight(make_network(data), frozen(str(teacher_run), **data.facts()), data, num_problems=6)
    with logprob_server.serving(logits_of, spell=spell) as server:
        quick: dict[str, Any] = {"backoff_s": 0.01, "max_wait_s": 0.1, "max_retries": 1}
        teacher = ServedTeacher(server.base_url, "tiny", top_k=12, **quick, **data.facts())
        report = preflight(make_network(data), teacher, data, num_problems=6)
        assert found(report)["tokens"][0] == "ok"
        assert "accuracy of a teacher of kind served is not known" in found(report)["gain"][1]
        assert "accuracy_teacher" not in report.figures and report.figures["accuracy_student"] == 0.0
        for name, value in report.figures.items():
            if not name.endswith("nll"):
                assert value == pytest.approx(local.figures[name], abs=1e-4), name
        assert report.figures["reference/teacher_nll"] == pytest.approx(
            local.figures["reference/teacher_nll"], abs=0.05
        )
        server.spell = lambda token: spell(token - 1 if token > 3 else token)
        level, told = found(preflight(make_network(data), teacher, data, num_problems=6))["tokens"]
        assert level == "refusal" and "ids mean other text to the teacher" in told
        server.spell = None
        assert found(preflight(make_network(data), teacher, data, num_problems=6))["tokens"][0] == "warning"
    report = preflight(make_network(data), teacher, data, num_problems=6)
    assert found(report)["teacher"][0] == report.level == "refusal"
    assert "the teacher tiny cannot be asked" in found(report)["teacher"][1]


# -- what it leaves behind --------------------------------------------------------------------------------------------


def test_student_and_random_numbers_are_left_as_they_were(data: TraceData, teacher_run: Path) -> None:
    student = make_network(data).train()
    student.get_submodule("model.model.layers.0").eval()
    modes = [part.training for part in student.modules()]
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teacher = frozen(str(teacher_run), **data.facts())
    before = torch.get_rng_state()
    preflight(student, teacher, data, num_problems=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in student.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())


def test_without_validation_problems_it_takes_those_of_train(teacher_run: Path) -> None:
    without = make_data(num_val=0)
    report = preflight(make_network(without), frozen(str(teacher_run), **without.facts()), without, num_problems=5)
    assert "of 5 problems" in found(report)["gain"][1] and not math.isnan(report.figures["reference/teacher_nll"])
