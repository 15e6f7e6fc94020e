"""Methods whose student writes, from the command line: a kill at any moment, the record, and what is refused."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from research.results.record import RunRecord, read_record

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, EVERY = 24, 3
TEXT = (
    "task=sum8", "task.num_terms=3", "template=plain", "model@student=llama", "student.hidden_size=32",
    "student.num_layers=1", "student.max_positions=64", "data.max_tokens=32", "data.num_train=60", "data.num_val=8",
    "data.num_test=4", "evaluation.max_new_tokens=8", "monitor=val/nll", "logger=none", "threads=1",
    "trainer.enable_progress_bar=false", "preflight=skip",
)  # fmt: skip
OWN = (
    *TEXT, "data=prompts", "data.num_prompts=8", "data.steps_per_rollout=2", "student.dropout=0.2",
    "trainer.accumulate_grad_batches=2", "trainer.max_epochs=-1", f"trainer.max_steps={STEPS}", "method.num_samples=2",
    "method.max_new_tokens=8", "optimizer.lr=3e-3", f"checkpoint_steps={EVERY}", "seed=5",
    "trainer.log_every_n_steps=1", "logger=csv",
)  # fmt: skip
Distill = Callable[..., Any]


@pytest.fixture(scope="module")
def teacher(distill: Distill, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    sft = ("data=traces", "method=sft_trace", "trainer=smoke", "data.batch_size=16")
    done = distill("train", *TEXT, *sft, "hydra.run.dir=run", cwd=folder)
    assert done.code == 0, done.err
    return folder / "run"


def flags_of(name: str, teacher: Path) -> tuple[str, ...]:
    if name == "policy_gradient":
        return ("method=policy_gradient", "method.kl_weight=0.1", f"init_from='{teacher}'")
    mixed = ("method.on_policy_fraction=0.5", "method.hard_weight=0.5", "data.num_stored=4")
    return ("method=on_policy", "teacher=frozen", f"teacher.path='{teacher}'", *mixed)


def killed_run(begin: Callable[..., Any], folder: Path, *flags: str) -> int:
    """Starts a run and kills it at a random moment after its first checkpoint; the step that it had saved."""
    last = folder / "checkpoints" / "last.ckpt"
    process = begin("train", *OWN, *flags, f"hydra.run.dir={folder}", cwd=folder.parent)
    process.kill_when(last.exists, random.Random(os.getpid()).uniform(0.0, 0.2))
    return int(torch.load(last, weights_only=True)["global_step"])


@pytest.mark.parametrize("name", ["on_policy", pytest.param("policy_gradient", marks=pytest.mark.slow)])
def test_p81_p83_a_killed_run_goes_on_to_the_same_end(
    name: str, distill: Distill, begin: Callable[..., Any], teacher: Path, tmp_path: Path
) -> None:
    """SIGKILL at a random moment: weights, scores and everything that was spent are those of a run never killed."""
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", flags_of(name, teacher)
    saved = killed_run(begin, cut, *flags)
    assert 0 < saved < STEPS and not (cut / "run.json").exists()
    records: list[RunRecord] = []
    for folder, resume in ((cut, ["ckpt_path=last"]), (whole, [])):
        done = distill("train", *OWN, *flags, *resume, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert done.code == 0, done.err
        records.append(read_record(folder / "run.json"))
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (cut, whole)]
    for key, tensor in weights[1].items():
        assert torch.equal(tensor, weights[0][key]), key
    assert records[0].metrics == records[1].metrics
    spent = [{part: [line["flops"], line["tokens"]] for part, line in record.ledger.items()} for record in records]
    assert spent[0] == spent[1]
    for part in ("student_update", "rollout", "prompt_prefill"):
        assert spent[0][part][0] > 0 and spent[0][part][1] > 0
    assert (spent[0]["teacher_scoring"][1] > 0) == (name == "on_policy")
    logged = next((whole / "csv").rglob("metrics.csv"), None) or next(whole.rglob("metrics.csv"))
    names = logged.read_text().splitlines()[0].split(",")
    assert {"rollout/truncated", "rollout/entropy", "rollout/length", "rollout/staleness"} <= set(names)


CHUNKED = {
    "on_policy": ("data=prompts", "data.num_prompts=8", "method.objective=sampled_token", "method.max_new_tokens=8"),
    "sft_trace": ("data=traces", "data.batch_size=16", "method.soft_weight=1"),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_p15_a_pretrained_student_learns_the_same_some_logits_at_a_time(
    name: str, distill: Distill, teacher: Path, tmp_path: Path
) -> None:
    """A Hugging Face folder as student: weights and scores with method.chunk_rows are those without, to rounding."""
    own = ("student.hidden_size", "student.num_layers", "model@student")
    text = tuple(flag for flag in TEXT if flag.partition("=")[0] not in own)
    folder = tmp_path / "pretrained"
    shutil.copytree(teacher / "student", folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)  # another network than the teacher
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    network = ("model@student=pretrained_lm", f"student.path='{folder}'", f"data.tokenizer='{folder}'", "optimizer=sgd")
    taught = (f"method={name}", "teacher=frozen", f"teacher.path='{teacher}'", "trainer=smoke", "trainer.max_steps=3")
    ends, metrics = [], []
    for place, chunks in (("whole", ()), ("chunked", ("method.chunk_rows=16", "teacher.signal=hidden"))):
        flags = (*text, *network, *taught, *CHUNKED[name], *chunks, f"hydra.run.dir={place}", "optimizer.lr=0.5")
        done = distill("train", *flags, cwd=tmp_path)
        assert done.code == 0, done.err
        ends.append(load_file(tmp_path / place / "student" / "model.safetensors"))
        metrics.append(read_record(tmp_path / place / "run.json").metrics)
    start = load_file(folder / "model.safetensors")
    assert any(not torch.equal(start[key], tensor) for key, tensor in ends[0].items())
    for key, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][key], tensor, rtol=1e-4, atol=1e-5)
    assert metrics[1]["test/nll"] == pytest.approx(metrics[0]["test/nll"], rel=1e-4)


REFUSED = [
    (("method.chunk_rows=0",), "method.chunk_rows is 0; expected at least 1 place, or null"),
    (("method.compiled=true",), "method.compiled is true, and all logits are written out at once"),
    (("method=soft_target", "method.chunk_rows=4"), "chunk_rows"),
    (
        ("data.num_prompts=0",),
        "OnPolicy trains on what the student answers; these data hold no prompts, give data=prompts",
    ),
    (("data.max_tokens=5",), "no train problem of sum3_to_9 can be posed (60 too_long)"),
    (("method.num_samples=2", "method.reward_weight=1", "method.top_p=0.5"), "a policy gradient needs samples"),
    (("monitor=val/errors",), "monitor is 'val/errors'; on the validation split this method measures val/nll"),
    (("method=policy_gradient", "teacher=none", "method.num_samples=1"), "method.num_samples is 1"),
    (("method=policy_gradient",), "learns from an answer key and asks no teacher; give teacher=none"),
    (("teacher=none",), "the method OnPolicy needs a teacher"),
]


@pytest.mark.parametrize(("flags", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(
    flags: tuple[str, ...], told: str, distill: Distill, teacher: Path, tmp_path: Path
) -> None:
    run = (*TEXT, "data=prompts", "data.num_prompts=8", "method=on_policy", "teacher=frozen", "trainer=smoke")
    path = () if "teacher=none" in flags else (f"teacher.path='{teacher}'",)
    done = distill("train", *run, *path, *flags, "hydra.run.dir=run", cwd=tmp_path)
    assert told in done.error
