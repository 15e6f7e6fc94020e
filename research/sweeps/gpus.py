"""Which GPU a worker of a sweep sees: its launcher's, or one of those that the command counted or was given."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
_pinned: tuple[str, str | None] | None = None  # what this process set, and what it had found


def _place() -> tuple[str | None, ...]:
    """Where this process runs, as its launcher has it: machine, SLURM job, visible GPUs."""
    visible = os.environ.get(VISIBLE)
    if _pinned is not None and visible == _pinned[0]:
        visible = _pinned[1]
    return platform.node(), os.environ.get("SLURM_JOB_ID"), visible


@dataclass(frozen=True)
class GpuShare:
    """GPUs to be dealt out to workers; travels to them.

    values    of CUDA_VISIBLE_DEVICES, one for each worker in turn; empty: it stays as it is
    is_asked  the user named them: they hold in every job
    counted   where they were counted: elsewhere the same numbers are other GPUs, or another job's
    """

    values: tuple[str, ...] = ()
    is_asked: bool = False
    counted: tuple[str | None, ...] = field(default_factory=_place)

    def pin(self, index: int) -> None:
        """Let this process, and what it starts, see one GPU: the one for the worker with this index.

        Where the launcher has placed the job, its choice stands: on another machine, in another SLURM job, or with a
        CUDA_VISIBLE_DEVICES that the command did not have.
        """
        global _pinned
        here = _place()
        if self.values and (self.is_asked or here == self.counted):
            _pinned = (self.values[index % len(self.values)], here[-1])
            os.environ[VISIBLE] = _pinned[0]


def gpus_of(given: Any, n_jobs: int) -> GpuShare:
    """One GPU for every worker where there are several; what the user says goes first."""
    if given is not None:
        return GpuShare(tuple(str(one) for one in given), is_asked=True)
    visible = os.environ.get(VISIBLE)
    if n_jobs == 1:
        return GpuShare()
    if visible is not None:
        found = [one.strip() for one in visible.split(",") if one.strip()]
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        found = [
            str(number)
            for number, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU"))
        ]
    else:
        found = []
    return GpuShare(tuple(found) if len(found) > 1 else ())
