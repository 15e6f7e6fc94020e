"""The validation that every method of text shares: the reference completions, token by token."""

from typing import Any

import lightning as L

from research.losses.supervised import cross_entropy
from research.records import TokenBatch

METRICS = ("val/nll", "val/token_accuracy")


def log_token_validation(method: L.LightningModule, student: Any, batch: TokenBatch) -> None:
    """Logs cross-entropy and accuracy at the completion's places, means over tokens, under METRICS."""
    logits_BTV = student(*batch.network_inputs())
    mask_BT = batch.completion_BT
    nll = cross_entropy(logits_BTV, batch.label_BT, mask_BT)
    right = ((logits_BTV.argmax(dim=-1) == batch.label_BT) & mask_BT).sum()
    tokens = int(nll.count)
    if tokens == 0:
        return
    weight = tokens * method.trainer.world_size  # Lightning averages weights over ranks, and rounds that down
    options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": weight}
    method.log("val/nll", nll.mean(), **options)
    method.log("val/token_accuracy", right / tokens, **options)
