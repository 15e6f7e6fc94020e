"""How a sweep is to be run: its target, its way of running, and the limits that end it before."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from research.errors import ConfigError
from research.sweeps.trial_constraints import is_feasible, ran_out_of_memory
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_values import is_retried

MODES = ("batch", "workers")


@dataclass(frozen=True)
class SweepLimits:
    """When a sweep ends before its last trial. None: no such limit.

    timeout           seconds of this command
    target            value of the one objective that is good enough
    patience          finished trials in a row without a better value that is feasible; pruned, failed and out-of-memory
                      ones are left out
    max_failures      failed trials that are borne
    max_failure_rate  share of the finished trials, of at least ten
    """

    timeout: float | None = None
    target: float | None = None
    patience: int | None = None
    max_failures: int | None = None
    max_failure_rate: float | None = None

    def reason(self, store: TrialStore, started: float) -> str | None:
        """Why no further trial is begun; None: go on. Raises ConfigError where too many have failed."""
        from optuna.trial import TrialState

        if self.timeout is not None and time.time() - started >= self.timeout:
            return f"timeout of {self.timeout} s"
        if not any((self.target, self.target == 0, self.patience, self.max_failures == 0, self.max_failures,
                    self.max_failure_rate is not None)):  # fmt: skip
            return None
        trials = [trial for trial in store.trials() if trial.state.is_finished() and not is_retried(trial)]
        self._check_failures([trial for trial in trials if trial.state is TrialState.FAIL], len(trials), store)
        sign = -1.0 if store.terms.directions[0] == "maximize" else 1.0
        complete = [t for t in trials if t.state is TrialState.COMPLETE and not ran_out_of_memory(t)]
        signed = [sign * float(t.values[0]) if is_feasible(t) else math.inf for t in complete]
        best = store.best_trials() if self.target is not None else []
        if self.target is not None and best and sign * best[0].values[0] <= sign * self.target:
            return f"the target {self.target} is reached"
        if (
            self.patience is not None
            and len(signed) > self.patience
            and min(signed[-self.patience :]) >= min(signed[: -self.patience])
        ):
            return f"{self.patience} trials in a row were no better"
        return None

    def _check_failures(self, failed: list[Any], finished: int, store: TrialStore) -> None:
        count, rate = len(failed), len(failed) / max(1, finished)
        too_many = self.max_failures is not None and count > self.max_failures
        too_often = self.max_failure_rate is not None and finished >= 10 and rate > self.max_failure_rate
        if too_many or too_often:
            last = failed[-1]
            key = "max_failures" if too_many else "max_failure_rate"
            raise ConfigError(
                f"{count} of {finished} trials failed ({key}={getattr(self, key)}); trial {last.number} with "
                f"{last.user_attrs.get('reason')} in {last.user_attrs.get('folder')}. What is finished stays, failures "
                f"too: once that is mended, start again with a greater hydra.sweeper.{key}, or null for no limit"
            )


@dataclass(frozen=True)
class SweepPlan:
    """What is to be swept.

    n_trials   trials that the study has in the end, those of earlier commands included
    n_jobs     at once: of a batch, or workers
    mode       batch: so many trials are launched and waited for, together; workers: each takes the next one at once
    enqueue    points to try first: parameter name -> value
    copy_from  storage URL or journal file and name of a study whose finished trials the sampler shall know
    """

    n_trials: int
    n_jobs: int = 1
    mode: str = "batch"
    enqueue: tuple[Mapping[str, Any], ...] = ()
    copy_from: Mapping[str, Any] = field(default_factory=dict)
    resume: str = "auto"
    on_change: str = "refuse"
    limits: SweepLimits = field(default_factory=SweepLimits)
    sampler_seed: int | None = None

    def check(self) -> None:
        """Raise ConfigError for numbers and words that make no sweep."""
        if self.mode not in MODES:
            raise ConfigError(f"hydra.sweeper.mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        for key in ("n_trials", "n_jobs"):
            if getattr(self, key) < 1:
                raise ConfigError(f"hydra.sweeper.{key} is {getattr(self, key)}; expected at least 1")
        if self.limits.patience is not None and self.limits.patience < 1:
            raise ConfigError(f"hydra.sweeper.patience is {self.limits.patience}; expected at least 1, or null")
