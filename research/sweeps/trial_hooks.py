"""What a training run does differently as a trial of a sweep: it reports, it may be pruned, it returns more."""

import warnings
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, open_dict

from research.loops.pruning_stop import PruningStop
from research.results.record import RunRecord
from research.sweeps.engines import build_pruner
from research.sweeps.storages import StorageSpec
from research.sweeps.trial_context import TrialContext, current_trial
from research.sweeps.trial_values import refuse_test_monitor


def pruning_stop(cfg: DictConfig) -> PruningStop | None:
    """The callback that reports this trial's validations; None outside a sweep, or in one without a pruner."""
    trial = current_trial()
    if trial is None or not trial.prunes:
        return None
    monitor = trial.prune_on or (trial.objectives[0] if trial.objectives else cfg.monitor)
    return PruningStop(monitor, _reporter(trial), trial.prune_step)


def as_trial(cfg: DictConfig) -> DictConfig:
    """The config of a run as one of many: it goes on where it was interrupted, and keeps quiet.

    Raises ConfigError where the sweep would select by the test split.
    """
    trial = current_trial()
    if trial is None:
        return cfg
    refuse_test_monitor(cfg, trial.objectives)
    cfg = cfg.copy()
    with open_dict(cfg):
        if cfg.ckpt_path is None:
            cfg.ckpt_path = "last"
        cfg.trainer.enable_progress_bar = False
        cfg.keep_checkpoints = False
    return cfg


def returned_by(record: RunRecord, cfg: DictConfig) -> Any:
    """What a training run returns: the metric named by `monitor`; to a sweep with named objectives, every metric.

    Beside the metrics stand `cost/flops`, `cost/tokens` and `cost/seconds`: what the run itself cost, teacher scoring
    included, the teacher's own training not.
    """
    trial = current_trial()
    if trial is None or not trial.objectives:
        return record.metrics.get(cfg.monitor)
    parts = [line for name, line in record.ledger.items() if name != "teacher_training"]
    costs = {f"cost/{kind}": sum(line.get(kind) or 0.0 for line in parts) for kind in ("flops", "tokens", "seconds")}
    return {**record.metrics, **costs}


def _reporter(trial: TrialContext) -> Callable[[float, int], bool]:
    """Reports to the sweep's study, wherever it is kept; opened at the first report."""
    opened: list[Any] = []

    def report(value: float, step: int) -> bool:
        import optuna

        if not opened:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            study = optuna.load_study(
                study_name=trial.study, storage=StorageSpec(**trial.storage).open(), pruner=build_pruner(trial.pruner),
                sampler=optuna.samplers.RandomSampler(seed=0),
            )  # fmt: skip
            trial_id = study.get_trials(deepcopy=False)[trial.number]._trial_id
            opened.append(optuna.trial.Trial(study, trial_id))
        with warnings.catch_warnings():  # a resumed run reports its last validations again
            warnings.simplefilter("ignore")
            opened[0].report(value, step)
        return bool(opened[0].should_prune())

    return report
