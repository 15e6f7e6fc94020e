"""Exposure: distances along each writer's own text, against a loop over single documents without padding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from research.data.traces import TraceData
from research.evaluation.exposure import measure_exposure
from research.generation.base import Prompt
from research.generation.in_process import LocalGenerator
from research.models.build import build_network
from research.records import Problem, Sampling
from research.tasks.arithmetic import ChainedSums
from research.tasks.grading import Grader
from research.text.templates import Plain

SIZES: dict[str, Any] = {
    "_target_": "research.models.language.LanguageModel", "architecture": "llama", "hidden_size": 16,
    "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "max_positions": 64, "initializer_range": 0.4,
}  # fmt: skip
LIMIT, SEED, NUM = 14, 5, 9


@pytest.fixture(scope="module")
def data() -> TraceData:
    return TraceData(
        task=ChainedSums(num_terms=3, highest=9), template=Plain(), num_train=20, num_val=2, num_test=NUM, max_tokens=40
    )


def network(data: TraceData, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_network(SIZES, **data.facts())


def measured(data: TraceData, student: nn.Module, teacher: nn.Module) -> Any:
    codec = data.codec
    grader = Grader(data.task, codec.template, codec.layout)
    problems = data.problems("test")
    return measure_exposure(
        student, teacher, codec, codec, grader, problems, max_new_tokens=LIMIT, seed=SEED, split="test"
    )


def written_by(writer: nn.Module, data: TraceData, problem: Problem) -> tuple[list[int], Any]:
    codec = data.codec
    generator = LocalGenerator(writer, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
    prompt = codec.prompt_ids(problem.text)
    asked = [Prompt(problem.index, problem.text, tuple(prompt))]
    (answer,) = generator.generate(asked, Sampling(1, 1.0, 1.0, LIMIT, SEED))
    return prompt, answer.completions[0]


def logprobs(writer: nn.Module, prompt: list[int], ids: tuple[int, ...]) -> torch.Tensor:
    row = torch.tensor([[*prompt, *ids]])
    with torch.no_grad():
        return writer.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def test_distances_are_those_of_a_loop_over_single_documents(data: TraceData) -> None:
    student, teacher = network(data, 0), network(data, 1)
    exposure = measured(data, student, teacher)
    for name, writer in (("teacher", teacher), ("student", student)):
        forward: list[list[float]] = [[] for _ in range(LIMIT)]
        reverse: list[list[float]] = [[] for _ in range(LIMIT)]
        for problem in data.problems("test"):
            prompt, completion = written_by(writer, data, problem)
            q, p = (logprobs(one, prompt, completion.ids) for one in (student, teacher))
            for place in range(len(completion.ids)):
                forward[place].append(float((p[place].exp() * (p[place] - q[place])).sum()))
                reverse[place].append(float((q[place].exp() * (q[place] - p[place])).sum()))
        every = [value for values in forward for value in values]
        assert exposure.metrics[f"test/kl_on_{name}_prefixes"] == pytest.approx(sum(every) / len(every), rel=1e-5)
        mine = exposure.places["writer"] == name
        assert exposure.places["tokens"][mine].tolist() == [len(values) for values in forward if values]
        for column, values in (("forward_kl", forward), ("reverse_kl", reverse)):
            expected = [sum(at) / len(at) for at in values if at]
            assert exposure.places[column][mine].tolist() == pytest.approx(expected, rel=1e-5)
    gap = exposure.metrics["test/kl_on_student_prefixes"] - exposure.metrics["test/kl_on_teacher_prefixes"]
    assert exposure.metrics["test/exposure_gap"] == pytest.approx(gap) and gap != 0


def test_a_student_that_is_its_teacher_has_no_exposure(data: TraceData) -> None:
    exposure = measured(data, network(data, 0), network(data, 0))
    assert all(abs(value) < 1e-7 for name, value in exposure.metrics.items() if "error" not in name)


def test_the_step_of_the_first_error(data: TraceData) -> None:
    """Of chains that were read: the first wrong step from 1, or one more than the steps there are."""
    student = network(data, 3)
    steps = []
    for problem in data.problems("test"):
        _, completion = written_by(student, data, problem)
        chain = Plain().parse(completion.text, "chain_then_answer").chain
        written = [step for step in chain.split(";")] if chain.strip() else []
        report = data.task.verify_steps(problem, chain)
        if written and report is not None and report.num_steps:
            steps.append(report.num_steps + 1 if report.first_wrong is None else report.first_wrong + 1)
    found = measured(data, student, network(data, 1)).metrics
    assert found.get("test/first_error_step") == (pytest.approx(sum(steps) / len(steps)) if steps else None)
    assert steps, "this network writes some chains"


def test_problems_without_room_for_an_answer_are_left_out(data: TraceData, caplog: pytest.LogCaptureFixture) -> None:
    codec, problems = data.codec, data.problems("test")
    overlong = replace(problems[0], index=NUM, text="1" * 70)  # 64 places
    options: dict[str, Any] = {"max_new_tokens": LIMIT, "seed": SEED, "split": "test"}
    student, teacher = network(data, 0), network(data, 1)
    given = (student, teacher, codec, codec, Grader(data.task, codec.template, codec.layout))
    assert measure_exposure(*given, [*problems, overlong], **options).metrics == measured(data, *given[:2]).metrics
    assert f"1 of {NUM + 1} prompts cannot be asked (1 too_long)" in caplog.text
    with pytest.raises(ValueError, match="of 1 given, none can be asked of both"):
        measure_exposure(*given, [overlong], **options)


def test_networks_come_back_in_their_modes_and_no_random_number_is_drawn(data: TraceData) -> None:
    student, teacher = network(data, 0).train(), network(data, 1).eval()
    before = torch.get_rng_state()
    measured(data, student, teacher)
    assert student.training and not teacher.training and torch.equal(before, torch.get_rng_state())
