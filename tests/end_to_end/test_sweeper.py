"""The sweeper through its own command: kills, states, workers, seeds, ranks, refusals.

Commands that are killed, stopped or start workers have a process of their own; the others run in this one.
"""

import csv
import importlib.metadata
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

APP = Path(__file__).with_name("sweep_app") / "app.py"
JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SLOW = pytest.mark.slow
Rows = list[dict[str, str]]


def takes_ctrl_c() -> None:
    """In a new process, before the program begins: a suite in the background has handed on that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Sweep:
    """One sweep of the test application in a folder."""

    def __init__(self, folder: Path, *arguments: str, run_script: Callable[..., Any]) -> None:
        self.folder, self.arguments, self._run_script = folder / "sweep", arguments, run_script

    def command(self, *more: str) -> list[str]:
        return [
            sys.executable, str(APP), "-m", "hydra/sweeper=optuna_study", f"hydra.sweep.dir={self.folder}",
            *self.arguments, *more,
        ]  # fmt: skip

    def start(self, *more: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
        return subprocess.Popen(
            self.command(*more), cwd=self.folder.parent, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=takes_ctrl_c,
        )  # fmt: skip

    def run(self, *more: str) -> str:
        _, file, *arguments = self.command(*more)
        if "hydra/launcher=joblib" not in arguments:
            done = self._run_script(Path(file), *arguments, cwd=self.folder.parent)
            self.code = done.code
            return str(done.out + done.err)
        process = self.start(*more)
        out, _ = process.communicate(timeout=240)
        self.code = process.returncode
        return out

    def rows(self) -> Rows:
        with (self.folder / "trials.csv").open() as file:
            return list(csv.DictReader(file))

    def ran(self, number: int | str) -> int:
        """How often the run of a trial came to its end."""
        path = self.folder / str(number) / "ran.txt"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def sweep(tmp_path: Path, run_script: Callable[..., Any]) -> Callable[..., Sweep]:
    def begun(*arguments: str, under: str = ".") -> Sweep:
        (tmp_path / under).mkdir(exist_ok=True)
        return Sweep(tmp_path / under, *arguments, run_script=run_script)

    return begun


def kill_all(process: "subprocess.Popen[str]", number: int) -> None:
    """The whole process group: controller, workers, and what they started."""
    os.killpg(process.pid, number)
    process.communicate(timeout=60)


def children_of(process: "subprocess.Popen[str]") -> Iterator[int]:
    """Process numbers of the launcher's workers."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = path.with_name("cmdline").read_text()
        except OSError:
            continue
        if int(fields[2]) == process.pid and "popen_loky" in command:
            yield int(path.parent.name)


