"""The trials of one sweep in Optuna's storage: taken, leased, told, and given back when their process died.

A sweep of n trials begins as n waiting trials. To take one is a compare-and-swap in the storage, so that no number of
processes on any number of machines runs a trial twice or one too many; values are drawn when it is taken. A trial that
was interrupted waits again, with its number, its values and its folder.
"""

import functools
import math
import threading
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from research.errors import ConfigError
from research.sweeps.engines import StorageSpec, build_pruner, build_sampler
from research.sweeps.owners import Beats, this_process
from research.sweeps.search_space import Parameter, SearchSpace

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

TRACEBACK_LINES = 30
LONGEST_LINE, LONGEST_REASON = 400, 2000


@dataclass(frozen=True)
class SweepTerms:
    """What every process of a sweep must know; small, and pickled to workers.

    objectives     names of the metrics that a task returns in a mapping; empty: it returns the values themselves
    directions     minimize or maximize, one for each objective
    constraints    name of a returned metric -> the greatest value with which a trial is feasible
    box            name of an objective -> its worst and best value that matter; see :meth:`TrialStore.hypervolume`
    lease_s        seconds between the signs of life of a running trial
    stale_s        seconds without one after which a trial of another machine counts as interrupted
    max_attempts   how often an interrupted trial is begun before it has failed
    retries        how often a failed trial's point is tried again, as a trial of its own
    """

    storage: StorageSpec
    name: str
    directions: tuple[str, ...] = ("minimize",)
    objectives: tuple[str, ...] = ()
    constraints: Mapping[str, float] = field(default_factory=dict)
    box: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "random"})
    pruner: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    fixed: Mapping[str, Any] = field(default_factory=dict)
    lease_s: float = 10.0
    stale_s: float = 60.0
    max_attempts: int = 5
    retries: int = 0


@dataclass(frozen=True)
class Counts:
    """The trials of a sweep by what became of them. Failed ones that were retried, and copied ones, are left out."""

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    waiting: int = 0

    @property
    def finished(self) -> int:
        """Trials that count towards the target."""
        return self.complete + self.pruned + self.failed

    @property
    def under_way(self) -> int:
        """Trials that are finished, or will be."""
        return self.finished + self.running

    @property
    def total(self) -> int:
        """All of them."""
        return self.finished + self.running + self.waiting


