"""Answers at every validation against the same answers graded by hand, and what they must leave alone."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from research.errors import ConfigError
from research.generation.base import Prompt
from research.generation.in_process import LocalGenerator
from research.loops.fit import checkpoint_callbacks
from research.loops.validation_answers import ValidationAnswers
from research.methods.sft_trace import SftTrace
from research.records import Sampling
from research.seeding import seed_for

pytestmark = pytest.mark.filterwarnings("ignore")
KIT = Path(__file__).parents[1] / "methods" / "own_words_kit.py"


@pytest.fixture(scope="module")
def words() -> Any:
    spec = importlib.util.spec_from_file_location("own_words_kit", KIT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_right(words: Any, data: Any, student: Any, sampling: Sampling, num: int) -> float:
    codec, problems = data.codec, data.problems("val")[:num]
    generator = LocalGenerator(student, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
    asked = [Prompt(problem.index, problem.text, tuple(codec.prompt_ids(problem.text))) for problem in problems]
    written = [one for answer in generator.generate(asked, sampling) for one in answer.completions]
    return sum(map(words.is_right, written)) / len(written)


def test_greedy_and_sampled_answers_of_the_first_problems(words: Any) -> None:
    data = words.make_data(num_val=9, num_prompts=0, batch_size=8)
    answers = ValidationAnswers(data, num_problems=7, num_samples=5, max_new_tokens=8, seed=3)
    method = SftTrace(words.make_training(data, lr=0.01))
    trainer = words.make_trainer(max_steps=2, limit_val_batches=None, callbacks=[answers])
    trainer.fit(method, datamodule=data)
    told, student = trainer.callback_metrics, method.student
    greedy = share_right(words, data, student, Sampling(max_new_tokens=8), 7)
    sampled = share_right(words, data, student, Sampling(5, 1.0, 1.0, 8, seed_for(3, "validation_answers")), 7)
    assert float(told["val/accuracy"]) == pytest.approx(greedy)
    assert float(told["val/errors"]) == pytest.approx(7 - 7 * greedy)
    assert 0 < sampled < 1 and float(told["val/sampled_accuracy"]) == pytest.approx(sampled)


def test_training_goes_on_as_if_nobody_had_asked(words: Any) -> None:
    """Dropout, and a run with answers after every step: the same weights, to the last bit."""
    ends = []
    for asked in (False, True):
        data = words.make_data(num_val=4, num_train=16, num_prompts=0, batch_size=4)
        method = SftTrace(words.make_training(data, words.make_network(data, dropout=0.5), lr=0.1))
        answers = ValidationAnswers(data, num_problems=4, num_samples=2, max_new_tokens=8, seed=0)
        options = {"val_check_interval": 1, "limit_val_batches": None, "max_steps": 4}
        torch.manual_seed(0)
        words.make_trainer(**options, callbacks=[answers] if asked else []).fit(method, datamodule=data)
        ends.append(words.flat(list(method.student.parameters())))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("metric", "mode"), [("val/errors", "min"), ("val/nll", "min"), ("val/accuracy", "max")])
def test_the_best_weights_have_the_highest_accuracy_and_the_lowest_of_the_rest(
    metric: str, mode: str, tmp_path: Path
) -> None:
    *_, best = checkpoint_callbacks(tmp_path, metric, has_val=True)
    assert isinstance(best, ModelCheckpoint) and (best.monitor, best.mode) == (metric, mode)


@pytest.mark.parametrize("numbers", [(0, 0), (3, -1)])
def test_numbers_without_meaning_are_refused(words: Any, numbers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"val_problems is {numbers[0]} and evaluation.val_samples {numbers[1]}"):
        ValidationAnswers(words.make_data(), num_problems=numbers[0], num_samples=numbers[1], max_new_tokens=8, seed=0)
