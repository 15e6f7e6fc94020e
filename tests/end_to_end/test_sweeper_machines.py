"""The sweeper as on several machines: PostgreSQL, Redis or gRPC, separate commands, and a cluster's launcher."""

import csv
import gc
import getpass
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from research.errors import ConfigError
from research.sweeps.space_parser import parse_space
from research.sweeps.storages import StorageSpec, storage_spec
from research.sweeps.sweep_points import top_up
from research.sweeps.sweep_study import claim_control, open_study
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_store import TrialStore

APP = Path(__file__).with_name("sweep_app") / "app.py"
RAY = "RESEARCH_RAY_PYTHON"
pytestmark = pytest.mark.filterwarnings("ignore")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres, where Debian or another system keeps them."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).parent if found else (debian[-1].parent if debian else None)


@contextmanager
def postgres() -> Iterator[str]:
    """A real server of its own, on a free port; its URL. PostgreSQL refuses to run as root."""
    programs = postgres_programs()
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    known = subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode == 0
    if programs is None or (as_user and (not known or not shutil.which("runuser"))):
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    port, user = free_port(), "postgres" if as_user else getpass.getuser()
    data = Path(tempfile.mkdtemp(prefix="sweeps-"))
    if as_user:
        shutil.chown(data, "postgres")
    make = [*as_user, str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", user]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd="/")
    serve = [*as_user, str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(data), "-F"]
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    try:
        await_port(port)
        time.sleep(0.5)  # it answers a little before it takes commands
        yield f"postgresql+psycopg://{user}@127.0.0.1:{port}/postgres"
    finally:
        stop = [*as_user, str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"]
        subprocess.run(stop, check=False, stdout=subprocess.DEVNULL, cwd="/")
        server.wait(30)
        shutil.rmtree(data, ignore_errors=True)


@contextmanager
def redis() -> Iterator[str]:
    """A real Redis server of its own, on a free port, in memory; its URL."""
    pytest.importorskip("redis")
    program, port = shutil.which("redis-server"), free_port()
    if program is None:
        pytest.skip("no Redis here: apt-get install redis-server")
    keep_nothing = ("--save", "", "--appendonly", "no", "--dir", tempfile.gettempdir())
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--requirepass", "hunter2", *keep_nothing]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        await_port(port)
        yield f"redis://:$SWEEP_WORD@127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


SERVERS = {"postgresql": ("rdb", postgres), "redis": ("journal_redis", redis)}


@pytest.fixture(params=list(SERVERS))
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A storage that a server keeps, as a config's node; Redis's password is in the environment."""
    name, server = SERVERS[request.param]
    monkeypatch.setenv("SWEEP_WORD", "hunter2")
    with server() as url:
        yield {"name": name, "url": url}
        gc.collect()  # what a test leaves of Optuna's connections complains here, not at the end of all tests


def await_port(port: int) -> None:
    """Wait until something listens there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"nothing listens on port {port}")


def start(folder: Path, *arguments: str, python: str = sys.executable) -> "subprocess.Popen[str]":
    command = [python, str(APP), "-m", "hydra/sweeper=optuna_study", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_four_commands_share_one_server(served: dict[str, str], tmp_path: Path) -> None:
    """Started at the same moment, each as on a machine of its own, with a folder of its own."""
    count = 16
    shared = (
        "x=interval(-5,5)", "kind=a,b", "sleep=0.3", f"hydra/sweeper/study_storage={served['name']}",
        f"hydra.sweeper.storage.url='{served['url']}'", "hydra.sweeper.study_name=shared",
        f"hydra.sweeper.n_trials={count}", "hydra.sweeper.mode=workers",
    )  # fmt: skip
    folders = [tmp_path / f"machine_{number}" for number in range(4)]
    commands = [start(tmp_path, *shared, f"hydra.sweep.dir={folder}") for folder in folders]
    told = [command.communicate(timeout=240)[0] for command in commands]
    assert [command.returncode for command in commands] == [0] * 4, told
    last = start(tmp_path, *shared, f"hydra.sweep.dir={folders[0]}")
    told.append(last.communicate(timeout=240)[0])
    rows = rows_of(folders[0])
    assert [row["state"] for row in rows] == ["complete"] * count, told
    lines = [len((Path(row["folder"]) / "ran.txt").read_text().splitlines()) for row in rows]
    assert lines == [1] * count, "every trial ran once, on one of the machines"
    assert len({Path(row["folder"]).parent for row in rows}) > 1, "and not all of them on the same"
    for path in (path for path in tmp_path.glob("**/*") if path.is_file()):
        assert b"hunter2" not in path.read_bytes(), f"a password in {path}"


def _count_up(spec: StorageSpec, path: Path, begin: Any) -> None:
    begin.wait(60)
    for _ in range(20):
        with spec.exclusively("sweep"), spec.exclusively("sweep"):
            number = int(path.read_text())
            time.sleep(0.002)
            path.write_text(str(number + 1))


def _run_at_once(count: int, task: Any, *arguments: Any) -> list[Any]:
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(count)
    processes = [context.Process(target=task, args=(*arguments, begin)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return processes


def _hold_for_ever(spec: StorageSpec, begin: Any) -> None:
    with spec.exclusively("sweep"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_server_lets_one_in(
    served: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three processes none loses what another has counted; a killed holder keeps nobody out."""
    spec, path = storage_spec(served, tmp_path), tmp_path / "number"
    path.write_text("0")
    _run_at_once(3, _count_up, spec, path)
    assert path.read_text() == "60"
    monkeypatch.setattr("research.sweeps.storage_locks.LONGEST_S", 1.0)
    _run_at_once(1, _hold_for_ever, spec)
    with spec.exclusively("sweep"), spec.exclusively("another study"):
        path.write_text("0")
    with spec.exclusively("sweep"):
        time.sleep(1.5)  # longer than it is lent for: what was done is done


def _top_up(spec: StorageSpec, begin: Any) -> None:
    store = TrialStore(SweepTerms(storage=spec, name="sweep", sampler={"name": "grid"}))
    store.study()
    begin.wait(60)
    top_up(store, parse_space({"x": "range(0,30)"}, [])[0], 30, [])


def _control(spec: StorageSpec, told: Path, begin: Any) -> None:
    store = TrialStore(SweepTerms(storage=spec, name="sweep"))
    store.study()
    begin.wait(60)
    try:
        claim_control(store, 60.0)
        (told / f"controls_{os.getpid()}").touch()
        time.sleep(2.0)
    except ConfigError:
        (told / f"refused_{os.getpid()}").touch()


def test_commands_at_once_on_one_server_add_a_grid_once_and_one_controls(
    served: dict[str, str], tmp_path: Path
) -> None:
    spec = storage_spec(served, tmp_path)
    store = TrialStore(SweepTerms(storage=spec, name="sweep"))
    open_study(store, {"space": {}}, resume="auto", on_change="refuse")
    _run_at_once(3, _top_up, spec)
    points = [trial.system_attrs["fixed_params"]["x"] for trial in store.trials()]
    assert sorted(points) == list(range(30))
    _run_at_once(3, _control, spec, tmp_path)
    assert sorted(path.name.partition("_")[0] for path in tmp_path.glob("*_*")) == ["controls", "refused", "refused"]


def test_a_redis_server_that_cannot_be_used_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis() as url:
        for given, told in ((url, "invalid username-password"), (url.replace(":$SWEEP_WORD@", ""), "authenticated")):
            monkeypatch.setenv("SWEEP_WORD", "wrong-word")
            with pytest.raises(ConfigError, match=told) as error:
                storage_spec({"name": "journal_redis", "url": given}, tmp_path).open()
            assert "wrong-word" not in str(error.value) and "$NAME" in str(error.value)
    with pytest.raises(ConfigError, match="cannot be used"):
        storage_spec({"name": "journal_redis", "url": url}, tmp_path).open()


@pytest.mark.slow
def test_a_grpc_proxy_serves_workers(tmp_path: Path) -> None:
    port = free_port()
    serve = (
        "import sys, optuna; from optuna.storages.journal import JournalFileBackend as J;"
        "optuna.storages.run_grpc_proxy_server(optuna.storages.JournalStorage(J(sys.argv[1])), host='127.0.0.1', "
        "port=int(sys.argv[2]))"
    )
    server = subprocess.Popen([sys.executable, "-c", serve, str(tmp_path / "study.log"), str(port)])
    try:
        await_port(port)
        command = start(
            tmp_path, "x=interval(-5,5)", "hydra/sweeper/study_storage=grpc", "hydra.sweeper.storage.host=127.0.0.1",
            f"hydra.sweeper.storage.port={port}", "hydra.sweeper.n_trials=6", "hydra.sweeper.mode=workers",
            "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}/sweep",
        )  # fmt: skip
        told, _ = command.communicate(timeout=120)
        assert [row["state"] for row in rows_of(tmp_path / "sweep")] == ["complete"] * 6, told
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("mode", ["workers", pytest.param("batch", marks=pytest.mark.slow)])
def test_submitit_runs_a_sweep(mode: str, tmp_path: Path) -> None:
    """The launcher of SLURM clusters, on this machine."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = start(
        tmp_path, "x=interval(-5,5)", "kind=a,b", "hydra/launcher=submitit_local", "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2", f"hydra.sweeper.mode={mode}", f"hydra.sweep.dir={tmp_path}/sweep",
        "hydra.launcher.timeout_min=5",
    )  # fmt: skip
    told, _ = command.communicate(timeout=240)
    assert [row["state"] for row in rows_of(tmp_path / "sweep")] == ["complete"] * 4, told


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "workers"])
def test_a_preempted_job_is_gone_on_with(mode: str, tmp_path: Path) -> None:
    """The signal by which a cluster takes a machine back: the job starts again, and its trial has not failed."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = start(
        tmp_path, "x=interval(-5,5)", "sleep=5", "hydra/launcher=submitit_local", "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1", f"hydra.sweeper.mode={mode}", f"hydra.sweep.dir={tmp_path}/sweep",
        "hydra.launcher.timeout_min=5",
    )  # fmt: skip
    began, deadline = tmp_path / "sweep" / "0" / "began.txt", time.monotonic() + 120
    while not (began.exists() and began.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int(began.read_text()), signal.SIGUSR2)
    told, _ = command.communicate(timeout=240)
    rows = rows_of(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete"] * 2, told
    assert len(began.read_text().split()) == 2, "begun again, in another process"
    assert [row["attempts"] for row in rows] == ["1", "1"], "a preemption is no fault of the trial"


def has_slurm() -> bool:
    """Whether a SLURM cluster takes jobs here."""
    if not (shutil.which("sinfo") and shutil.which("sbatch")):
        return False
    told = subprocess.run(["sinfo", "-h", "-o", "%a %T"], capture_output=True, text=True, check=False)
    return any(line.split()[:1] == ["up"] and "down" not in line for line in told.stdout.splitlines())


SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=60", "hydra.launcher.mem_gb=null")


@pytest.mark.slow
@pytest.mark.skipif(not has_slurm(), reason="no SLURM here: apt-get install slurmctld slurmd munge")
@pytest.mark.parametrize("mode", ["batch", "workers"])
def test_slurm_runs_a_sweep_and_takes_a_job_back(mode: str, tmp_path: Path) -> None:
    """On a real cluster, whose controller sends the job the signal that submitit asked for, and starts it again.

    SLURM lets a job that is started again wait for two minutes.
    """
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = start(
        tmp_path, "x=interval(-5,5)", "sleep=5", *SLURM, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
        f"hydra.sweeper.mode={mode}", f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    began, deadline = tmp_path / "sweep" / "0" / "began.txt", time.monotonic() + 120
    while not (began.exists() and began.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    number = next((tmp_path / "sweep").glob("**/*_submitted.pkl")).name.split("_")[0]
    subprocess.run(["scancel", "--signal=USR2", number], check=True)
    told, _ = command.communicate(timeout=400)
    rows = rows_of(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete"] * 2, told
    assert len(began.read_text().split()) == 2, "begun again, in another process"
    assert [row["attempts"] for row in rows] == ["1", "1"], "a preemption is no fault of the trial"


@pytest.mark.slow
@pytest.mark.skipif(not has_slurm(), reason="no SLURM here: apt-get install slurmctld slurmd munge")
def test_a_trial_of_two_ranks_on_slurm(tmp_path: Path) -> None:
    """The ranks are the trial's own, not the tasks of the worker's job."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = start(
        tmp_path, "x=interval(-5,5)", "ranks=2", *SLURM, "hydra.sweeper.n_trials=2", "hydra.sweeper.mode=workers",
        "hydra.sweeper.subprocess=true", "hydra.launcher.cpus_per_task=2", f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    told, _ = command.communicate(timeout=240)
    rows = rows_of(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete"] * 2, told
    for row in rows:
        ranks = [(Path(row["folder"]) / f"rank_{rank}.txt").read_text().split()[0] for rank in (0, 1)]
        assert ranks == [row["param:x"]] * 2


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(RAY), reason=f"{RAY} names no python with the extra ray")
@pytest.mark.parametrize("mode", ["batch", "workers"])
def test_ray_runs_a_sweep(mode: str, tmp_path: Path) -> None:
    """In an environment of its own: Ray is no requirement of the tests."""
    command = start(
        tmp_path, "x=interval(-5,5)", "kind=a,b", "hydra/launcher=ray", "hydra.sweeper.n_trials=4",
        "hydra.sweeper.n_jobs=2", f"hydra.sweeper.mode={mode}", f"hydra.sweep.dir={tmp_path}/sweep",
        python=os.environ[RAY],
    )  # fmt: skip
    told, _ = command.communicate(timeout=240)
    assert [row["state"] for row in rows_of(tmp_path / "sweep")] == ["complete"] * 4, told
