"""What a sweep costs beside its training: against separate processes, another sweeper, within a trial, and pruning.

    python experiments/performance/sweep_benchmark.py [processes] [peer] [overhead] [pruning] [--quick]

Every part runs `distill` on scikit-learn's digits, one thread each. CPU seconds of the commands and of all that they
start, in turn; the way to an objective is wall time, of trials one after the other. `peer` wants a python with Hydra
1.4, hydra-optuna-sweeper 1.4 and this package's requirements in RESEARCH_HYDRA14_PYTHON. Writes sweep_results.json and
the table in README.md beside this file (not with --quick).
"""

import csv
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import about, in_turn, write_between

HERE = Path(__file__).resolve().parent
START = [sys.executable, "-c", "from research.commands.main import main; main()"]
RUN = (
    "experiment=digits_hard",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "threads=1",
    "evaluation.splits=[val]",
)
ON_THE_LINE = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
SEARCH = "hydra.sweeper.params={optimizer.lr: 'tag(log,interval(1e-4,1e-1))'}"


def main() -> None:
    """Run the named parts, or all of them."""
    is_quick = "--quick" in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        raise SystemExit(f"no benchmark {sorted(unknown)[0]}; expected {', '.join(PARTS)}")
    path = HERE / "sweep_results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not is_quick else {}
    for name in names:
        found[name] = PARTS[name](is_quick) | about()
        print(name, json.dumps(found[name]), flush=True)
        if not is_quick:
            path.write_text(json.dumps(found, indent=1) + "\n")
    if is_quick:
        print("\n".join(table(found)))
    else:
        write_between("sweeps", table(found))


def processes(is_quick: bool) -> dict[str, Any]:
    """As many trials of one space: one sweep in one process, and as many commands `distill train`."""
    trials, rounds, epochs = (2, 1, 1) if is_quick else (8, 3, 10)
    length = f"trainer.max_epochs={epochs}"

    def swept(folder: Path) -> float:
        return cpu_seconds(["train", "-m", "hydra/sweeper=optuna_study", *RUN, length, SEARCH,
                            f"hydra.sweeper.n_trials={trials}", f"hydra.sweep.dir={folder}"])  # fmt: skip

    def separate(folder: Path) -> float:
        commands = [
            ["train", *RUN, length, f"optimizer.lr={1e-3 * (n + 1)}", f"hydra.run.dir={folder}/{n}"]
            for n in range(trials)
        ]
        return sum(map(cpu_seconds, commands))

    return against({"sweep": in_folder(swept), "separate": in_folder(separate)}, trials, epochs, rounds)


def peer(is_quick: bool) -> dict[str, Any]:
    """As many trials of one space by this sweeper and by hydra-optuna-sweeper, both on Hydra 1.4 in its environment.

    Ours ends with figures, the importance of parameters and best.yaml, which the other does not make.
    """
    python = os.environ.get(PRERELEASE)
    if not python:
        return {"missing": f"{PRERELEASE} names no python"}
    trials, rounds, epochs = (2, 1, 1) if is_quick else (24, 3, 10)
    start = [python, *START[1:]]

    def swept_by(sweeper: str, *more: str) -> Callable[[Path], float]:
        return lambda folder: cpu_seconds(
            ["train", "-m", f"hydra/sweeper={sweeper}", *RUN, f"trainer.max_epochs={epochs}", ON_THE_LINE,
             f"hydra.sweeper.n_trials={trials}", f"hydra.sweep.dir={folder}", *more], start,
        )  # fmt: skip

    arms = {
        "sweep": in_folder(swept_by("optuna_study")),
        "separate": in_folder(swept_by("optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.study_name=peer")),
    }
    return against(arms, trials, epochs, rounds)


def against(arms: dict[str, Callable[[], float]], trials: int, epochs: int, rounds: int) -> dict[str, Any]:
    """Trials per CPU hour of both, and the ratio round by round; above 1 the sweep is the faster."""
    found = in_turn(arms, rounds)
    ratios = sorted(b / a for a, b in zip(found["sweep"], found["separate"], strict=True))
    return {
        "trials": trials, "epochs": epochs, "rounds": rounds,
        "ratio": round(statistics.median(ratios), 3), "low": round(ratios[0], 3), "high": round(ratios[-1], 3),
        "trials_per_cpu_hour": {name: round(3600 * trials / statistics.median(s)) for name, s in found.items()},
    }  # fmt: skip


def overhead(is_quick: bool) -> dict[str, Any]:
    """The share of a trial's time that is not its fit, from the second trial on: start-up is paid once.

    A trial's time is what passes between the end of the one before it and its own end: to draw and write its values, to
    compose its config, to build, train, evaluate and tell.
    """
    found = {}
    for epochs, trials in ((1, 3), (2, 3)) if is_quick else ((5, 9), (20, 9), (60, 9), (320, 6)):
        with tempfile.TemporaryDirectory() as name:
            cpu_seconds(["train", "-m", "hydra/sweeper=optuna_study", *RUN, f"trainer.max_epochs={epochs}", SEARCH,
                         f"hydra.sweeper.n_trials={trials}", f"hydra.sweep.dir={name}"])  # fmt: skip
            ends = ends_of(Path(name))
            shares, fits = [], []
            for row, (began, ended) in zip(rows_of(Path(name))[1:], itertools.pairwise(ends), strict=True):
                ledger = json.loads((Path(row["folder"]) / "run.json").read_text())["ledger"]
                fits.append(sum(ledger[part]["seconds"] or 0.0 for part in ("student_update", "teacher_scoring")))
                shares.append(100 * (1 - fits[-1] / (ended - began)))
        found[str(epochs)] = {
            "fit_s": round(statistics.median(fits), 3), "outside_percent": round(statistics.median(shares), 1),
            "low": round(min(shares), 1), "high": round(max(shares), 1),
        }  # fmt: skip
    return found


