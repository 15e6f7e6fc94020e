"""Two processes that write, train and validate together are one: same rollouts, same steps, same figures."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from research.loops.validation_answers import ValidationAnswers

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # two processes that load everything
NAMES = ("mixed", "policy_gradient")
STEPS, STOPPED = 6, 3  # the third step is the first of a block that serves for two


def make(words: Any, name: str, data: Any) -> Any:
    training = words.make_training(data, optimizer=partial(torch.optim.Adam, lr=0.01))
    options: dict[str, Any] = {"num_samples": 2, "max_new_tokens": 8}
    if name == "policy_gradient":
        return words.PolicyGradient(training, filter_groups=True, kl_weight=0.1, **options)
    return words.OnPolicy(training, words.make_teacher(data), on_policy_fraction=0.7, reward_weight=0.5, **options)


def ends(words: Any, name: str, folder: Path, **ranks: Any) -> dict[str, Any]:
    """A run of six steps, and one that is saved after three and gone on with in another trainer."""
    told: dict[str, Any] = {}
    for part, steps, ckpt_path in (("whole", STEPS, None), ("first", STOPPED, None), ("rest", STEPS, folder / name)):
        stored = 0 if name == "policy_gradient" else 4
        data = words.make_data(num_train=12, num_prompts=8, num_stored=stored, steps_per_rollout=2, num_val=5, seed=1)
        method, watch = make(words, name, data), words.Watch()
        answers = ValidationAnswers(data, num_problems=5, num_samples=3, max_new_tokens=8, seed=0)
        keep = ModelCheckpoint(dirpath=folder / f"{name}_{part}", monitor="val/errors", mode="min")
        trainer = words.make_trainer(
            max_steps=steps, limit_val_batches=1.0, enable_checkpointing=True, callbacks=[watch, answers, keep],
            log_every_n_steps=1, **ranks,
        )  # fmt: skip
        trainer.fit(method, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        if part == "first":
            trainer.save_checkpoint(folder / name)
        counts = {key: value for key, value in vars(method.rollout_cost).items() if "seconds" not in key}
        told[part] = {
            "weights": words.flat(list(method.student.parameters())),
            "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if "val/" in key},
            "rollouts": [
                {key: float(value) for key, value in step.items() if "rollout/" in key} for step in watch.logged
            ],
            "counts": [method.rows_seen, *counts.values()],
        }
    return told


PROGRAM = f"""
import sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
import own_words_kit as words, test_own_words_ranks as here
folder = Path(sys.argv[1])
ranks = {{"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}}
told = {{name: here.ends(words, name, folder, **ranks) for name in here.NAMES}}
rank = torch.distributed.get_rank()
torch.save(told, folder / f"rank{{rank}}.pt")
"""


def test_p46_p54_two_ranks_write_and_train_as_one(words: Any, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env={**os.environ, **shared, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=900)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    two, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in NAMES:
        one = ends(words, name, tmp_path)
        for part in ("whole", "rest"):
            assert torch.equal(two[name][part]["weights"], other[name][part]["weights"])
            torch.testing.assert_close(two[name][part]["weights"], one["whole"]["weights"], rtol=1e-7, atol=1e-9)
            assert two[name][part]["counts"] == pytest.approx(one["whole"]["counts"], rel=1e-9)
            assert two[name][part]["metrics"] == other[name][part]["metrics"]
        assert torch.equal(two[name]["rest"]["weights"], two[name]["whole"]["weights"]), "gone on with within a block"
        assert two[name]["whole"]["metrics"] == pytest.approx(one["whole"]["metrics"], rel=1e-6)
        of_blocks = ("length", "truncated", "correct", "reward", "all_right", "all_wrong", "equal_rewards")
        for step in range(STEPS):
            mine, its = one["whole"]["rollouts"][step], two[name]["whole"]["rollouts"][2 * step + 1]
            assert mine.keys() == its.keys()
            for key in of_blocks:
                assert mine.get(f"rollout/{key}") == pytest.approx(its.get(f"rollout/{key}"))
