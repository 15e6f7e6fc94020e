"""A Hydra application that the sweeper knows nothing of: a cheap function that can be slow, fail, or train on ranks."""

import os
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg: DictConfig) -> Any:
    """The value of one point; every call that came to its end adds a line to `ran.txt` in its folder."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with (folder / "began.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(cfg.sleep)
    wait_for(int(cfg.others), folder.parent)
    if cfg.fail == "raise":
        raise RuntimeError("boom")
    if cfg.fail == "infinite":
        return float("inf")
    if cfg.fail == "arity":
        return [1.0, 2.0]
    if cfg.fail == "die":
        os._exit(9)
    if cfg.fits is not None and cfg.x > cfg.fits:
        bytearray(2**60)
    if cfg.ranks > 1:
        train_on_ranks(cfg, folder)
    with (folder / "ran.txt").open("a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    value = (cfg.x - 2) ** 2 + {"a": 0.0, "b": 1.0}.get(str(cfg.kind), 2.0) + 0.01 * cfg.seed
    return {"val/loss": value, "cost/seconds": cfg.x + 5, "text": "left out"} if cfg.mapping else value


def wait_for(others: int, sweep: Path) -> None:
    """Go on once so many other trials have come to their end; an error where they do not within two minutes."""
    deadline = time.monotonic() + 120
    while len(list(sweep.glob("[0-9]*/ran.txt"))) < others:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {others} other trials have ended")
        time.sleep(0.02)


def train_on_ranks(cfg: DictConfig, folder: Path) -> None:
    """Two processes of one run: each writes down which x it was given."""
    import lightning as L
    import torch

    class Writes(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            folder.joinpath(f"rank_{self.global_rank}.txt").write_text(f"{cfg.x} {os.environ.get('LOCAL_RANK')}")
            return self.layer(batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = L.Trainer(
        devices=cfg.ranks, accelerator="cpu", strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Writes(), torch.utils.data.DataLoader(torch.ones(4, 1), batch_size=1))
    if trainer.global_rank > 0:
        raise SystemExit(0)


if __name__ == "__main__":
    main()
