"""Exact resume: where the trainer stands in the data, and how a checkpoint goes back to its last finished step."""

from dataclasses import dataclass
from typing import Any

import lightning as L

from research.data.loader import Place
from research.errors import ConfigError


@dataclass(frozen=True)
class TrainerPlace:
    """Where the trainer's fit loop stands: (epoch, micro-batches processed in it); the ``where`` of a loader.

    Taken from the loop's total of *processed* micro-batches alone, the one count that a checkpoint keeps, no restart
    rewinds, and that rises only after the step. The loop's epoch number is not reliable after a resume (it runs one
    ahead where a ``max_steps`` run was saved at the end of an epoch), and a loader's own count cannot know that the
    step of a batch it handed out raised.

    Raises ValueError where a limit cuts an epoch within an optimizer step: that step's ``step_rows`` would be wrong.
    """

    trainer: L.Trainer
    micro_batches: int

    def __call__(self) -> Place:
        per_epoch = int(self.trainer.num_training_batches)
        if per_epoch % self.micro_batches and not getattr(self.trainer, "fast_dev_run", False):
            raise ValueError(
                f"limit_train_batches (or overfit_batches) ends the epoch after {per_epoch} micro-batches, within an"
                f" optimizer step: give a multiple of accumulate_grad_batches={self.micro_batches}"
            )
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return divmod(int(total.processed), per_epoch)


def check_validations_end_steps(trainer: L.Trainer) -> None:
    """Raise ConfigError where a validation would come between two micro-batches of one optimizer step.

    It would see the weights of the step before, and come twice where the run is stopped there and gone on with: the
    step's micro-batches are taken again, and what counts validations would count one too many.
    """
    every: Any = trainer.val_check_batch
    micro_batches = int(trainer.accumulate_grad_batches)
    if not trainer.enable_validation or not isinstance(every, int):  # by time, or at the end of data without a length
        return
    within = trainer.check_val_every_n_epoch is None or every < trainer.num_training_batches
    if within and every % micro_batches:
        raise ConfigError(
            f"trainer.val_check_interval validates every {every} batches, within an optimizer step of "
            f"trainer.accumulate_grad_batches={micro_batches}: give a multiple"
        )


def rewind_to_last_step(checkpoint: dict[str, Any], micro_batches: int) -> int:
    """Take back, in a checkpoint's loop counters, the micro-batches of an unfinished optimizer step.

    A run that is interrupted between two micro-batches of one step loses the gradient accumulated so far, as gradients
    are in no checkpoint. Resumed as it stands, its next step would hold the rest of the micro-batches alone. After this
    the whole step comes again, from weights that it has not touched yet: the resume is exact. Call it on every saved
    checkpoint (``LightningModule.on_save_checkpoint``); at the end of a step it changes nothing.

    Returns how many micro-batches were taken back.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    progress = fit_loop["epoch_loop.batch_progress"]
    unfinished = int(progress["current"]["processed"]) % micro_batches
    if unfinished == 0:
        return 0
    progress["is_last_batch"] = False
    for counts in (progress["current"], progress["total"]):
        done = int(counts["processed"]) - unfinished
        counts.update(ready=done, started=done, processed=done, completed=done)
    for state in fit_loop["state_dict"].get("combined_loader", []):
        state["position"] -= unfinished
    return unfinished


def forget_interrupted_batch(trainer: L.Trainer) -> None:
    """Take back, in a resumed fit loop, the batch that was handed out and whose step never ended.

    Lightning takes it back from the count within the epoch alone. The count over all epochs, by which validations come
    with ``check_val_every_n_epoch=null``, would stay one ahead, and every later validation would come a step early.
    Call it when training starts, when the loop knows how it was interrupted; of a run that begins it changes nothing.
    """
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    total.ready = total.started = total.processed
