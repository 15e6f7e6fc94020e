"""A job that is to leave its machine: what a launcher's signal, Ctrl-C and SIGTERM do to the trial at work."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from research.loops.signals import handled


@dataclass
class Preemption:
    """A cluster's launcher wants this job to leave, by a signal that it answers itself.

    submitit writes the job down to be started again, and exits; or, where that is not allowed any more, raises. First
    the trial is stopped as SIGTERM stops it, after the step that it is in and with a checkpoint.

    told    name of the signal, once it has come
    answer  the launcher's own handler, which does not come back; None where the launcher has none
    """

    told: str = ""
    answer: Callable[[], None] | None = None

    @contextmanager
    def watched(self) -> Iterator["Preemption"]:
        """Note the signal inside, and stop what is at work; outside the launcher's handler stands again."""
        number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", None)
        own = signal.getsignal(number) if number is not None else None
        if number is None or number is signal.SIGTERM or not callable(own):
            yield self
            return
        handler: Callable[[int, FrameType | None], Any] = own

        def note(received: int, frame: FrameType | None) -> None:
            self.told, self.answer = signal.Signals(received).name, lambda: handler(received, frame)
            os.kill(os.getpid(), signal.SIGTERM)

        with handled({number: note}):
            yield self


def as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """A handler that ends as Ctrl-C does: what is begun is told, and waits to be gone on with."""
    raise KeyboardInterrupt(signal.Signals(number).name)