def finished(sweep: Sweep) -> dict[int, str]:
    """Number -> value of every trial that the storage knows to be complete, read as anybody would."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from research.sweeps.storages import FlockOnFile

    path = sweep.folder / "study.journal"
    if not path.exists():
        return {}
    lock: Any = FlockOnFile(path.with_name("study.journal.lock"))
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    studies = storage.get_all_studies()
    if not studies:
        return {}
    return {t.number: str(t.value) for t in storage.get_all_trials(studies[0]._study_id) if t.state.name == "COMPLETE"}


@pytest.mark.parametrize(
    ("kills", "mode"),
    [(3, "workers"), *(pytest.param(*one, marks=SLOW) for one in [(3, "batch"), (20, "workers"), (20, "batch")])],
)
def test_kills_lose_no_finished_trial_and_count_none_twice(kills: int, mode: str, sweep: Callable[..., Sweep]) -> None:
    """kill -9 of everything, or of one worker alone, at random moments; then the table against the folders."""
    count, dice = 6 + 2 * kills, random.Random(kills)
    search = sweep(
        "x=interval(-5,5)", "kind=a,b", "sleep=0.4", f"hydra.sweeper.n_trials={count}", f"hydra.sweeper.mode={mode}",
        "hydra.sweeper.max_attempts=30", *JOBLIB,
    )  # fmt: skip
    known: dict[int, str] = {}
    for kill in range(kills):
        process = search.start()
        deadline, before = time.monotonic() + 60, len(known)
        while time.monotonic() < deadline and process.poll() is None and len(finished(search)) <= before:
            time.sleep(0.05)
        time.sleep(dice.uniform(0.0, 0.5))
        workers = list(children_of(process))
        if kill % 2 and workers:  # a worker alone: the controller goes on by itself
            os.kill(dice.choice(workers), signal.SIGKILL)
            time.sleep(dice.uniform(0.3, 1.5))
        kill_all(process, signal.SIGKILL)
        after = finished(search)
        assert {number: after[number] for number in known} == known, "what was finished stays as it was"
        known = after
    out = search.run()
    rows = search.rows()
    assert [int(row["number"]) for row in rows] == list(range(count)), out
    assert {row["state"] for row in rows} == {"complete"}, out
    assert all(rows[number]["value"] == value for number, value in known.items())
    folders = {path.name for path in search.folder.iterdir() if path.name.isdigit()}
    assert folders == {row["number"] for row in rows}, "every trial has its folder, and no folder is without its trial"
    for row in rows:
        began = (search.folder / row["number"] / "began.txt").read_text().splitlines()
        assert 1 <= search.ran(row["number"]) <= len(began) <= int(row["attempts"])
        x, kind = float(row["param:x"]), row["param:kind"]
        assert float(row["value"]) == pytest.approx((x - 2) ** 2 + (kind == "b"))


@pytest.mark.parametrize(
    ("number", "launcher"),
    [
        (signal.SIGINT, ()),
        pytest.param(signal.SIGTERM, (), marks=SLOW),
        pytest.param(signal.SIGINT, ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1"), marks=SLOW),
        (signal.SIGTERM, ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1")),
    ],
    ids=["basic-int", "basic-term", "joblib-int", "joblib-term"],
)
def test_a_stop_leaves_no_trial_running(
    number: signal.Signals, launcher: tuple[str, ...], sweep: Callable[..., Sweep]
) -> None:
    search = sweep("x=interval(-5,5)", "sleep=0.6", "hydra.sweeper.n_trials=4", *launcher)
    process = search.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (search.folder / "1" / "began.txt").exists():
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    states = [row["state"] for row in search.rows()]
    assert states == ["complete", "waiting", "waiting", "waiting"]
    search.run()
    assert [row["state"] for row in search.rows()] == ["complete"] * 4
    assert [row["attempts"] for row in search.rows()] == ["1"] * 4, "a stop that was asked for is no attempt"


def test_the_same_command_goes_on_to_more_trials(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=interval(-5,5)", "kind=a,b")
    search.run("hydra.sweeper.n_trials=3")
    before = search.rows()
    told = yaml.safe_load((search.folder / "sweep.yaml").read_text())
    assert told["versions"]["optuna"] == importlib.metadata.version("optuna")
    stamps = {path: path.stat().st_mtime_ns for path in search.folder.glob("[0-9]*/ran.txt")}
    search.run("hydra.sweeper.n_trials=3")
    assert search.rows() == before, "nothing was left to do"
    search.run("hydra.sweeper.n_trials=7")
    after = search.rows()
    assert after[:3] == before and len(after) == 7
    assert len({row["param:x"] for row in after}) == 7, "the sampler does not begin again with the same points"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "no folder was touched again"
    out = search.run("hydra.sweeper.n_trials=9", "x=interval(-5,6)")
    assert "high was 5.0, is 6.0" in out and len(search.rows()) == 7
    search.run("hydra.sweeper.n_trials=8", "x=interval(-5,6)", "hydra.sweeper.on_change=allow")
    assert len(search.rows()) == 8


def test_every_end_of_a_trial_is_told_with_its_reason(sweep: Callable[..., Sweep]) -> None:
    search = sweep(
        "fail=none,raise,infinite,arity", "hydra/sweeper/study_sampler=grid", "hydra.sweeper.max_failure_rate=null"
    )
    search.run()
    rows = {row["param:fail"]: row for row in search.rows()}
    assert {name: row["state"] for name, row in rows.items()} == {
        "none": "complete", "raise": "failed", "infinite": "failed", "arity": "failed",
    }  # fmt: skip
    assert rows["raise"]["reason"] == "RuntimeError: boom"
    assert "not finite" in rows["infinite"]["reason"] and "2 values" in rows["arity"]["reason"]
    assert rows["raise"]["folder"] == str(search.folder / rows["raise"]["number"])


def test_a_sweep_that_completed_nothing_has_failed(sweep: Callable[..., Sweep]) -> None:
    """With its report, and with the reason of the first failure; one value is enough for success."""
    search = sweep("x=interval(0,1)", "hydra.sweeper.n_trials=2")
    out = " ".join(search.run("fail=raise").split())
    assert search.code == 1 and "no trial of the sweep 'sweep' was completed (2 failed)" in out, out
    assert f"Trial 0 ended with: RuntimeError: boom; see {search.folder}/0" in out
    assert [row["state"] for row in search.rows()] == ["failed"] * 2
    search.run("hydra.sweeper.n_trials=3", "hydra.sweeper.on_change=allow")
    assert search.code == 0 and [row["state"] for row in search.rows()] == ["failed", "failed", "complete"]


def test_too_many_failures_end_the_sweep(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=interval(0,1)", "fail=raise", "hydra.sweeper.n_trials=9", "hydra.sweeper.max_failures=2")
    out = search.run()
    assert search.code != 0 and "3 of 3 trials failed (max_failures=2)" in out and "boom" in out
    assert "a greater hydra.sweeper.max_failures" in " ".join(out.split()), "those that failed still count"
    assert [row["state"] for row in search.rows()] == ["failed"] * 3 + ["waiting"] * 6


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("hydra.sweeper.subprocess=true",), marks=SLOW),
        pytest.param(("hydra.sweeper.mode=workers", *JOBLIB), marks=SLOW),
    ],
    ids=["batch", "subprocess", "workers"],
)
def test_what_does_not_fit_into_memory_is_infeasible_on_request(
    more: tuple[str, ...], sweep: Callable[..., Sweep]
) -> None:
    """Not a failure, not tried again, not the best, though the function's lowest value lies there; on a resume too."""
    search = sweep(
        "x=interval(-5,5)", "fits=0", "hydra.sweeper.out_of_memory=constraint", "hydra.sweeper.max_failures=0",
        "hydra.sweeper.retries=2", *more,
    )  # fmt: skip
    search.run("hydra.sweeper.n_trials=3")
    out = search.run("hydra.sweeper.n_trials=8")
    rows = search.rows()
    beyond = [float(row["param:x"]) > 0 for row in rows]
    assert search.code == 0 and len(rows) == 8 and 0 < sum(beyond) < 8, out
    assert [row["state"] for row in rows] == [{True: "out_of_memory", False: "complete"}[far] for far in beyond]
    assert [row["value"] == "" for row in rows] == beyond and [row["feasible"] == "False" for row in rows] == beyond
    assert all(row["reason"].startswith("out of memory: MemoryError") for row in rows if row["value"] == "")
    assert [row["attempts"] for row in rows] == ["1"] * 8, "each was begun once, by one of the two commands"
    assert f"{8 - sum(beyond)} complete, {sum(beyond)} out of memory" in " ".join(out.split())
    best = yaml.safe_load((search.folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(float(row["value"]) for row in rows if row["value"])
    out = search.run("hydra.sweeper.n_trials=9", "hydra.sweeper.out_of_memory=fail")
    assert search.code != 0 and "out_of_memory is gone (was constraint)" in " ".join(out.split()), out


def test_a_run_that_takes_its_worker_with_it_fails_in_the_end(sweep: Callable[..., Sweep]) -> None:
    """A segmentation fault in a trial: begun again, then given up; the others are not lost."""
    search = sweep(
        "fail=none,die", "x=1,2", "hydra/sweeper/study_sampler=grid", "hydra.sweeper.max_attempts=2",
        "hydra.sweeper.max_failure_rate=null", *JOBLIB,
    )  # fmt: skip
    out = search.run()
    found = {(row["param:fail"], row["param:x"]): row["state"] for row in search.rows()}
    assert found == {
        ("none", "1"): "complete", ("none", "2"): "complete", ("die", "1"): "failed", ("die", "2"): "failed",
    }, out  # fmt: skip
    assert all("begun 2 times" in row["reason"] for row in search.rows() if row["state"] == "failed")


def test_a_grid_is_tried_once_in_order(sweep: Callable[..., Sweep]) -> None:
    search = sweep("kind=a,b,'c,d'", "x=range(1,3)", "hydra/sweeper/study_sampler=grid", "hydra.sweeper.n_trials=50")
    search.run()
    points = [(row["param:kind"], row["param:x"]) for row in search.rows()]
    assert points == [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"), ("c,d", "1"), ("c,d", "2")]
    search.run()
    assert len(search.rows()) == 6, "an exhausted grid repeats nothing"


def test_odd_values_reach_the_task_as_they_are(sweep: Callable[..., Sweep]) -> None:
    search = sweep("hydra/sweeper/study_sampler=grid", "kind='c,d','e=f',null,[3,\"x y\"],{k: [1]},'null','it\\'s'")
    search.run()
    rows = search.rows()
    assert [row["state"] for row in rows] == ["complete"] * 7
    found = [yaml.safe_load((search.folder / row["number"] / ".hydra/config.yaml").read_text())["kind"] for row in rows]
    assert found == ["c,d", "e=f", None, [3, "x y"], {"k": [1]}, "null", "it's"]


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=SLOW)])
def test_a_trial_is_the_mean_over_its_seeds(alone: bool, sweep: Callable[..., Sweep]) -> None:
    search = sweep(
        "x=1,2", "hydra/sweeper/study_sampler=grid", "hydra.sweeper.seeds=[0,3,6]", f"hydra.sweeper.subprocess={alone}",
    )  # fmt: skip
    search.run()
    first, second = search.rows()
    assert float(first["value"]) == pytest.approx(1.03) and float(second["value"]) == pytest.approx(0.03)
    assert float(first["value_sd"]) == pytest.approx(0.03)
    assert first["seeds"] == "0 3 6" and first["seed"] == "", "each of them, not one"
    assert sorted(path.name for path in (search.folder / "0").glob("seed_*")) == ["seed_0", "seed_3", "seed_6"]


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("hydra.sweeper.mode=workers",), marks=SLOW),
        pytest.param(("hydra.sweeper.mode=workers", "hydra.sweeper.subprocess=true"), marks=SLOW),
    ],
    ids=["batch", "workers", "subprocess"],
)
def test_the_table_tells_seed_duration_and_revision(
    more: tuple[str, ...], sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    """The revision is that of the folder in which the command was given, whatever folder the runs are in."""
    repository = tmp_path / "repository"
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    search = sweep("x=1,2", "hydra/sweeper/study_sampler=grid", "sleep=0.5", "hydra.job.chdir=true", *more)
    told = []
    for given in ("hydra.sweeper.n_trials=1", "seed=7"):
        command = [*search.command(given), "hydra.sweeper.on_change=allow"]
        told.append(subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=240))
    rows = search.rows()
    assert [row["seed"] for row in rows] == ["0", "7"], told
    assert all(row["revision"] == commit for row in rows), "the same in every mode"
    assert all(0.5 < float(row["seconds"]) < 60 for row in rows)
    assert [row["number"] for row in rows] == ["0", "1"] and [row["param:x"] for row in rows] == ["1", "2"]
    assert [row["folder"] for row in rows] == [str(search.folder / number) for number in "01"]


