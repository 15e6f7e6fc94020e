"""What a loader is told of the trainer: its ranks, its micro-batches, and where it stands."""

from typing import Any

import lightning as L

from research.data.resume import TrainerPlace


def share_of_rank(trainer: L.Trainer | None) -> dict[str, Any]:
    """This process's number and how many there are; the only one without a trainer."""
    return {
        "rank": 0 if trainer is None else trainer.global_rank,
        "world_size": 1 if trainer is None else trainer.world_size,
    }


def training_schedule(trainer: L.Trainer | None, seed: int) -> dict[str, Any]:
    """How train rows are cut and ordered; without a trainer in whole steps, one epoch after the other.

    Rows are shuffled unless Lightning's ``overfit_batches`` asks for the same ones again and again.
    """
    micro_batches = 1 if trainer is None else trainer.accumulate_grad_batches
    return {
        **share_of_rank(trainer),
        "micro_batches": micro_batches,
        "seed": seed,
        "shuffle": not getattr(trainer, "overfit_batches", 0),  # set from outside Trainer.__init__
        "where": None if trainer is None else TrainerPlace(trainer, micro_batches),
    }
