"""Every preset of every study measures what its comparisons and curves are made of; else only its report would tell."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from matplotlib import image
from omegaconf import DictConfig

from research.evaluation.sequences import sample_counts
from research.results.overview import write_overview
from research.results.report import build_report
from research.results.study import Cell, Study, cells
from research.results.study_file import read_study
from research.schemas import register_schemas

REPOSITORY = Path(__file__).parents[2]
STUDIES = sorted(path.parent.name for path in (REPOSITORY / "experiments").rglob("study.yaml"))
ON_REQUEST = re.compile(
    r"(sampled_|(pass|cons)_at_|kl_on_|exposure_gap|first_error_step|val/accuracy|val/sampled_accuracy)"
)


def lacking(metric: str, cfg: DictConfig) -> str | None:
    """What a config would have to ask for, for its run to have a metric; None where it does, or nothing is needed."""
    options = cfg.evaluation
    split, _, name = metric.partition("/")
    scored = any(split == one or split.startswith(f"{one}_") for one in options.splits)
    if name in ("kl_on_teacher_prefixes", "kl_on_student_prefixes", "exposure_gap", "first_error_step"):
        return None if options.exposure else "evaluation.exposure=true"
    if name == "sampled_accuracy" or (metric == "val/accuracy" and not scored):
        samples = name == "accuracy" or options.val_samples > 0
        return None if options.val_problems and samples else "evaluation.val_problems and val_samples above 0"
    if name.startswith("sampled_") and not options.num_samples:
        return "evaluation.num_samples above 0"
    if name.startswith(("pass_at_", "cons_at_")):
        return f"another name: sampled_{name}"
    k = re.fullmatch(r"sampled_(?:pass|cons)_at_(\d+)", name)
    return f"evaluation.num_samples={k[1]}" if k and int(k[1]) not in sample_counts(options.num_samples) else None


def compared(study: Study) -> Iterator[tuple[str, str]]:
    """(arm, metric) of every operand of every comparison."""
    for spec in (study.comparison, *study.secondary.values()):
        yield from ((operand.arm, operand.metric or spec.metric) for _, operand in spec.operands if operand.arm)


def composed(cell: Cell, study: Study) -> DictConfig:
    folders = {name: f"/nowhere/{name}" for name in study.requires}
    register_schemas()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose("train", overrides=cell.filled(folders, "/nowhere/runs"))


class Runs:
    """One run of each arm in a preset; composed where it is looked at, once."""

    def __init__(self, study: Study, preset: str | None) -> None:
        self.study, self.first = study, {cell.arm: cell for cell in reversed(cells(study, preset))}
        self._configs: dict[str, DictConfig] = {}

    def config(self, arm: str) -> DictConfig:
        if arm not in self._configs:
            self._configs[arm] = composed(self.first[arm], self.study)
        return self._configs[arm]


@pytest.mark.parametrize("presets", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["study", "presets"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_measures_what_is_compared_and_drawn(name: str, presets: bool) -> None:
    study = read_study(REPOSITORY / "experiments" / name)
    needed = [(arm, metric) for arm, metric in compared(study) if ON_REQUEST.search(metric)]
    drawn = [spec.metric for spec in study.curves if ON_REQUEST.search(spec.metric)]
    if not needed and not drawn:
        return
    for preset in study.presets if presets else (None,):
        runs = Runs(study, preset)
        for arm, metric in needed:
            if arm in runs.first:
                assert lacking(metric, runs.config(arm)) is None, f"{name}, preset {preset}, {arm}: {metric}"
        for metric in drawn:
            assert any(lacking(metric, runs.config(arm)) is None for arm in runs.first), f"{name}, {preset}: {metric}"


def test_the_front_tables_are_those_of_the_committed_verdicts(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_bytes((REPOSITORY / "README.md").read_bytes())
    assert write_overview(readme, REPOSITORY / "experiments")
    stale = "README.md shows older results than experiments/ holds: run `distill report experiments`"
    assert readme.read_text() == (REPOSITORY / "README.md").read_text(), stale


KINDS = ("two_modes", "mnist_temperature_width", "speech_ensemble", "search_chain")  # arms, lines, references, curves
REPORTED = sorted(path.parent.name for path in (REPOSITORY / "experiments").glob("*/verdict.json"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in REPORTED]
)
def test_what_is_committed_is_what_is_made_today(name: str, tmp_path: Path) -> None:
    """A change of the drawing that does not raise its STYLE_VERSION leaves old figures beside new words."""
    committed = REPOSITORY / "experiments" / name
    made = tmp_path / "experiments" / name
    shutil.copytree(committed, made, ignore=shutil.ignore_patterns("*.svg", "*.png", "*.sha256", "verdict.json"))
    for file, path in build_report(made).items():
        if path.suffix == ".png":
            old, new = (image.imread(folder / file) for folder in (committed, made))
            assert old.shape == new.shape and abs(old - new).mean() < 1e-3, f"{file} was drawn otherwise"
        elif path.suffix != ".svg":
            assert path.read_bytes() == (committed / file).read_bytes(), f"{file} is another"


def test_every_claim_is_written_down_and_names_its_studies() -> None:
    """The page's rows against the study files: claim -> studies that ask it, also by a secondary comparison."""
    table = (REPOSITORY / "docs" / "claims.md").read_text()
    told = {
        row[1]: set(row[2].split(", ")) for row in re.finditer(r"^\| (C\d\d) \|.*\| ([\w, ]+) \|$", table, re.MULTILINE)
    }
    asked: dict[str, set[str]] = {}
    for name in STUDIES:
        for claim in re.findall(r"C\d\d", read_study(REPOSITORY / "experiments" / name).claim):
            asked.setdefault(claim, set()).add(name)
    assert told == asked


def test_the_check_sees_what_is_missing() -> None:
    study = read_study(REPOSITORY / "experiments" / "strong_to_weak")
    cfg = composed(cells(study)[0], study)
    cfg.evaluation.num_samples, cfg.evaluation.val_problems, cfg.evaluation.val_samples = 4, 8, 0
    assert lacking("test/sampled_pass_at_1", cfg) is None and lacking("test/errors", cfg) is None
    assert lacking("val/accuracy", cfg) is None and lacking("val/sampled_accuracy", cfg) is not None
    assert lacking("test/sampled_pass_at_4", cfg) is None and lacking("test/sampled_pass_at_16", cfg) is not None
    assert lacking("test/pass_at_4", cfg) == "another name: sampled_pass_at_4"
    assert lacking("test/exposure_gap", cfg) is not None
