"""The sweeper as on several machines: one PostgreSQL or gRPC storage, separate commands, and a cluster's launcher."""

import csv
import getpass
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

import pytest

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
def test_four_commands_share_one_postgresql(tmp_path: Path) -> None:
    """Started at the same moment, each as on a machine of its own, with a folder of its own."""
    count = 16
    with postgres() as url:
        shared = (
            "x=interval(-5,5)", "kind=a,b", "sleep=0.3", "hydra/sweeper/study_storage=rdb",
            f"hydra.sweeper.storage.url='{url}'", "hydra.sweeper.study_name=shared",
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
