"""distill study: run every cell of a study (arms x levels x seeds), then write its results and verdict.

  distill study experiments/mnist_soft_targets
  distill study experiments/mnist_soft_targets hydra/launcher=joblib hydra.launcher.n_jobs=2
  distill study experiments/mnist_soft_targets preset=smoke
  distill study experiments/mnist_soft_targets 'overrides=["trainer=smoke"]'     a trial: nothing of it is reported

Finished cells are skipped, an interrupted one goes on from its checkpoint: run the same command again after a kill.
"""

from pathlib import Path

from omegaconf import DictConfig

GROUPS = ()


def study_folder(folder: str | None) -> Path:
    """The folder of a study. Raises ConfigError where it is not given or holds no study.yaml."""
    from research.errors import ConfigError

    known = ", ".join(sorted(str(path.parent) for path in Path("experiments").glob("*/study.yaml"))) or "none here"
    if not folder:
        raise ConfigError(f"which study? give its folder, one of: {known}")
    if not (Path(folder) / "study.yaml").exists():
        raise ConfigError(f"{folder} holds no study.yaml; expected one of: {known}")
    return Path(folder)


def print_report(folder: Path, preset: str | None) -> None:
    """Build the report of a study and print its table, its verdict and where the files are."""
    from research.results.report import build_report
    from research.results.terminal import study_table, verdict_line

    paths = build_report(folder, preset)
    print(study_table(folder, preset))
    print(f"\n{verdict_line(folder, preset)}\n")
    print("\n".join(f"{name:13s} {path}" for name, path in paths.items()))


def task(cfg: DictConfig) -> None:
    """Run one study and report it."""
    from hydra.core.hydra_config import HydraConfig

    from research.sweeps.study_runner import StudyRunner

    folder = study_folder(cfg.folder)
    chosen = [
        text for text in HydraConfig.get().overrides.hydra if text.startswith(("hydra/launcher", "hydra.launcher"))
    ]
    kind = "trial" if cfg.overrides else cfg.preset or "runs"
    runner = StudyRunner(
        folder,
        runs_dir=Path(cfg.runs_dir or f"{cfg.paths.output_dir}/studies/{folder.name}/{kind}"),
        shared_dir=Path(cfg.paths.output_dir) / "shared",
        preset=cfg.preset,
        extra=list(cfg.overrides),
        launcher=chosen,
    )
    runner.run()
    if cfg.overrides:
        print(f"a trial with {', '.join(cfg.overrides)}: its runs are in {runner.runs_dir}")
    elif cfg.report:
        print_report(folder, cfg.preset)
