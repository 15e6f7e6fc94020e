"""distill study: run every cell of a study (arms x levels x seeds), then write its results and verdict.

  distill study experiments/mnist_soft_targets
  distill study experiments/mnist_soft_targets hydra/launcher=joblib hydra.launcher.n_jobs=2
  distill study experiments/mnist_soft_targets preset=smoke
  distill study experiments/mnist_soft_targets 'overrides=["trainer=smoke"]'     a trial: nothing of it is reported
  distill study experiments/demo experiments/demo_traces                         several, by the same workers

Finished cells are skipped, an interrupted one goes on from its checkpoint: run the same command again after a kill.
Of several studies the first that fails ends the command.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

GROUPS = ()


def study_folder(folder: Any) -> Path:
    """The folder of a study. Raises ConfigError where it is not given, is no text or holds no study.yaml."""
    from research.errors import ConfigError

    known = ", ".join(sorted(str(path.parent) for path in Path("experiments").glob("*/study.yaml"))) or "none here"
    if not folder:
        raise ConfigError(f"which study? give its folder, one of: {known}")
    if not isinstance(folder, str):
        raise ConfigError(f"folder is {folder!r} ({type(folder).__name__}): expected a study's folder, one of: {known}")
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
    """Run one study, or several, and report each."""
    from hydra.core.hydra_config import HydraConfig

    from research.sweeps.study_runner import StudyRunner

    folders = _folders(cfg)
    chosen = [
        text for text in HydraConfig.get().overrides.hydra if text.startswith(("hydra/launcher", "hydra.launcher"))
    ]
    kind = "trial" if cfg.overrides else cfg.preset or "runs"
    runners = [
        StudyRunner(
            folder,
            runs_dir=Path(cfg.runs_dir or f"{cfg.paths.output_dir}/studies/{folder.name}/{kind}"),
            shared_dir=Path(cfg.paths.output_dir) / "shared",
            preset=cfg.preset,
            extra=list(cfg.overrides),
            launcher=chosen,
        )
        for folder in folders
    ]
    for folder, runner in zip(folders, runners, strict=True):
        runner.run()
        if cfg.overrides:
            print(f"a trial with {', '.join(cfg.overrides)}: its runs are in {runner.runs_dir}")
        elif cfg.report:
            print_report(folder, cfg.preset)


def _folders(cfg: DictConfig) -> list[Path]:
    """Those that were given. Raises ConfigError where the runs of two would lie in one place."""
    from research.errors import ConfigError

    several = OmegaConf.is_list(cfg.folder) and len(cfg.folder) > 0
    folders = [study_folder(folder) for folder in (cfg.folder if several else [cfg.folder])]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the studies {', '.join(map(str, folders))} share a name, and with it a place for their runs"
        )
    if len(folders) > 1 and cfg.runs_dir:
        raise ConfigError(
            f"runs_dir is the place of one study's runs, and {len(folders)} were given: {', '.join(names)}"
        )
    return folders
