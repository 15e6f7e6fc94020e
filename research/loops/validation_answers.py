"""What the student writes to validation problems, while it is trained: the curve that a method of text is judged by."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from research.data.traces import TraceData
from research.errors import ConfigError
from research.evaluation.completions import write_completions
from research.generation.in_process import LocalGenerator
from research.methods.rollouts import sum_over_ranks
from research.records import Problem, Sampling
from research.seeding import seed_for
from research.tasks.grading import Grader

ANSWER_METRICS = ("val/accuracy", "val/errors")
SAMPLED_METRIC = "val/sampled_accuracy"  # where answers are sampled


class ValidationAnswers(Callback):
    """Logs ``val/accuracy`` and ``val/errors`` (a count) of greedy answers at every validation, and
    ``val/sampled_accuracy`` of sampled ones where asked.

    num_problems  the first so many problems of the validation split
    num_samples   further answers to each, drawn at temperature 1 from streams of their own; 0: greedy alone
    max_new_tokens   length limit of an answer

    Nothing is drawn from the run's own random numbers, and the student comes back in the modes it was in. Several
    devices share the problems.

    Raises ConfigError for numbers without meaning.
    """

    def __init__(self, data: TraceData, *, num_problems: int, num_samples: int, max_new_tokens: int, seed: int) -> None:
        if num_problems < 1 or num_samples < 0:
            raise ConfigError(
                f"evaluation.val_problems is {num_problems} and evaluation.val_samples {num_samples}; expected at "
                "least 1 problem, and 0 samples or more"
            )
        self._data, self._num_problems = data, num_problems
        self._samplings = {"val/accuracy": Sampling(max_new_tokens=max_new_tokens)}
        if num_samples:
            drawn = Sampling(num_samples, 1.0, 1.0, max_new_tokens, seed_for(seed, "validation_answers"))
            self._samplings[SAMPLED_METRIC] = drawn

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        problems = self._data.problems("val")[: self._num_problems]
        module: Any = pl_module
        mine = problems[trainer.global_rank :: trainer.world_size]
        options: dict[str, Any] = {"sync_dist": True, "batch_size": len(problems)}  # the same on every rank
        for name, sampling in self._samplings.items():
            right, answers = sum_over_ranks(self._right(module.student, mine, sampling) if mine else (0, 0))
            pl_module.log(name, right / answers, **options)
            if name == "val/accuracy":
                pl_module.log("val/errors", answers - right, **options)

    def _right(self, student: Any, problems: list[Problem], sampling: Sampling) -> tuple[int, int]:
        """How many answers are right, and of how many."""
        data, codec = self._data, self._data.codec
        grader = Grader(data.task, codec.template, codec.layout)
        generator = LocalGenerator(student, codec.tokenizer, eos_ids=codec.eos_ids, pad_id=codec.pad_id)
        texts = {problem.index: problem.text for problem in problems}
        written = write_completions(generator, codec, codec.template, texts, sampling)
        graded = [grader.grade(problem, one) for problem in problems for one in written[problem.index]]
        return sum(grade.correct for grade in graded), len(graded)
