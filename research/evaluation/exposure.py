"""Exposure bias: how far student and teacher are apart on prefixes that the teacher wrote, and on the student's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from research.evaluation.completions import Columns, write_completions
from research.generation.in_process import LocalGenerator
from research.losses.divergences import forward_kl, reverse_kl
from research.models.modes import eval_mode
from research.records import Completion, Problem, Sampling
from research.tasks.grading import Grader
from research.text.codec import Codec
from research.text.document import Document, collate

BATCH_ROWS = 256
WRITERS = ("teacher", "student")
NAMES = (*(f"kl_on_{writer}_prefixes" for writer in WRITERS), "exposure_gap", "first_error_step")


@dataclass(frozen=True)
class Exposure:
    """Distances between two networks along texts that either of them wrote.

    metrics   ``split/kl_on_teacher_prefixes`` and ``split/kl_on_student_prefixes``: KL(teacher || student) of the next
              token, nats, mean over the places of completions that were sampled at temperature 1 by that writer;
              ``split/exposure_gap``: the second less the first; ``split/first_error_step``: number of the first wrong
              step of the student's sampled chains, from 1, a chain without one counting as one step more than it has
              (where the task checks steps and a chain was written)
    places    one row for each writer and place within the completion: writer, place, tokens, forward_kl, reverse_kl
    """

    metrics: dict[str, float]
    places: Columns
    sampling: Sampling


def measure_exposure(
    student: nn.Module,
    teacher: nn.Module,
    codec: Codec,
    teacher_codec: Codec,
    grader: Grader,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    seed: int,
    split: str,
) -> Exposure:
    """Have both write one answer to every problem, and compare their next-token distributions along both answers.

    The ids of an answer are the same for both networks, each behind the prompt of its own template. Problems that
    either of them cannot be asked are left out, with a warning. Raises ValueError where none is left.
    """
    sampling = Sampling(1, 1.0, 1.0, max_new_tokens, seed)
    texts = {problem.index: problem.text for problem in problems}
    metrics: dict[str, float] = {}
    columns: dict[str, list[np.ndarray]] = {}
    answers: dict[str, dict[int, Completion]] = {}
    for writer, network, own in (("teacher", teacher, teacher_codec), ("student", student, codec)):
        generator = LocalGenerator(network, own.tokenizer, eos_ids=own.eos_ids, pad_id=own.pad_id)
        written_by = write_completions(generator, own, own.template, texts, sampling)
        answers[writer] = {index: completions[0] for index, completions in written_by.items()}
    num_given = len(problems)
    problems = [one for one in problems if all(written[one.index].was_asked for written in answers.values())]
    if not problems:
        raise ValueError(
            f"no problem to measure exposure on: of {num_given} given, none can be asked of both; give shorter ones"
        )
    for writer, written in answers.items():
        place_N, forward_N, reverse_N = _distances(student, teacher, codec, teacher_codec, problems, written)
        metrics[f"{split}/kl_on_{writer}_prefixes"] = float(forward_N.mean())
        _add_places(columns, writer, place_N, forward_N, reverse_N)
        if writer == "student":
            first_errors = _first_errors(grader, problems, written)
            if first_errors:
                metrics[f"{split}/first_error_step"] = sum(first_errors) / len(first_errors)
    on_teacher, on_student = (metrics[f"{split}/kl_on_{writer}_prefixes"] for writer in WRITERS)
    metrics[f"{split}/exposure_gap"] = on_student - on_teacher
    return Exposure(metrics, {name: np.concatenate(parts) for name, parts in columns.items()}, sampling)


def _distances(
    student: nn.Module,
    teacher: nn.Module,
    codec: Codec,
    teacher_codec: Codec,
    problems: Sequence[Problem],
    written: dict[int, Completion],
) -> tuple[Tensor, Tensor, Tensor]:
    """Place within the completion, KL(teacher || student) and KL(student || teacher) at every written token, flat."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(problems), BATCH_ROWS):
        rows = problems[start : start + BATCH_ROWS]
        student_NV, teacher_NV = (
            completion_logits(network, own, rows, written)[:, : codec.vocab_size]
            for network, own in ((student, codec), (teacher, teacher_codec))
        )
        place_N = torch.cat([torch.arange(len(written[problem.index].ids)) for problem in rows])
        forward_N, reverse_N = (kl(student_NV, teacher_NV).cpu().double() for kl in (forward_kl, reverse_kl))
        found.append((place_N, forward_N, reverse_N))
    place_N, forward_N, reverse_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    return place_N, forward_N, reverse_N


@torch.no_grad()
def completion_logits(
    network: nn.Module, codec: Codec, rows: Sequence[Problem], written: Mapping[int, Completion]
) -> Tensor:
    """Float32 logits [N, V] that predict each token of the problems' completions, row after row.

    written  index of a problem -> what was written to it; its ids are read behind the prompt of this ``codec``
    """
    documents = []
    for problem in rows:
        prompt = codec.prompt_ids(problem.text)
        documents.append(Document((*prompt, *written[problem.index].ids), len(prompt), problem.index))
    device = next(network.parameters()).device
    batch = collate(documents, prompt_loss_weight=0.0, pad_id=codec.pad_id).to(device)
    with eval_mode(network):
        logits_BTV: Tensor = network(*batch.network_inputs())
    return logits_BTV[batch.completion_BT].float()


def _add_places(
    columns: dict[str, list[np.ndarray]], writer: str, place_N: Tensor, forward_N: Tensor, reverse_N: Tensor
) -> None:
    tokens_T = torch.bincount(place_N)
    columns.setdefault("writer", []).append(np.array([writer] * len(tokens_T)))
    columns.setdefault("place", []).append(np.arange(len(tokens_T)))
    columns.setdefault("tokens", []).append(tokens_T.numpy())
    for name, value_N in (("forward_kl", forward_N), ("reverse_kl", reverse_N)):
        columns.setdefault(name, []).append((torch.bincount(place_N, value_N) / tokens_T).numpy())


def _first_errors(grader: Grader, problems: Sequence[Problem], written: dict[int, Completion]) -> list[int]:
    reports = [grader.grade(problem, written[problem.index]).steps for problem in problems]
    return [
        1 + (report.num_steps if report.first_wrong is None else report.first_wrong)
        for report in reports
        if report is not None and report.num_steps
    ]