def pruning(is_quick: bool) -> dict[str, Any]:
    """The same random points with and without the median pruner: FLOPs of all trials, and the way to the best value.

    flops_saved_percent   of the updates that the same trials take unpruned
    seconds_to_best       wall time until a trial is as good as the best unpruned one: without over with the pruner
    reached               seeds in which the pruner let that trial live
    """
    trials, epochs, seeds = (4, 3, (0,)) if is_quick else (16, 60, (0, 1, 2, 3, 4))
    saved, faster = [], []
    for seed in seeds:
        flops, rows = {}, {}
        for pruner in ("none", "median"):
            with tempfile.TemporaryDirectory() as name:
                cpu_seconds(["train", "-m", "hydra/sweeper=optuna_study", *RUN, f"trainer.max_epochs={epochs}", SEARCH,
                             f"trainer.check_val_every_n_epoch={epochs // 12 or 1}",
                             f"hydra/sweeper/study_pruner={pruner}", "hydra/sweeper/study_sampler=random",
                             f"hydra.sweeper.sampler.seed={seed}", f"hydra.sweeper.n_trials={trials}",
                             f"hydra.sweep.dir={name}"])  # fmt: skip
                rows[pruner] = rows_of(Path(name))
                ledgers = [json.loads((Path(row["folder"]) / "run.json").read_text())["ledger"] for row in rows[pruner]]
                flops[pruner] = sum(ledger["student_update"]["flops"] for ledger in ledgers)
        saved.append(100 * (1 - flops["median"] / flops["none"]))
        target = min(float(row["value"]) for row in rows["none"])
        seconds = {pruner: seconds_until(target, found) for pruner, found in rows.items()}
        if seconds["median"] is not None and seconds["none"] is not None:
            faster.append(seconds["none"] / seconds["median"])
    return {
        "trials": trials, "seeds": len(seeds), "flops_saved_percent": round(statistics.median(saved), 1),
        "low": round(min(saved), 1), "high": round(max(saved), 1), "reached": len(faster),
        "seconds_to_best": [round(ratio, 3) for ratio in sorted(faster)],
    }  # fmt: skip


def seconds_until(target: float, rows: list[dict[str, str]]) -> float | None:
    """Seconds of the trials one after the other up to the first whose value is no greater; None: there is none."""
    spent = 0.0
    for row in rows:
        spent += float(row["seconds"])
        if row["state"] == "complete" and float(row["value"]) <= target:
            return spent
    return None


def in_folder(measure: Callable[[Path], float]) -> Callable[[], float]:
    """The measurement in a new folder each time."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            return measure(Path(name))

    return run


def cpu_seconds(arguments: list[str], start: Sequence[str] = ()) -> float:
    """CPU seconds of one command and of all that it starts. Raises where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*(start or START), *arguments],
        cwd=HERE.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ends_of(folder: Path) -> list[float]:
    """When each trial was told, in seconds, by number."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    trials = optuna.load_study(study_name=folder.name, storage=storage).get_trials(deepcopy=False)
    return [trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete is not None]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def table(found: dict[str, Any]) -> list[str]:
    """The README's table."""
    lines = ["| what | figure (range) | goal | trials per CPU hour |", "|---|--:|--:|--:|"]
    for name, what, goal in (
        ("processes", "one sweep / as many `distill train`", "reported"),
        ("peer", "this sweeper / hydra-optuna-sweeper 1.4, both on Hydra 1.4", ">= 1"),
    ):
        entry = found.get(name, {})
        if "missing" in entry:
            lines.append(f"| {what} | missing | {goal} | |")
        elif entry:
            speed = entry["trials_per_cpu_hour"]
            spread = f"{entry['ratio']} ({entry['low']} to {entry['high']}) times as fast"
            what = f"{what}, {entry['trials']} trials"
            lines.append(f"| {what} | {spread} | {goal} | {speed['sweep']:,} and {speed['separate']:,} |")
    for epochs, entry in found.get("overhead", {}).items():
        if epochs.isdigit():
            spread = f"{entry['outside_percent']} % ({entry['low']} to {entry['high']})"
            goal = "<= 10 %" if entry["fit_s"] >= SHORT_S else "reported"
            lines.append(f"| of a trial, outside its fit of {entry['fit_s']} s | {spread} | {goal} | |")
    if entry := found.get("pruning"):
        spread = f"{entry['flops_saved_percent']} % ({entry['low']} to {entry['high']})"
        lines.append(f"| FLOPs that the median pruner saves, {entry['trials']} random trials | {spread} | reported | |")
        ratios = ", ".join(map(str, entry["seconds_to_best"])) or "-"
        lines.append(
            f"| wall time to the best unpruned value, without / with it, seed by seed | {ratios} | reported | |"
        )
    return lines


PRERELEASE, SHORT_S = "RESEARCH_HYDRA14_PYTHON", 4.0
PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "processes": processes, "peer": peer, "overhead": overhead, "pruning": pruning,
}  # fmt: skip

if __name__ == "__main__":
    main()
