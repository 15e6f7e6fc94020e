"""A whole study: run, killed, gone on with, changed, failed, and rebuilt from what it committed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from research.results.record import read_record

STUDY = """
study: tiny
claim: C04
question: Does a tiny network make fewer errors when it learns from a teacher?
base: [trainer.max_epochs=2, "teacher@reference=frozen", "reference.path='{requires.big}'", threads=1]
requires:
  big: {command: train, overrides: ["student.hidden=[64]", trainer.max_epochs=3, threads=1]}
  store: {command: cache, overrides: ["teacher.path='{requires.big}'", threads=1]}
arms:
  hard: ["student.hidden=[8]"]
  soft: ["student.hidden=[8]", method=soft_target, teacher=cached, "teacher.path='{requires.store}'"]
seeds: [0, 1]
metric: test/errors
lower_is_better: true
comparison: {kind: difference, baseline: hard, treatment: soft}
"""
CELLS = [f"{arm}/seed={seed}" for arm in ("hard", "soft") for seed in (0, 1)]


class Place:
    """A project folder with one study in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "experiments" / "tiny"
        self.folder.mkdir(parents=True)
        self.write(STUDY)

    def write(self, text: str) -> None:
        (self.folder / "study.yaml").write_text(text)

    def record(self, cell: str) -> Path:
        return self.root / "outputs" / "studies" / "tiny" / "runs" / cell / "run.json"

    def finished(self) -> dict[str, tuple[int, str]]:
        """Cell or requirement -> when its record was written, and when the run says that it began."""
        paths = [
            *self.root.glob("outputs/studies/tiny/runs/*/*/run.json"),
            *self.root.glob("outputs/shared/*/run.json"),
        ]
        return {
            "/".join(path.parent.parts[-2:]): (path.stat().st_mtime_ns, read_record(path).started_at)
            for path in paths
            if read_record(path).status == "completed"
        }

    def results(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir()) if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def study(distill: Callable[..., Any], place: Place) -> Callable[..., Any]:
    """`study(overrides...)`: runs it in this process."""
    return lambda *overrides: distill("study", "experiments/tiny", *overrides, cwd=place.root)


