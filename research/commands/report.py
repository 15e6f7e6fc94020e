"""distill report: rebuild a study's table, figure, verdict and README table from its committed records alone.

  distill report experiments/mnist_soft_targets
  distill report experiments/mnist_soft_targets preset=smoke
"""

from omegaconf import DictConfig

GROUPS = "(none)"


def task(cfg: DictConfig) -> None:
    """Rebuild one study's results; needs neither torch nor the runs."""
    from research.commands.study import study_folder
    from research.results.report import build_report

    folder = study_folder(cfg.folder)
    for path in build_report(folder, cfg.preset).values():
        print(path)
