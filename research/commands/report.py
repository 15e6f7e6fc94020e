"""distill report: rebuild a study's table, figure, verdict and README table from its committed records alone.

  distill report experiments/mnist_soft_targets
  distill report experiments/mnist_soft_targets preset=smoke
"""

from omegaconf import DictConfig

GROUPS = ()


def task(cfg: DictConfig) -> None:
    """Rebuild one study's results; needs neither torch nor the runs."""
    from research.commands.study import print_report, study_folder

    folder = study_folder(cfg.folder)
    print_report(folder, cfg.preset)
