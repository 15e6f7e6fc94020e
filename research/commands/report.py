"""distill report: rebuild a study's table, figure, verdict and README table from its committed records alone.

  distill report experiments/mnist_soft_targets
  distill report experiments/mnist_soft_targets preset=smoke
  distill report experiments                         every study that has records, and the table in README.md
  distill report outputs/sweeps/NAME                 a sweep's trials, best.yaml and figures, also while it runs
  distill report outputs/stores/sum5                 the page of a trace store: kept and dropped traces, mask, reasons

Studies need neither torch nor the run folders, and give the same bytes every time.
"""

from pathlib import Path

from omegaconf import DictConfig

GROUPS = ()


def task(cfg: DictConfig) -> None:
    """Rebuild one study's results, those of a folder of studies, or the page of a trace store."""
    from hydra.core.global_hydra import GlobalHydra

    from research.commands.study import print_report, study_folder
    from research.sweeps.sweep_command import composer
    from research.sweeps.sweep_report import is_sweep, report_again

    if cfg.folder and (Path(cfg.folder) / "manifest.json").exists() and (Path(cfg.folder) / "data").is_dir():
        from research.sweeps.traces_job import rebuild_explorer

        print(f"written: {rebuild_explorer(Path(cfg.folder))}")
    elif cfg.folder and is_sweep(Path(cfg.folder)):
        loader = GlobalHydra.instance().config_loader()
        print(report_again(Path(cfg.folder), {"distill train": composer(loader, "train")}))
    elif cfg.folder and not (Path(cfg.folder) / "study.yaml").exists() and any(Path(cfg.folder).glob("*/study.yaml")):
        _report_all(Path(cfg.folder))
    else:
        print_report(study_folder(cfg.folder), cfg.preset)


def _report_all(experiments: Path) -> None:
    from research.results.collect import RECORDS_FILE
    from research.results.overview import overview_table, write_overview
    from research.results.report import build_report

    for path in sorted(experiments.glob("*/study.yaml")):
        if (path.parent / RECORDS_FILE).exists():
            build_report(path.parent)
        else:
            print(f"{path.parent}: no records yet, left out")
    print(overview_table(experiments))
    readme = experiments.resolve().parent / "README.md"
    if readme.exists() and write_overview(readme, experiments):
        print(f"table written into {readme.name}")
