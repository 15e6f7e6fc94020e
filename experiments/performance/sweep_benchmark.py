"""What a sweep costs beside its training: against separate processes, within a trial, and what pruning saves.

    python experiments/performance/sweep_benchmark.py [processes] [overhead] [pruning] [--quick]

Every part runs `distill` on scikit-learn's digits. CPU seconds of the commands and of all that they start, in turn; one
thread each. Writes sweep_results.json (not with --quick).
"""

import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import about, in_turn

HERE = Path(__file__).resolve().parent
START = [sys.executable, "-c", "from research.commands.main import main; main()"]
RUN = (
    "experiment=digits_hard",
    "trainer.enable_progress_bar=false",
    "logger=none",
    "threads=1",
    "evaluation.splits=[val]",
)
SEARCH = "hydra.sweeper.params={optimizer.lr: 'tag(log,interval(1e-4,1e-1))'}"


def main() -> None:
    """Run the named parts, or all of them."""
    is_quick = "--quick" in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or list(PARTS)
    found: dict[str, Any] = {name: PARTS[name](is_quick) for name in names}
    for name in names:
        print(name, json.dumps(found[name]))
    if not is_quick:
        path = HERE / "sweep_results.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**kept, **found, "about": about()}, indent=1) + "\n")


def processes(is_quick: bool) -> dict[str, Any]:
    """As many trials of one space: one sweep in one process, and as many commands `distill train`."""
    trials, rounds, epochs = (2, 1, 1) if is_quick else (8, 5, 10)
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

    found = in_turn({"sweep": in_folder(swept), "separate": in_folder(separate)}, rounds)
    ratios = sorted(b / a for a, b in zip(found["sweep"], found["separate"], strict=True))
    return {
        "trials": trials, "epochs": epochs, "rounds": rounds,
        "ratio": round(statistics.median(ratios), 3), "low": round(ratios[0], 3), "high": round(ratios[-1], 3),
        "trials_per_cpu_hour": {name: round(3600 * trials / statistics.median(s)) for name, s in found.items()},
    }  # fmt: skip


def overhead(is_quick: bool) -> dict[str, Any]:
    """The share of a trial's time that is not its fit, from the second trial on: start-up is paid once."""
    found = {}
    for epochs in (1, 2) if is_quick else (5, 20, 60):
        with tempfile.TemporaryDirectory() as name:
            cpu_seconds(["train", "-m", "hydra/sweeper=optuna_study", *RUN, f"trainer.max_epochs={epochs}", SEARCH,
                         f"hydra.sweeper.n_trials={3 if is_quick else 9}", f"hydra.sweep.dir={name}"])  # fmt: skip
            rows = rows_of(Path(name))[1:]
            shares, fits = [], []
            for row in rows:
                ledger = json.loads((Path(row["folder"]) / "run.json").read_text())["ledger"]
                fits.append(sum(ledger[part]["seconds"] or 0.0 for part in ("student_update", "teacher_scoring")))
                shares.append(100 * (1 - fits[-1] / float(row["seconds"])))
        found[str(epochs)] = {
            "fit_s": round(statistics.median(fits), 3), "outside_percent": round(statistics.median(shares), 1),
            "low": round(min(shares), 1), "high": round(max(shares), 1),
        }  # fmt: skip
    return found


def pruning(is_quick: bool) -> dict[str, Any]:
    """The same random points with and without the median pruner: optimizer steps taken, and the best value found."""
    trials, epochs, seeds = (4, 3, (0,)) if is_quick else (24, 20, (0, 1, 2, 3, 4))
    saved, lost = [], []
    for seed in seeds:
        steps, best = {}, {}
        for pruner in ("none", "median"):
            with tempfile.TemporaryDirectory() as name:
                cpu_seconds(["train", "-m", "hydra/sweeper=optuna_study", *RUN, f"trainer.max_epochs={epochs}", SEARCH,
                             f"hydra/sweeper/pruner={pruner}", "hydra/sweeper/sampler=random",
                             f"hydra.sweeper.sampler.seed={seed}", f"hydra.sweeper.n_trials={trials}",
                             f"hydra.sweep.dir={name}"])  # fmt: skip
                rows = rows_of(Path(name))
                ledgers = [json.loads((Path(row["folder"]) / "run.json").read_text())["ledger"] for row in rows]
                steps[pruner] = sum(ledger["student_update"]["flops"] for ledger in ledgers)
                best[pruner] = min(float(row["value"]) for row in rows if row["state"] == "complete")
        saved.append(100 * (1 - steps["median"] / steps["none"]))
        lost.append(best["median"] - best["none"])
    return {
        "trials": trials, "seeds": len(seeds), "flops_saved_percent": round(statistics.median(saved), 1),
        "low": round(min(saved), 1), "high": round(max(saved), 1), "errors_lost": lost,
    }  # fmt: skip


def in_folder(measure: Callable[[Path], float]) -> Callable[[], float]:
    """The measurement in a new folder each time."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            return measure(Path(name))

    return run


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of one command and of all that it starts. Raises where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*START, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {"processes": processes, "overhead": overhead, "pruning": pruning}

if __name__ == "__main__":
    main()
