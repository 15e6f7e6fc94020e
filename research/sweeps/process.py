"""What every job does to its process and to the folder that it works in."""

import fcntl
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from research.errors import ConfigError
from research.sweeps.secrets import refuse_secrets

log = logging.getLogger(__name__)


def prepare_process(cfg: DictConfig) -> None:
    """Process-wide settings: threads, and the chatter of libraries kept to what a user can act on."""
    refuse_secrets(cfg, Path(HydraConfig.get().runtime.output_dir) / str(HydraConfig.get().output_subdir))
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        chatty = logging.getLogger(name)
        chatty.setLevel(logging.WARNING)
        chatty.handlers.clear()
    warnings.filterwarnings("ignore", message=".*(LeafSpec|treespec).*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


def refuse_further_processes(cfg: DictConfig, what: str, instead: str = "") -> None:
    """Raise ConfigError where the trainer would start further processes and `what` is the work of one.

    instead  what else to do than to give one device, for the end of the message
    """
    devices, nodes = cfg.trainer.get("devices"), cfg.trainer.get("num_nodes", 1)
    if isinstance(devices, str) and "," in devices:  # a list to Lightning too
        devices = [number for number in devices.split(",") if number.strip()]
    is_one = len(devices) == 1 if isinstance(devices, ListConfig | list) else devices in (1, "1", None)
    if is_one and nodes == 1:
        return
    key, given = ("num_nodes", nodes) if is_one else ("devices", devices)
    raise ConfigError(f"trainer.{key} is {given}, and {what} in one process; give trainer.{key}=1{instead}")


@contextmanager
def sole_owner(folder: Path, *, shared_by_ranks: bool = True) -> Iterator[None]:
    """Hold a lock on a folder, waiting for a process that a kill of its controller left behind in it.

    shared_by_ranks   the further ranks of one run share the lock of the first, which holds it meanwhile
    """
    if shared_by_ranks and int(os.environ.get("LOCAL_RANK", 0)) > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process works in %s; waiting until it ends", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