class TrialStore:
    """One process's view of a sweep's trials; opened at first use, so that it can be pickled."""

    def __init__(self, terms: SweepTerms) -> None:
        self.terms = terms
        self._beats = Beats(terms.stale_s)
        self._storage: Any = None
        self._sampler: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"terms": self.terms}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["terms"])  # type: ignore[misc]

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def storage(self) -> Any:
        """Optuna's storage."""
        if self._storage is None:
            self._storage = self.terms.storage.open()
        return self._storage

    def study(self, sampler: Any = None) -> "optuna.Study":
        """Optuna's study, read anew; with the sweep's pruner, and a sampler that draws nothing where none is given."""
        import optuna

        sampler = sampler or optuna.samplers.RandomSampler(seed=0)
        pruner = build_pruner(self.terms.pruner)
        return optuna.load_study(study_name=self.terms.name, storage=self.storage, sampler=sampler, pruner=pruner)

    def trials(self) -> "list[FrozenTrial]":
        """Every trial of the sweep itself, by number: none copied from another study, none that was one too many."""
        found = self.study().get_trials(deepcopy=False)
        return [trial for trial in found if not {"copied_from", "surplus"} & trial.user_attrs.keys()]

    def trial(self, number: int) -> "FrozenTrial":
        """One trial."""
        return self.study().get_trials(deepcopy=False)[number]

    def counts(self) -> Counts:
        """How many trials came how far."""
        from optuna.trial import TrialState

        names = {
            TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
            TrialState.RUNNING: "running", TrialState.WAITING: "waiting",
        }  # fmt: skip
        found = dict.fromkeys(names.values(), 0)
        for trial in self.trials():
            if "retried" not in trial.user_attrs:
                found[names[trial.state]] += 1
        return Counts(**found)

    def best_trials(self) -> "list[FrozenTrial]":
        """The best complete trial, or those of several objectives that none beats in all; feasible ones alone."""
        import optuna
        from optuna.trial import TrialState

        done = [t for t in self.trials() if t.state is TrialState.COMPLETE and is_feasible(t)]
        signs = [-1.0 if direction == "maximize" else 1.0 for direction in self.terms.directions]
        if len(signs) > 1:
            directions: Any = list(self.terms.directions)
            study = optuna.create_study(directions=directions)
            study.add_trials(done)
            numbers = {trial.number for trial in study.best_trials}
            return [trial for position, trial in enumerate(done) if position in numbers]
        return sorted(done, key=lambda trial: (signs[0] * trial.values[0], trial.number))[:1]

    def hypervolume(self) -> float | None:
        """The share of the box from worst to best of two objectives that the trials dominate; None without a box."""
        names = self.terms.objectives
        if len(names) != 2 or set(self.terms.box) != set(names):
            return None
        points = []
        for trial in self.best_trials():
            (x, y) = (_scaled(value, *self.terms.box[name]) for name, value in zip(names, trial.values, strict=True))
            points.append((x, y))
        area, reached = 0.0, 0.0
        for x, y in sorted(points, reverse=True):  # from the best of the first objective on
            area += x * max(0.0, y - reached)
            reached = max(reached, y)
        return area

    # -- making and taking --------------------------------------------------------------------------------------------

    def add_tickets(self, points: Sequence[Mapping[str, Any] | None], target: int | None = None) -> None:
        """Add waiting trials: with the values of a point; None: the sampler draws them when the trial is taken.

        target  take back those of them that other processes, which added some at the same time, make one too many
        """
        from optuna.trial import TrialState, create_trial

        study, mine = self.study(), {"added_by": uuid.uuid4().hex}
        for point in points:
            if point is None:
                study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=mine))
            else:
                study.enqueue_trial(dict(point), user_attrs=mine)
        if target is not None:
            self.take_back_surplus(target, mine["added_by"])

    def take_back_surplus(self, target: int, added_by: str | None = None) -> None:
        """Take back waiting trials beyond the target which were never begun: of one process, or of any."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        counted = [trial for trial in self.trials() if "retried" not in trial.user_attrs]
        for trial in counted[target:]:
            is_meant = added_by is None or trial.user_attrs.get("added_by") == added_by
            if trial.state is TrialState.WAITING and is_meant and "folder" not in trial.user_attrs:
                try:
                    with self.terms.storage.exclusively():
                        taken = self.storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING)
                except UpdateFinishedTrialError:
                    continue
                if taken:
                    self.storage.set_trial_user_attr(trial._trial_id, "surplus", True)
                    self.study().tell(trial.number, state=TrialState.FAIL)

    def take(self, space: SearchSpace, seed: int | None) -> "Trial | None":
        """The next waiting trial, now running and leased to this process, its values drawn; None where none waits.

        seed   of this process's sampler, read at the first call
        """
        import optuna

        if self._sampler is None:
            self._sampler = self._partly_fixed(build_sampler(self.terms.sampler, seed))
        trial_id = self._claim()
        if trial_id is None:
            return None
        trial = optuna.trial.Trial(self.study(self._sampler), trial_id)
        space.draw(functools.partial(_suggest, trial))
        return trial

    def _claim(self) -> int | None:
        """Turn the first waiting trial into a running one of this process; its id."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        study_id = self.storage.get_study_id_from_name(self.terms.name)
        with self.terms.storage.exclusively():
            for waiting in self.storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,)):
                try:
                    if self.storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                        self._write_lease(waiting._trial_id, 0)
                        return int(waiting._trial_id)
                except UpdateFinishedTrialError:
                    continue
        return None

    def _partly_fixed(self, sampler: Any) -> Any:
        import optuna

        fixed = dict(self.terms.fixed)
        return optuna.samplers.PartialFixedSampler(fixed, sampler) if fixed else sampler

    # -- leases -------------------------------------------------------------------------------------------------------

    @contextmanager
    def leased(self, number: int) -> Iterator["Trial"]:
        """Hold a running trial: its owner is this process, which gives signs of life from a thread meanwhile."""
        import optuna
        from optuna.exceptions import UpdateFinishedTrialError

        trial = self.trial(number)
        held = optuna.trial.Trial(self.study(), trial._trial_id)
        held.set_user_attr("attempts", int(trial.user_attrs.get("attempts", 0)) + 1)
        self._write_lease(trial._trial_id, 0)
        stop = threading.Event()

        def beat() -> None:
            storage, count = self.storage if self.terms.storage.name == "memory" else None, 0
            while not stop.wait(self.terms.lease_s):
                count += 1
                try:
                    storage = storage or self.terms.storage.open()
                    storage.set_trial_user_attr(trial._trial_id, "lease", {**this_process(), "beat": count})
                except UpdateFinishedTrialError:
                    return  # told meanwhile
                except Exception:
                    continue  # the storage is out of reach for now

        thread = threading.Thread(target=beat, daemon=True, name=f"lease of trial {number}")
        thread.start()
        try:
            yield held
        finally:
            stop.set()
            thread.join()

    def _write_lease(self, trial_id: int, beat: int) -> None:
        self.storage.set_trial_user_attr(trial_id, "lease", {**this_process(), "beat": beat})

    def give_back_stale(self, among: Sequence[int] | None = None) -> list[int]:
        """Let trials wait again whose process died, and fail those begun too often; returns their numbers.

        among  look at these alone
        """
        from optuna.trial import TrialState

        found = []
        for trial in self.trials():
            if trial.state is not TrialState.RUNNING or (among is not None and trial.number not in among):
                continue
            lease = trial.user_attrs.get("lease")
            if self._beats.is_stale(trial.number, lease) and self.trial(trial.number).user_attrs.get("lease") == lease:
                found.append(trial.number)
                self.interrupted(trial.number, "its process died")
        return found

    # -- telling ------------------------------------------------------------------------------------------------------

    def interrupted(self, number: int, reason: str, *, counts: bool = True) -> None:
        """A running trial waits again, or has failed where it was begun `max_attempts` times.

        counts  False: a stop that was asked for, which is no fault of the trial
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial = self.trial(number)
        attempts = int(trial.user_attrs.get("attempts", 0))
        if trial.state is not TrialState.RUNNING:
            return
        if counts and attempts >= self.terms.max_attempts:
            self.failed(number, f"begun {attempts} times and never ended; at last {reason}", "")
            return
        try:
            if not counts:
                self.storage.set_trial_user_attr(trial._trial_id, "attempts", max(0, attempts - 1))
            self.storage.set_trial_user_attr(trial._trial_id, "interrupted", _cut(reason, LONGEST_REASON))
            # whoever takes it next writes a lease of its own, and is not to be seen with that of the dead before
            self.storage.set_trial_user_attr(trial._trial_id, "lease", None)
            self.storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)
        except UpdateFinishedTrialError:
            pass  # it ended after all

    def note_folder(self, number: int, folder: str) -> None:
        """Keep where a trial's run is to lie."""
        self.storage.set_trial_user_attr(self.trial(number)._trial_id, "folder", folder)

    def complete(self, number: int, returned: Any) -> None:
        """Tell the value of a trial that ran to its end; one that is no value fails it, with the reason."""
        try:
            values = self.values_of(returned)
        except ConfigError as error:
            self.failed(number, str(error), "")
            return
        trial_id = self.trial(number)._trial_id
        if isinstance(returned, Mapping):
            self._keep_metrics(trial_id, returned)
        self.study().tell(number, values, skip_if_finished=True)

    def pruned(self, number: int, reason: str) -> None:
        """Tell that a trial was stopped early; its last report stays with it."""
        from optuna.trial import TrialState

        trial = self.trial(number)
        if not trial.state.is_finished():
            self.storage.set_trial_user_attr(trial._trial_id, "reason", _cut(reason or "pruned", LONGEST_REASON))
        self.study().tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def failed(self, number: int, reason: str, trace: str) -> None:
        """Tell that a trial failed, and try its point again where retries are left."""
        from optuna.trial import TrialState

        trial = self.trial(number)
        if trial.state.is_finished():
            return
        again = int(trial.user_attrs.get("retry", 0)) < self.terms.retries
        tail = [_cut(line, LONGEST_LINE) for line in trace.splitlines()[-TRACEBACK_LINES:]]
        self.storage.set_trial_user_attr(trial._trial_id, "reason", _cut(reason, LONGEST_REASON))
        self.storage.set_trial_user_attr(trial._trial_id, "traceback", "\n".join(tail))
        if again:
            self.storage.set_trial_user_attr(trial._trial_id, "retried", True)
        study = self.study()
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        if again:
            count = int(trial.user_attrs.get("retry", 0)) + 1
            study.enqueue_trial(trial.params, user_attrs={"retry_of": number, "retry": count})

    def values_of(self, returned: Any) -> list[float]:
        """The objectives' values in what a task returned. Raises ConfigError where there are others, or none."""
        names, count = self.terms.objectives, len(self.terms.directions)
        if names:
            if not isinstance(returned, Mapping):
                raise ConfigError(
                    f"the task returned {_short(returned)}; the objectives {', '.join(names)} need a mapping"
                )
            absent = [name for name in names if returned.get(name) is None]
            if absent:
                known = ", ".join(sorted(str(key) for key in returned)) or "nothing"
                raise ConfigError(f"the task returned no {', '.join(absent)}; it returned {known}")
            returned = [returned[name] for name in names]
        values = list(returned) if isinstance(returned, list | tuple) else [returned]
        if len(values) != count:
            raise ConfigError(f"the task returned {len(values)} values; the study has {count} objectives")
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):
            raise ConfigError(f"the task returned {_short(returned)}; expected a number for each objective") from None
        if not all(map(math.isfinite, numbers)):
            raise ConfigError(f"the task returned {numbers}, which is not finite")
        return numbers

    def _keep_metrics(self, trial_id: int, returned: Mapping[str, Any]) -> None:
        """Keep what a task returned beside its objectives, and how far each constraint is overstepped."""
        import optuna

        told = {str(key): float(value) for key, value in returned.items() if isinstance(value, int | float)}
        self.storage.set_trial_user_attr(trial_id, "metrics", told)
        trial = optuna.trial.Trial(self.study(), trial_id) if self.terms.constraints else None
        for name, bound in self.terms.constraints.items():
            if trial is not None:
                trial.set_constraint(name, told.get(name, math.inf) - bound)


def _suggest(trial: "Trial", parameter: Parameter) -> Any:
    if parameter.choices:
        return trial.suggest_categorical(parameter.name, [choice.stored for choice in parameter.choices])
    if parameter.is_int:
        step = int(parameter.step or 1)
        return trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), step=step, log=parameter.log)
    return trial.suggest_float(parameter.name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)


def _scaled(value: float, worst: float, best: float) -> float:
    """Where a value lies between worst (0) and best (1), whichever of them is greater."""
    return min(1.0, max(0.0, (value - worst) / (best - worst)))


def is_feasible(trial: "FrozenTrial") -> bool:
    """Whether a trial oversteps no constraint."""
    return all(overstepped <= 0 for overstepped in trial.constraints.values())


def _cut(text: str, length: int) -> str:
    """A text short enough for any storage, without what no file can hold: lone surrogates and NUL."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def trace_of(error: BaseException) -> str:
    """The traceback of an error as text."""
    return "".join(traceback.format_exception(error))