@pytest.fixture(scope="module")
def finished(distill: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder whose study is finished and reported, to be copied."""
    place = Place(tmp_path_factory.mktemp("finished") / "project")
    done = distill("study", "experiments/tiny", cwd=place.root)
    assert done.code == 0, done.err
    logs = [path.read_text() for path in place.root.glob("outputs/**/train.log")]
    assert len(logs) == len(CELLS) + 1 and "begins at step 0" not in "".join(logs), "nobody asked for a checkpoint"
    return place.root


def test_a_study_ends_in_a_verdict(finished: Path) -> None:
    folder = finished / "experiments" / "tiny"
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["verdict"] == "INCONCLUSIVE", "two seeds are too few for anything else"
    assert verdict["arms"]["hard"]["n"] == verdict["arms"]["soft"]["n"] == 2 and verdict["missing"] == []
    assert verdict["requires"]["big"]["n"] == 1
    assert len((folder / "results.csv").read_text().splitlines()) >= len(CELLS) + 2
    for name in ("figure.svg", "figure.png", "README.md", "records.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert not any(
        str(finished) in path.read_text() for path in folder.glob("*.*") if path.suffix not in (".png", ".parquet")
    )


def test_the_report_is_rebuilt_byte_for_byte_from_the_study_folder_alone(
    finished: Path, distill: Callable[..., Any], tmp_path: Path
) -> None:
    moved = tmp_path / "experiments" / "tiny"
    shutil.copytree(finished / "experiments" / "tiny", moved)
    before = {path.name: path.read_bytes() for path in moved.iterdir()}
    for name in ("results.csv", "verdict.json", "figure.svg", "figure.png"):
        (moved / name).unlink()
    done = distill("report", str(moved), cwd=tmp_path)
    assert done.code == 0, done.err
    assert {path.name: path.read_bytes() for path in moved.iterdir()} == before


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_a_killed_study_goes_on_where_it_was(
    launcher: str, console: Path, place: Place, study: Callable[..., Any]
) -> None:
    flags = [] if launcher == "basic" else ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = subprocess.Popen(
        [str(console), "study", "experiments/tiny", *flags],
        cwd=place.root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(lambda: len(place.finished()) >= 2, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = place.finished()
    assert 2 <= len(before) <= len(CELLS) + 2 and not (place.folder / "verdict.json").exists()
    done = study()
    assert done.code == 0, done.err
    after = place.finished()
    assert len(after) == len(CELLS) + 2
    assert {name: after[name] for name in before} == before, "what was finished is not run again"
    assert json.loads((place.folder / "verdict.json").read_text())["missing"] == []
    results, records = place.results(), place.finished()
    assert study().code == 0
    assert place.finished() == records and place.results() == results, "a third call changes nothing"


def _wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, f"the study ended by itself with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError("the study made no progress")


@pytest.mark.slow
def test_a_changed_arm_runs_again_and_its_old_runs_are_kept(place: Place, study: Callable[..., Any]) -> None:
    assert study().code == 0
    before = place.finished()
    place.write(STUDY.replace('hard: ["student.hidden=[8]"]', 'hard: ["student.hidden=[8]", optimizer.lr=0.02]'))
    assert study().code == 0
    after = place.finished()
    for cell in CELLS:
        assert (after[cell] == before[cell]) is cell.startswith("soft"), cell
        aside = place.record(cell).parent.with_name(f"{Path(cell).name}.other-0") / "run.json"
        assert aside.exists() is cell.startswith("hard")
    assert read_record(place.record("hard/seed=0")).config["optimizer"]["lr"] == 0.02
    place.write(STUDY)  # and back: an arm that lost an override is another arm too
    assert study().code == 0
    assert read_record(place.record("hard/seed=0")).config["optimizer"]["lr"] != 0.02
    assert place.finished()["soft/seed=0"] == before["soft/seed=0"]


def test_a_failing_cell_is_counted_and_named_and_the_others_are_kept(place: Place, study: Callable[..., Any]) -> None:
    place.write(STUDY.replace("  soft: [", "  broken: [optimizer.lr=1.0e+30]\n  soft: ["))
    done = study()
    assert done.code == 1
    told = "2 of 6 cells did not finish: broken/seed=0, broken/seed=1. broken/seed=0 ended with NonFiniteLoss"
    assert told in done.err.splitlines()[-1]
    assert "Traceback" not in done.err and "Error executing job" not in done.err
    assert set(CELLS) <= set(place.finished())
    lines = [json.loads(line) for line in (place.folder / "records.jsonl").read_text().splitlines()]
    failed = [line["cell"]["key"] for line in lines if line["record"]["status"] == "failed"]
    assert failed == ["broken/seed=0", "broken/seed=1"]


def test_a_failing_requirement_stops_the_study(place: Place, study: Callable[..., Any]) -> None:
    place.write(STUDY.replace("trainer.max_epochs=3", "optimizer.lr=1.0e+30"))
    done = study()
    assert done.code == 1 and "big, which tiny requires, ended with NonFiniteLoss" in done.err.splitlines()[-1]
    assert list(place.root.glob("outputs/studies/tiny/runs/*/*")) == []


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("method=soft_target", "method=soft_targets", ("soft/seed=1 does not compose", "soft_target")),
        ('["student.hidden=[8]"]', "[student.hiden=8]", ("hard/seed=1 does not compose", "student.hiden")),
        ("method=soft_target", "+sede=3", ("soft/seed=1 does not compose: unknown key sede; nearest valid: seed",)),
        ("method=soft_target", "+logger.api_key=hunter2", ("logger.api_key is a secret",)),
        ("seeds: [0, 1]", "sedes: [0, 1]", ("sedes", "seeds")),
        ("{requires.store}", "{requires.stoer}", ("requires.stoer",)),
        ("command: cache", "command: cahce", ("cahce", "cache")),
        ("study: tiny", "study: tinny", ("tinny", "tiny")),
    ],
)
def test_a_mistake_in_study_yaml_costs_no_run(
    old: str, new: str, parts: tuple[str, ...], place: Place, study: Callable[..., Any]
) -> None:
    assert old in STUDY
    place.write(STUDY.replace(old, new))
    done = study()
    for part in parts:
        assert part in done.error, done.error
    assert "hunter2" not in done.err and done.code == 1
    assert list(place.root.rglob("run.json")) == []


def test_an_unknown_preset_and_a_report_without_runs(
    place: Place, study: Callable[..., Any], distill: Callable[..., Any]
) -> None:
    assert "no preset 'smok'" in study("preset=smok").error
    assert (
        "records.jsonl: no such file; run the study first"
        in distill("report", "experiments/tiny", cwd=place.root).error
    )


def test_a_trial_of_two_studies_with_overrides_for_every_cell_is_not_reported(
    place: Place, study: Callable[..., Any]
) -> None:
    other = place.folder.with_name("other")
    other.mkdir()
    (other / "study.yaml").write_text(STUDY.replace("study: tiny", "study: other").replace("[0, 1]", "[1]"))
    done = study("experiments/other", 'overrides=["trainer=smoke","tags=[trial]"]')
    assert done.code == 0, done.err
    assert done.out.count("a trial with trainer=smoke, tags=[trial]: its runs are in") == 2
    for name in ("tiny", "other"):
        record = read_record(place.root / "outputs" / "studies" / name / "trial" / "soft" / "seed=1" / "run.json")
        assert record.config["trainer"]["max_steps"] == 4 and record.overrides[-2:] == ["trainer=smoke", "tags=[trial]"]
    assert len(list(place.root.glob("outputs/shared/*/run.json"))) == 2, "what both require is made once"
    assert set(place.results()) == {"study.yaml"}, "a trial leaves the study's own results as they are"


def test_several_studies_are_refused_before_the_first_runs(place: Place, study: Callable[..., Any]) -> None:
    other = place.folder.with_name("other")
    other.mkdir()
    (other / "study.yaml").write_text(STUDY.replace("study: tiny", "study: other") + "presets: {small: {seeds: [0]}}\n")
    assert "experiments/nowhere holds no study.yaml" in study("experiments/nowhere").error
    assert "runs_dir is the place of one study's runs, and 2 were" in study("experiments/other", "runs_dir=x").error
    assert "experiments/tiny, experiments/other/../tiny share a name" in study("experiments/other/../tiny").error
    assert "no preset 'small'" in study("experiments/other", "preset=small").error
    assert list(place.root.rglob("run.json")) == []


@pytest.mark.slow
def test_a_terminated_study_stops_its_workers(run_slowly: "subprocess.Popen[str]", place: Place) -> None:
    """SIGTERM goes to the controller alone; workers left behind would write into folders that a resume works on."""
    _wait_for(lambda: len(list(place.root.rglob("last.ckpt"))) >= 1 and len(place.finished()) >= 2, run_slowly)
    run_slowly.send_signal(signal.SIGTERM)
    _, told = run_slowly.communicate(timeout=60)
    assert run_slowly.returncode == 143
    assert told.splitlines()[-1] == "error: stopped: SIGTERM; the same command goes on from here"
    for _ in range(200):  # joblib's resource tracker takes a moment to notice
        try:
            os.killpg(run_slowly.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("processes of the study are still there")


@pytest.fixture
def run_slowly(console: Path, place: Place) -> Iterator["subprocess.Popen[str]"]:
    """The study, its cells lengthened, on two worker processes."""
    place.write(STUDY.replace("base: [trainer.max_epochs=2", "base: [trainer.max_epochs=2000"))
    process = subprocess.Popen(
        [str(console), "study", "experiments/tiny", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        cwd=place.root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_an_arm_goes_on_from_the_weights_of_another(place: Place, study: Callable[..., Any]) -> None:
    longer = """  longer: ["student.hidden=[8]", "init_from='{arms.hard}'", optimizer.lr=0.0]\nseeds: [0, 1]"""
    place.write(STUDY.replace("seeds: [0, 1]", longer))
    done = study()
    assert done.code == 0, done.err
    for seed in (0, 1):
        start, longer = (read_record(place.record(f"{arm}/seed={seed}")) for arm in ("hard", "longer"))
        assert longer.student["sha256"] == start.student["sha256"], "a rate of 0 leaves the weights it began with"
        assert longer.started_at >= start.started_at
    records = (place.folder / "records.jsonl").read_text()
    assert "init_from='{runs}/hard/seed=1'" in records and str(place.root) not in records