@SLOW
@pytest.mark.parametrize("within", ["nothing", pytest.param("srun", marks=SLOW)])
def test_every_rank_of_a_trial_has_the_trials_own_values(
    within: str, sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real processes under DDP; the sweeper itself refuses to begin in a further rank.

    within   srun: in a task of a SLURM job, whose variables Lightning would take for its own ranks'
    """
    if within == "srun":
        for name, value in {"NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NNODES": 1,
                            "JOB_ID": 7, "JOB_NAME": "sweep", "NODELIST": "localhost"}.items():  # fmt: skip
            monkeypatch.setenv(f"SLURM_{name}", str(value))
    search = sweep("x=interval(-5,5)", "ranks=2", "hydra.sweeper.n_trials=2", "hydra.sweeper.subprocess=true")
    out = search.run()
    rows = search.rows()
    assert [row["state"] for row in rows] == ["complete"] * 2, out
    for row in rows:
        told = [(search.folder / row["number"] / f"rank_{rank}.txt").read_text().split()[0] for rank in (0, 1)]
        assert told == [row["param:x"]] * 2
    assert rows[0]["param:x"] != rows[1]["param:x"]


def test_two_objectives_give_the_trials_that_none_beats(sweep: Callable[..., Sweep]) -> None:
    search = sweep(
        "x=range(0,5)", "mapping=true", "hydra/sweeper/study_sampler=grid",
        "hydra.sweeper.objectives={val/loss: minimize, cost/seconds: minimize}",
        "hydra.sweeper.constraints={cost/seconds: 6.5}",
    )  # fmt: skip
    out = search.run()
    rows = search.rows()
    assert [row["val/loss"] for row in rows] == ["4.0", "1.0", "0.0", "1.0", "4.0"], out
    assert [row["feasible"] for row in rows] == ["True", "True", "False", "False", "False"]
    found = yaml.safe_load((search.folder / "optimization_results.yaml").read_text())["solutions"]
    assert [one["params"] for one in found] == [{"x": 0}, {"x": 1}]
    assert (search.folder / "pareto.png").exists() and (search.folder / "pareto_1.yaml").exists()


@SLOW
def test_limits_end_a_sweep_early(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=range(0,9)", "hydra/sweeper/study_sampler=grid")
    search.run("hydra.sweeper.target=1")
    assert [row["state"] for row in search.rows()][:3] == ["complete", "complete", "waiting"]
    search.run("hydra.sweeper.patience=2")
    assert [row["state"] for row in search.rows()].count("complete") == 5, "2 is best, 3 and 4 are no better"
    search.run("hydra.sweeper.timeout=0.001")
    assert [row["state"] for row in search.rows()].count("complete") == 5


def test_points_by_hand_come_first_and_known_trials_are_copied(sweep: Callable[..., Sweep]) -> None:
    first = sweep("x=interval(-5,5)", "kind=a,b", "hydra.sweeper.n_trials=3")
    first.run("hydra.sweeper.enqueue=[{x: 1.25, kind: b}]")
    assert (first.rows()[0]["param:x"], first.rows()[0]["param:kind"]) == ("1.25", "b")
    copied = f"{{storage: {{name: journal, path: '{first.folder}/study.journal'}}, study_name: sweep}}"
    second = sweep("x=interval(-5,5)", "kind=a,b", "hydra.sweeper.n_trials=2", under="second")
    out = second.run(f"hydra.sweeper.copy_from={copied}")
    assert [row["number"] for row in second.rows()] == ["3", "4"], out
    third = sweep("x=interval(-5,5)", "kind=a,b", "hydra.sweeper.n_trials=1", under="third")
    for wrong, told in (
        ("hydra.sweeper.direction=maximize", "goes ['minimize'], this study ['maximize']"),
        ("hydra.sweeper.enqueue=[{x: 7}]", "outside"),
    ):
        out = third.run(f"hydra.sweeper.copy_from={copied}", wrong)
        assert third.code != 0 and told in " ".join(out.split()), out
    out = third.run(f"hydra.sweeper.copy_from={copied}")
    assert [row["number"] for row in third.rows()] == ["3"], f"a refused command leaves no study behind: {out}"


def test_a_point_that_is_partly_given_is_tried_once(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=interval(-5,5)", "kind=a,b", "hydra.sweeper.enqueue=[{x: 1.25}]")
    for count in (1, 3):
        search.run(f"hydra.sweeper.n_trials={count}")
    assert [row["param:x"] == "1.25" for row in search.rows()] == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x=3"], "nothing is searched"),
        (["x=interval(3,1)"], "below the second"),
        (["x=tag(log,interval(0,1))"], "log scale"),
        (["hydra.sweeper.params={x: 'choice(5)'}"], "one value"),
        (["hydra.sweeper.params={y: 'choice(1,2)'}"], "y"),
        (["hydra.sweeper.params={nested.valu: 'choice(1,2)'}"], "nearest valid: nested.value"),
        (["x=1", "hydra.sweeper.params={x: 'choice(1,2)'}"], "fixes what is searched"),
        (["x=interval(0,1)", "hydra/sweeper/study_sampler=grid"], "no end of values"),
        (["x=1,2", "hydra.sweeper.objectives={test/loss: minimize}"], "test split"),
        (["x=1,2", "hydra/sweeper/study_pruner=median", "hydra.sweeper.direction=[minimize,maximize]"], "one value"),
        (["x=1,2", "hydra/sweeper/study_pruner=wilcoxon"], "seed by seed"),
        (["x=1,2", "hydra.sweeper.direction=minimise"], "nearest valid: minimize"),
        (
            ["x=1,2", "hydra/sweeper/study_storage=rdb", "hydra.sweeper.storage.url='sqlite:////no/s.db'"],
            "cannot be used",
        ),
        (["x=1,2", "hydra.sweeper.n_trials=0"], "at least 1"),
        (["x=1,2", "hydra.sweeper.mode=worker"], "batch, workers"),
        (["x=1,2", "hydra.sweeper.prune_on=test/errors"], "validation"),
        (["x=1,2", "hydra.sweeper.patience=0"], "patience is 0"),
        (["x=1,2", "seed=1,2", "hydra.sweeper.seeds=[1,2]"], "seed is searched"),
        (["x=1,2", "hydra/sweeper/study_sampler=cmaes", "hydra.sweeper.direction=[minimize,minimize]"], "one value"),
        (["x=1,2", "hydra/sweeper/study_sampler=brute_force", "hydra.sweeper.fixed={x: 1}"], "give sampler grid"),
        (["x=1,2", "hydra.sweeper.out_of_memory=prune"], "expected fail or constraint"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_trial_is_made(
    arguments: list[str], told: str, sweep: Callable[..., Sweep]
) -> None:
    search = sweep(*arguments)
    out = search.run()
    assert search.code != 0 and told in " ".join(out.split()), out
    assert not (search.folder / "0").exists()


def test_a_further_rank_does_not_sweep(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    search = sweep("x=1,2")
    assert "further rank" in search.run() and search.code != 0


@SLOW
def test_a_second_controller_is_refused_and_workers_join(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=interval(-5,5)", "sleep=0.5", "hydra.sweeper.n_trials=8")
    first = search.start()
    while not (search.folder / "0" / "began.txt").exists():
        time.sleep(0.02)
    out = search.run()
    assert "another command" in out and search.code != 0
    first.communicate(timeout=120)
    assert [row["state"] for row in search.rows()] == ["complete"] * 8
    more = ("hydra.sweeper.n_trials=14", "hydra.sweeper.mode=workers")
    two = [search.start(*more), search.start(*more)]
    for one in two:
        one.communicate(timeout=120)
    search.run(*more)
    rows = search.rows()
    assert [row["state"] for row in rows].count("complete") == len(rows) and len(rows) in (14, 15, 16)
    assert all(search.ran(row["number"]) == 1 for row in rows)


def test_a_refused_command_leaves_the_report_as_it_was(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=range(0,4)", "hydra/sweeper/study_sampler=grid")
    search.run()
    before = {path.name: path.read_bytes() for path in search.folder.glob("*.*") if "journal" not in path.name}
    out = search.run("hydra.sweeper.direction=maximize")
    assert search.code != 0 and "directions was" in out
    out = search.run("hydra.sweeper.study_name=another")
    assert search.code != 0 and "would be written over" in " ".join(out.split())
    assert {path.name: path.read_bytes() for path in search.folder.glob("*.*") if path.name in before} == before


def test_workers_do_not_wait_for_a_long_trial(sweep: Callable[..., Sweep]) -> None:
    """The first trial ends only after all others have: behind a barrier they would not have begun."""
    points = [f"{{x: {x}, others: {5 if x == 0 else 0}}}" for x in range(6)]
    search = sweep(
        "x=range(0,6)", "others=0,5", f"hydra.sweeper.enqueue=[{','.join(points)}]", "hydra.sweeper.n_trials=6",
        "hydra.sweeper.mode=workers", *JOBLIB,
    )  # fmt: skip
    out = search.run()
    rows = search.rows()
    assert [row["state"] for row in rows] == ["complete"] * 6, out
    processes = [(search.folder / row["number"] / "ran.txt").read_text().split()[0] for row in rows]
    assert processes[0] not in processes[1:] and len(set(processes[1:])) == 1, "one had the long one, one all others"


@SLOW
def test_a_lowered_target_ends_the_sweep_there(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=range(0,6)", "kind=a,b", "hydra/sweeper/study_sampler=grid", "hydra.sweeper.fixed={kind: b}")
    search.run("hydra.sweeper.target=2")
    assert [row["state"] for row in search.rows()] == ["complete"] * 2 + ["waiting"] * 4
    search.run("hydra.sweeper.n_trials=3")
    assert [row["param:x"] for row in search.rows()] == ["0", "1", "2"]
    search.run("hydra.sweeper.n_trials=9", "hydra.sweeper.mode=workers")
    rows = search.rows()
    assert sorted(row["param:x"] for row in rows) == ["0", "1", "2", "3", "4", "5"], "every point of the grid once"
    assert {(row["param:kind"], row["state"]) for row in rows} == {("b", "complete")}


ODD_APP = """
import sys
import hydra, numpy
@hydra.main(version_base="1.3", config_path=".", config_name="plain")
def main(cfg):
    open("here.txt", "a").write("x")
    if cfg.kind == "exit":
        sys.exit(3)
    if cfg.kind == "bytes":
        raise MemoryError("no \\udcff")
    return {"loss": numpy.float32(cfg.x), "cost": numpy.int64(3)}
main()
"""


@pytest.mark.parametrize(
    "more",
    [(), *(pytest.param((f"hydra.sweeper.{how}",), marks=SLOW) for how in ("subprocess=true", "mode=workers"))],
)
def test_any_application_with_any_ends(more: tuple[str, ...], sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    """Another config, working folders, numbers of numpy, an exit, a text that is no text; never the sweep's end."""
    (tmp_path / "app.py").write_text(ODD_APP)
    (tmp_path / "plain.yaml").write_text("{kind: a, x: 1.0}\n")
    (tmp_path / "other.yaml").write_text("{kind: a, x: 2.5}\n")
    search = sweep()
    command = [
        sys.executable, "app.py", "-m", "-cn", "other", "hydra/sweeper=optuna_study", "hydra.sweep.dir=sweep",
        "kind=exit,bytes,a,b", "hydra/sweeper/study_sampler=grid", "hydra.job.chdir=true", "hydra.sweeper.seeds=[1,2]",
        "hydra.sweeper.seed_key=+seed", "hydra.sweeper.objectives={loss: minimize}",
        "hydra.sweeper.constraints={cost: 3}", *more,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = search.rows()
    assert [row["state"] for row in rows] == ["failed", "failed", "complete", "complete"], done.stderr
    assert "SystemExit: 3" in rows[0]["reason"] or "ended with code 3" in rows[0]["reason"]
    assert rows[1]["reason"] == "out of memory: MemoryError: no \\udcff"
    assert [(row["loss"], row["feasible"]) for row in rows[2:]] == [("2.5", "True")] * 2
    assert (search.folder / "2" / "seed_1" / "here.txt").read_text() == "x", "where the run's own folder is"


MODULE_APP = """
import hydra, os
from hydra.core.hydra_config import HydraConfig
@hydra.main(version_base="1.3", config_path=".", config_name="plain")
def main(cfg):
    open("here.txt", "w").write(HydraConfig.get().runtime.cwd)
    return cfg.x
main()
"""


@pytest.mark.parametrize("mode", ["batch", pytest.param("workers", marks=SLOW)])
def test_a_module_runs_in_processes_of_its_own_from_its_jobs_folders(
    mode: str, sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    """`python -m` looks in the folder where the command was given, and not in that of the job."""
    package = tmp_path / "applied"
    package.mkdir()
    (package / "search.py").write_text(MODULE_APP)
    (package / "plain.yaml").write_text("x: 1.0\n")
    command = [
        sys.executable, "-m", "applied.search", "-m", "hydra/sweeper=optuna_study", "hydra.sweep.dir=sweep", "x=1,2",
        "hydra/sweeper/study_sampler=grid", "hydra.job.chdir=true", "hydra.sweeper.subprocess=true",
        f"hydra.sweeper.mode={mode}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in sweep().rows()] == ["complete"] * 2, done.stderr
    assert (tmp_path / "sweep" / "1" / "here.txt").read_text() == str(tmp_path)


@SLOW
def test_a_template_of_folders_gives_every_trial_its_own(sweep: Callable[..., Sweep]) -> None:
    search = sweep("x=1,2", "hydra/sweeper/study_sampler=random", "hydra.sweep.subdir=x_${x}", "hydra.sweeper.n_jobs=2")
    search.run("hydra.sweeper.n_trials=3")
    search.run("hydra.sweeper.n_trials=5")
    folders = [Path(row["folder"]) for row in search.rows()]
    assert len(set(folders)) == 5 and all(len((one / "ran.txt").read_text().splitlines()) == 1 for one in folders)
    assert {folder.name[:3] for folder in folders} == {"x_1", "x_2"}
