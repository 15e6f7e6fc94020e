"""distill train: fit one student, evaluate it once, leave one record.

  distill train                                                   a small network on scikit-learn's digits
  distill train experiment=mnist_soft_target method.temperature=4 seed=1
  distill train -m experiment=mnist_soft_target seed=0,1,2 method.temperature=2,8,20
  distill train ckpt_path=last hydra.run.dir=FOLDER               go on with an interrupted run, in its own folder
  distill train experiment=mnist_hard trainer=smoke               any experiment, shrunk to seconds
  distill train debug=fast | debug=overfit | debug=profile
  distill train --cfg job --resolve                               print the composed config and stop

The folder outputs/NAME/TIME holds the composed config, the log, checkpoints, the student and its record.
"""

from typing import Any

from omegaconf import DictConfig

GROUPS = (
    "data", "task", "template", "model@student", "teacher", "teacher@reference", "signal_transform", "method",
    "optimizer", "scheduler", "loop", "early_stopping", "trainer", "logger", "experiment", "hparams_search", "debug",
)  # fmt: skip
SHOWN = (
    "errors", "accuracy", "nll", "ece", "agreement_at_1", "kl_teacher_student", "process_valid_pass_at_1", "truncated",
    "sampled_pass_at_1",
)  # fmt: skip


def task(cfg: DictConfig) -> Any:
    """Run one training job; returns the metric named by `monitor` where it was measured, for sweeps.

    A trial of a sweep with named objectives returns every metric, and what the run cost.
    """
    from hydra.core.hydra_config import HydraConfig

    from research.sweeps.jobs import train_job, trial_cell
    from research.sweeps.trial_context import current_trial

    if current_trial() is not None:
        return trial_cell(cfg)
    metrics = train_job(cfg).metrics
    for name, value in metrics.items():
        if name.split("/")[-1] in SHOWN:
            print(f"{name:32s} {value:.6g}")
    print(f"record: {HydraConfig.get().runtime.output_dir}/run.json")
    return metrics.get(cfg.monitor)
