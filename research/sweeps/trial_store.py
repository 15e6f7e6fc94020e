"""The trials of one sweep in Optuna's storage: taken, leased, told, and given back when their process died.

A sweep of n trials begins as n waiting trials. To take one is a compare-and-swap in the storage, so that no number of
processes on any number of machines runs a trial twice or one too many; values are drawn when it is taken. A trial that
was interrupted waits again, with its number, its values and its folder.
"""

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from research.errors import ConfigError
from research.sweeps.engines import build_pruner, build_sampler
from research.sweeps.owners import Beats, is_alive, is_same_machine, is_this_process, this_process
from research.sweeps.repeating import repeating
from research.sweeps.search_space import SearchSpace
from research.sweeps.sweep_terms import Counts, SweepTerms
from research.sweeps.trial_constraints import (
    drawing_beside_infinite,
    is_feasible,
    keep_constraints,
    overstepped,
    overstepped_without_memory,
    ran_out_of_memory,
    worst_values,
)
from research.sweeps.trial_values import cut, dominated_share, is_retried, values_of

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger(__name__)
TRACEBACK_LINES = 30
DRAWN_ALONE = ("qmc", "brute_force")  # two processes that draw at once would draw the same point
LONGEST_LINE, LONGEST_REASON = 400, 2000
ANY = object()  # whatever lease a trial has


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

    def exclusively(self) -> AbstractContextManager[None]:
        """The lock of this study, where its storage has one."""
        return self.terms.storage.exclusively(self.terms.name)

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

    def running_here(self) -> list[int]:
        """The numbers of the running trials whose lease names this process, whether it works on them or not."""
        return [
            trial.number
            for trial in self.trials()
            if trial.state.name == "RUNNING" and is_this_process(trial.user_attrs.get("lease"))
        ]

    def counts(self) -> Counts:
        """How many trials came how far."""
        from optuna.trial import TrialState

        names = {
            TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
            TrialState.RUNNING: "running", TrialState.WAITING: "waiting",
        }  # fmt: skip
        found = dict.fromkeys((*names.values(), "out_of_memory"), 0)
        for trial in self.trials():
            if not is_retried(trial):
                found["out_of_memory" if ran_out_of_memory(trial) else names[trial.state]] += 1
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
        return dominated_share(self.terms, self.best_trials())

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

        counted = [trial for trial in self.trials() if not is_retried(trial)]
        for trial in counted[target:]:
            is_meant = added_by is None or trial.user_attrs.get("added_by") == added_by
            if trial.state is TrialState.WAITING and is_meant and "folder" not in trial.user_attrs:
                try:
                    with self.exclusively():
                        taken = self.storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING)
                except UpdateFinishedTrialError:
                    continue
                if taken:
                    self.storage.set_trial_user_attr(trial._trial_id, "surplus", True)
                    self.study().tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def take(self, space: SearchSpace, seed: int | None, sequence: int | None = None) -> "Trial | None":
        """The next waiting trial, now running and leased to this process, its values drawn; None where none waits.

        seed      of this process's sampler, read at the first call
        sequence  seed that all processes share, of a sampler that goes along one sequence; None: as `seed`
        An error while drawing comes through, and the trial waits again.
        """
        import optuna

        if self._sampler is None:
            self._sampler = self._partly_fixed(build_sampler(self.terms.sampler, seed, sequence))
        trial_id = self._claim()
        if trial_id is None:
            return None
        hangs_on_others = self.terms.sampler["name"] in DRAWN_ALONE
        lock = self.exclusively if hangs_on_others else nullcontext
        try:
            with lock(), drawing_beside_infinite(self.terms):
                trial = optuna.trial.Trial(self.study(self._sampler), trial_id)
                space.draw(lambda parameter: parameter.suggest(trial))
        except BaseException as error:  # it would run by name alone for as long as this process lives
            told = f"its values could not be drawn: {type(error).__name__}: {error}"
            self.interrupted(self.storage.get_trial_number_from_id(trial_id), told, counts=False)
            raise
        return trial

    def _claim(self) -> int | None:
        """Turn the first waiting trial into a running one of this process; its id."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        study_id = self.storage.get_study_id_from_name(self.terms.name)
        with self.exclusively():
            for waiting in self.storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.WAITING,)):
                try:
                    if self.storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                        self._write_lease(waiting._trial_id, 0)
                        return int(waiting._trial_id)
                except UpdateFinishedTrialError:
                    continue
        return None

    def holds(self, number: int, controller: Mapping[str, Any]) -> bool:
        """Whether a trial is this job's to run: its controller took it, or it waits again since the job was preempted.

        A waiting one is taken, unless another process is quicker; one of a dead process of this machine is taken over.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with self.exclusively():
            trial = self.trial(number)
            lease = trial.user_attrs.get("lease") or {}
            if trial.state is TrialState.RUNNING:
                owner = {key: lease.get(key) for key in this_process()}
                is_left = owner == dict(controller) or (is_same_machine(lease) and not is_alive(lease))
                if is_left and not is_this_process(lease):  # from here on no other job finds it left to it
                    self._write_lease(trial._trial_id, 0)
                return is_left or is_this_process(lease)
            try:
                taken = trial.state is TrialState.WAITING and self.storage.set_trial_state_values(
                    trial._trial_id, state=TrialState.RUNNING
                )
            except UpdateFinishedTrialError:
                return False
            if taken:
                self._write_lease(trial._trial_id, 0)
        return bool(taken)

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
        if not is_this_process(trial.user_attrs.get("lease")):  # claimed by the controller, for this job
            self._write_lease(trial._trial_id, 0)
        storage, count = self.storage if self.terms.storage.name == "memory" else None, 0

        def beat() -> bool:
            nonlocal storage, count
            count += 1
            try:
                storage = storage or self.terms.storage.open()
                storage.set_trial_user_attr(trial._trial_id, "lease", {**this_process(), "beat": count})
            except UpdateFinishedTrialError:
                return False  # told meanwhile
            except Exception:
                log.debug("the storage is out of reach for now", exc_info=True)
            return True

        with repeating(beat, self.terms.lease_s, f"lease of trial {number}"):
            yield held

    def _write_lease(self, trial_id: int, beat: int) -> None:
        self.storage.set_trial_user_attr(trial_id, "lease", {**this_process(), "beat": beat})

    def give_back_stale(self, among: Sequence[int] | None = None) -> list[int]:
        """Let trials wait again whose process died, and fail those begun too often; returns their numbers.

        among  look at these alone
        """
        from optuna.trial import TrialState

        found, running = [], self.study().get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in running:
            if "surplus" in trial.user_attrs:  # who took it back has died before it could tell
                self.study().tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                continue
            if among is not None and trial.number not in among:
                continue
            lease = trial.user_attrs.get("lease")
            if self._beats.is_stale(trial.number, lease) and self.interrupted(
                trial.number, "its process died", lease=lease
            ):
                found.append(trial.number)
        return found

    # -- telling ------------------------------------------------------------------------------------------------------

    def interrupted(
        self, number: int, reason: str, *, counts: bool = True, lease: Mapping[str, Any] | object | None = ANY
    ) -> bool:
        """A running trial waits again, or has failed where it was begun `max_attempts` times; whether this changed it.

        counts  False: a stop that was asked for, which is no fault of the trial
        lease   only where it is still this one: of those who see a process dead one gives its trial back
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with self.exclusively():
            trial = self.trial(number)
            attempts = int(trial.user_attrs.get("attempts", 0))
            if trial.state is not TrialState.RUNNING or lease not in (ANY, trial.user_attrs.get("lease")):
                return False
            if counts and attempts >= self.terms.max_attempts:
                self.failed(number, f"begun {attempts} times and never ended; at last {reason}", "")
                return True
            try:
                if not counts:
                    self.storage.set_trial_user_attr(trial._trial_id, "attempts", max(0, attempts - 1))
                self.storage.set_trial_user_attr(trial._trial_id, "interrupted", cut(reason, LONGEST_REASON))
                # whoever takes it next writes a lease of its own, and is not to be seen with that of the dead before
                self.storage.set_trial_user_attr(trial._trial_id, "lease", None)
                self.storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)
            except UpdateFinishedTrialError:
                return False  # it ended after all
        return True

    def note_folder(self, number: int, folder: str) -> None:
        """Keep where a trial's run is to lie."""
        self.storage.set_trial_user_attr(self.trial(number)._trial_id, "folder", folder)

    def complete(self, number: int, returned: Any) -> None:
        """Tell the value of a trial that ran to its end; one that is no value fails it, with the reason."""
        trial = self.trial(number)
        try:
            values = values_of(self.terms, returned)
        except ConfigError as error:
            self.failed(number, str(error), "")
            return
        if trial.state.is_finished():
            return
        metrics = returned if isinstance(returned, Mapping) else {}
        told = {str(key): float(value) for key, value in metrics.items() if isinstance(value, int | float)}
        if metrics:
            self.storage.set_trial_user_attr(trial._trial_id, "metrics", told)
        keep_constraints(self.storage, trial._trial_id, overstepped(self.terms, told))
        self.study().tell(number, values, skip_if_finished=True)

    def out_of_memory(self, number: int, reason: str, trace: str) -> None:
        """Tell that a trial did not fit into memory: it failed, or, where the sweep says so, it is infeasible.

        Infeasible, the sampler learns of it, and it is not tried again; see `trial_constraints`.
        """
        trial = self.trial(number)
        if self.terms.out_of_memory != "constraint":
            self.failed(number, reason, trace)
        elif not trial.state.is_finished():
            self._keep_reason(trial._trial_id, reason, trace)
            keep_constraints(self.storage, trial._trial_id, overstepped_without_memory(self.terms))
            self.study().tell(number, worst_values(self.terms), skip_if_finished=True)

    def pruned(self, number: int, reason: str) -> None:
        """Tell that a trial was stopped early; its last report stays with it."""
        from optuna.trial import TrialState

        trial = self.trial(number)
        if not trial.state.is_finished():
            self.storage.set_trial_user_attr(trial._trial_id, "reason", cut(reason or "pruned", LONGEST_REASON))
        self.study().tell(number, state=TrialState.PRUNED, skip_if_finished=True)

    def failed(self, number: int, reason: str, trace: str) -> None:
        """Tell that a trial failed, and try its point again where retries are left."""
        from optuna.trial import TrialState

        trial = self.trial(number)
        if trial.state.is_finished():
            return
        again = int(trial.user_attrs.get("retry", 0)) < self.terms.retries
        self._keep_reason(trial._trial_id, reason, trace)
        if again:
            self.storage.set_trial_user_attr(trial._trial_id, "retried", True)
        self.study().tell(number, state=TrialState.FAIL, skip_if_finished=True)
        if again:
            self._enqueue_retry(trial)

    def _keep_reason(self, trial_id: int, reason: str, trace: str) -> None:
        tail = [cut(line, LONGEST_LINE) for line in trace.splitlines()[-TRACEBACK_LINES:]]
        self.storage.set_trial_user_attr(trial_id, "reason", cut(reason, LONGEST_REASON))
        self.storage.set_trial_user_attr(trial_id, "traceback", "\n".join(tail))

    def _enqueue_retry(self, trial: "FrozenTrial") -> None:
        count = int(trial.user_attrs.get("retry", 0)) + 1
        self.study().enqueue_trial(trial.params, user_attrs={"retry_of": trial.number, "retry": count})

    def enqueue_lost_retries(self) -> None:
        """Add the retries of failed trials whose process died between telling the failure and adding them."""
        trials = self.trials()
        retries = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            if is_retried(trial) and trial.number not in retries:
                self._enqueue_retry(trial)
