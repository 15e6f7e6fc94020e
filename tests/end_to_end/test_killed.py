"""SIGKILL in the middle of a long epoch: the run goes on from its last few steps to the weights of one never killed."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from research.results.record import RunRecord, read_record

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
STEPS, EVERY = 36, 3
# dropout, packing, grouping and accumulation; one epoch, so that only checkpoints within it can be gone on from
RUN = (
    "experiment=sum8_trace", "task.num_terms=5", "student.hidden_size=32", "student.num_layers=2",
    "student.dropout=0.2", "data.num_train=5000", "data.num_val=16", "data.num_test=4", "data.batch_size=16",
    "data.packed_to=96", "data.length_grouping=2", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false", "evaluation.max_new_tokens=24", "logger=none", "threads=1", "seed=5",
    f"checkpoint_steps={EVERY}",
)  # fmt: skip


def killed_run(begin: Callable[..., Any], folder: Path, *flags: str) -> int:
    """Starts a run and kills it at a random moment after its first checkpoint; the step that it had saved."""
    last = folder / "checkpoints" / "last.ckpt"
    process = begin("train", *RUN, *flags, f"hydra.run.dir={folder}", cwd=folder.parent)
    process.kill_when(last.exists, random.Random(os.getpid() + len(flags)).uniform(0.0, 0.3))
    assert [path.name for path in last.parent.iterdir() if path.suffix == ".ckpt"] == ["last.ckpt"]
    return int(torch.load(last, weights_only=True)["global_step"])


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((f"trainer.max_steps={STEPS}",), id="steps"),
        pytest.param(("budget.tokens=30000", "trainer.max_epochs=-1"), id="budget"),
    ],
)
def test_p81_a_killed_run_goes_on_within_its_epoch(
    flags: tuple[str, ...], distill: Callable[..., Any], begin: Callable[..., Any], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saved = killed_run(begin, cut, *flags)
    assert saved % EVERY == 0 and saved > 0 and not (cut / "run.json").exists()
    records: list[RunRecord] = []
    for folder, resume in ((cut, ["ckpt_path=last"]), (whole, [])):
        done = distill("train", *RUN, *flags, *resume, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert done.code == 0, done.err
        records.append(read_record(folder / "run.json"))
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (cut, whole)]
    for name, tensor in weights[1].items():
        assert torch.equal(tensor, weights[0][name]), name
    assert records[0].metrics == records[1].metrics and records[0].reason == records[1].reason
    told = json.loads((whole / "progress.json").read_text())["step"]
    assert saved < told, "it was killed before its end"
    spent = [{part: [line["flops"], line["tokens"]] for part, line in record.ledger.items()} for record in records]
    assert spent[0] == spent[1]
