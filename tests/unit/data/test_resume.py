"""Mid-epoch resume through a real Lightning Trainer (pitfall P82): what is trained on is what no kill would have.

The matrix runs over the moments at which a checkpoint can be written, because Lightning restores its counters
differently for each of them.
"""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from research.data.base import AbstractClassData
from research.data.resume import rewind_to_last_step
from research.data.splits import SplitTensors
from research.records import ClassBatch

ROWS, BATCH, EPOCHS = 14, 4, 3
STEPS_PER_EPOCH = 4


class Toy(AbstractClassData):
    """14 train rows: three steps of four rows, and a ragged last step of two."""

    num_classes = 2
    class_names = ("even", "odd")
    image_shape = (3, 3)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (9,)

    def load(self) -> dict[str, SplitTensors]:
        inputs = torch.arange(ROWS * 9, dtype=torch.float32).reshape(ROWS, 9) / 100
        label_N = torch.arange(ROWS) % 2
        return {"train": SplitTensors(inputs, label_N), "test": SplitTensors(inputs[:5] + 7, label_N[:5])}


class Boom(Exception):
    """The kill."""


class Net(L.LightningModule):
    """One linear layer that notes the rows of every micro-batch whose gradient went into the weights."""

    def __init__(self, kill: tuple[str, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(9, 2)
        self.kill = kill
        self.calls = {"step": 0, "validation": 0}
        self.seen: list[tuple[list[int], list[float]]] = []

    def _count(self, what: str) -> None:
        self.calls[what] += 1
        if self.kill == (what, self.calls[what]):
            raise Boom

    def training_step(self, batch: ClassBatch, batch_idx: int) -> Tensor:
        self._count("step")
        self.seen.append((batch.index_B.tolist(), batch.inputs.flatten().tolist()))
        loss = torch.nn.functional.cross_entropy(self.layer(batch.inputs), batch.label_B, reduction="sum")
        return loss / batch.step_rows * self.trainer.accumulate_grad_batches

    def validation_step(self, batch: ClassBatch, batch_idx: int) -> None:
        self._count("validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rewind_to_last_step(checkpoint, self.trainer.accumulate_grad_batches)


class SaveAt(L.Callback):
    """Writes one checkpoint at the given occurrence of a hook."""

    def __init__(self, hook: str, occurrence: int, path: Path) -> None:
        self.hook, self.left, self.path = hook, occurrence, path

    def _maybe(self, hook: str, trainer: L.Trainer) -> None:
        if hook == self.hook:
            self.left -= 1
            if self.left == 0:
                trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe("batch_end", trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe("validation_end", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe("epoch_end", trainer)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        self._maybe("exception", trainer)


def fit(
    net: Net,
    *,
    validate: bool,
    by_steps: bool,
    accumulate: int,
    ckpt_path: Path | None = None,
    batch_size: int = BATCH,
    **trainer_options: Any,
) -> L.Trainer:
    length: dict[str, Any] = (
        {"max_steps": EPOCHS * STEPS_PER_EPOCH, "max_epochs": -1} if by_steps else {"max_epochs": EPOCHS}
    )
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(quiet, False) | length | trainer_options
    trainer = L.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        **options,
    )
    data = Toy(batch_size=batch_size, holdout=0, shift_pixels=1, seed=3)
    if validate:
        data.val_dataloader = data.test_dataloader  # type: ignore[method-assign]
    trainer.fit(net, datamodule=data, ckpt_path=ckpt_path)
    return trainer


# name: (the hook and its occurrence at which a checkpoint is written, the call that raises, accumulations)
MOMENTS: dict[str, tuple[tuple[str, int], tuple[str, int] | None, tuple[int, ...]]] = {
    "batch_end_mid": (("batch_end", 6), None, (1, 2)),
    "batch_end_mid_accumulation": (("batch_end", 11), None, (2,)),
    "batch_end_last": (("batch_end", 8), None, (1, 2)),
    "epoch_end": (("epoch_end", 1), None, (1, 2)),
    "validation_end": (("validation_end", 1), None, (1,)),
    "raised_mid": (("exception", 1), ("step", 3), (1,)),
    "raised_first_of_epoch": (("exception", 1), ("step", 9), (1,)),
    "raised_mid_accumulation": (("exception", 1), ("step", 12), (2,)),
    "raised_in_validation": (("exception", 1), ("validation", 2), (1,)),
}


def cases() -> Iterator[Any]:
    for moment, (saved, kill, accumulations) in MOMENTS.items():
        for validate, by_steps, accumulate in itertools.product((False, True), (False, True), accumulations):
            if validate or "validation" not in moment:
                name = f"{moment}-{'val' if validate else 'noval'}-{'steps' if by_steps else 'epochs'}-{accumulate}"
                yield pytest.param(saved, kill, validate, by_steps, accumulate, id=name)


@lru_cache
def unkilled(validate: bool, by_steps: bool, accumulate: int) -> Net:
    net = Net()
    fit(net, validate=validate, by_steps=by_steps, accumulate=accumulate)
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("saved", "kill", "validate", "by_steps", "accumulate"), list(cases()))
def test_p82_resume_is_exact(
    tmp_path: Path,
    saved: tuple[str, int],
    kill: tuple[str, int] | None,
    validate: bool,
    by_steps: bool,
    accumulate: int,
) -> None:
    how: dict[str, Any] = {"validate": validate, "by_steps": by_steps, "accumulate": accumulate}
    whole, killed, resumed = unkilled(**how), Net(kill), Net()
    path = tmp_path / "saved.ckpt"
    with pytest.raises(Boom) if kill else nullcontext():
        fit(killed, callbacks=[SaveAt(*saved, path)], **how)
    trainer = fit(resumed, ckpt_path=path, **how)

    done = len(whole.seen) - len(resumed.seen)
    assert 0 < done < len(whole.seen)
    assert resumed.seen == whole.seen[done:]  # rows and their augmented inputs
    assert killed.seen[:done] == whole.seen[:done]
    assert trainer.global_step == EPOCHS * STEPS_PER_EPOCH
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    per_epoch = len(whole.seen) // EPOCHS
    trained = [index for index, _ in killed.seen[:done] + resumed.seen]
    for epoch in range(EPOCHS):
        in_epoch = trained[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(itertools.chain(*in_epoch)) == list(range(ROWS))


@pytest.mark.filterwarnings("ignore")
def test_resume_with_another_batch_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(Net(), validate=False, by_steps=False, accumulate=1, callbacks=[SaveAt("batch_end", 6, path)])
    with pytest.raises(ValueError, match="batch_size: 4 saved, 5 now"):
        fit(Net(), validate=False, by_steps=False, accumulate=1, ckpt_path=path, batch_size=5)


@pytest.mark.filterwarnings("ignore")
def test_a_limit_within_an_optimizer_step_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_train_batches"):
        fit(Net(), validate=False, by_steps=False, accumulate=2, limit_train_batches=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_limited_epochs_train_on_the_head_of_each_epochs_order(limit: int) -> None:
    net = Net()
    fit(net, validate=False, by_steps=False, accumulate=1, limit_train_batches=limit)
    orders = [Toy(batch_size=BATCH, holdout=0, seed=3).train_dataloader().order(epoch) for epoch in range(EPOCHS)]
    expected = [order[b * BATCH : (b + 1) * BATCH].tolist() for order in orders for b in range(limit)]
    assert [index for index, _ in net.seen] == expected


@pytest.mark.filterwarnings("ignore")
def test_overfitting_sees_the_same_rows_in_every_epoch() -> None:
    net = Net()
    fit(net, validate=False, by_steps=False, accumulate=1, overfit_batches=2)
    assert [index for index, _ in net.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * EPOCHS


def test_rewinding_a_checkpoint_at_the_end_of_a_step_changes_nothing() -> None:
    counts = {"ready": 4, "started": 4, "processed": 4, "completed": 3}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    checkpoint = {"loops": {"fit_loop": {"epoch_loop.batch_progress": progress, "state_dict": {}}}}
    assert rewind_to_last_step(checkpoint, 2) == 0
    assert progress == {"total": counts, "current": counts, "is_last_batch": False}
