"""Benchmarks of the soft-target spine: ratios inside one run, alternately, medians with their range.

    python experiments/performance/benchmark.py            all of them, about 5 minutes on two quiet cores
    python experiments/performance/benchmark.py cli        one of: step, cache, cli, cells

Writes results.json and the table in README.md beside this file. Absolute times are of this machine alone.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from measuring import machine, write_between

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE.parent
PAIRS, STEPS = 7, 150


def main(names: Sequence[str]) -> None:
    """Run the named benchmarks, or all, and write what they found."""
    path = HERE / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in names or BENCHMARKS:
        found[name] = BENCHMARKS[name]()
        print(name, json.dumps(found[name]), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    write_table(found)


def step() -> dict[str, object]:
    """(a) One MNIST student step, hard and soft, through Lightning against the same work in a plain loop."""
    write_cache()
    return {arm: step_ratio(overrides) for arm, overrides in ARMS.items()} | machine()


def step_ratio(overrides: Sequence[str]) -> dict[str, float]:
    cfg = composed([*overrides, f"trainer.limit_train_batches={STEPS}"])
    lightning_s, plain_s = alternately(lambda: lightning_epoch(cfg), lambda: plain_epoch(cfg), PAIRS)
    return ratio(lightning_s, plain_s, STEPS)


def lightning_epoch(cfg) -> float:  # type: ignore[no-untyped-def]
    """Seconds of one training epoch inside Trainer.fit, as `distill train` sets it up."""
    import lightning as L

    from research.config import build, build_trainer

    class Clock(L.Callback):
        seconds = 0.0

        def on_train_epoch_start(self, *_: object) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: object) -> None:
            self.seconds = time.perf_counter() - self.started

    clock, parts = Clock(), build(cfg)
    with tempfile.TemporaryDirectory() as folder:
        late = {"default_root_dir": folder, "callbacks": [clock], "logger": False, "enable_checkpointing": False}
        trainer = build_trainer(cfg.trainer, **late, enable_model_summary=False, num_sanity_val_steps=0)
        trainer.fit(parts.method, datamodule=parts.data)
    return clock.seconds


def plain_epoch(cfg) -> float:  # type: ignore[no-untyped-def]
    """Seconds of the same steps in a loop of eight lines: same batches, loss, autocast, optimizer, schedule."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax

    from research.config import build, make
    from research.methods.schedules import warmup_then_linear

    parts = build(cfg)
    parts.data.setup()
    student, teacher = parts.method.student, parts.teacher
    optimizer = make(cfg.optimizer, "optimizer")(student.parameters())
    scheduler = warmup_then_linear(optimizer, STEPS)
    loader = parts.data.train_dataloader()
    student.train()
    started = time.perf_counter()
    for number, batch in enumerate(loader):
        if number == STEPS:
            break
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(batch.inputs).float()
            if teacher is None:
                loss = cross_entropy(logits, batch.label_B)
            else:
                T = cfg.method.temperature
                target = log_softmax(teacher.signal(batch).logits_NV / T, dim=-1)
                loss = T * T * kl_div(log_softmax(logits / T, dim=-1), target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return time.perf_counter() - started


def cache() -> dict[str, object]:
    """(b) Steps that read the teacher's signal from a cache against steps that score it live (784-1200-1200-10)."""
    write_cache()
    cached, live = composed([*ARMS["soft"], *SHORT]), composed([*ARMS["soft"], *LIVE, *SHORT])
    cached_s, live_s = alternately(lambda: lightning_epoch(cached), lambda: lightning_epoch(live), PAIRS)
    return ratio(cached_s, live_s, STEPS) | machine()


def cli() -> dict[str, object]:
    """(d) What answers without torch, against a bare `import hydra`, each in a fresh interpreter."""
    bare = [sys.executable, "-c", "import hydra"]
    commands = {
        "distill train --help": ["train", "--help"],
        "a misspelt key": ["train", "sede=3"],
        "distill report": ["report", str(EXPERIMENTS / "mnist_soft_targets")],
    }
    return {
        name: ratio(*alternately(lambda words=words: process_s([*DISTILL, *words]), lambda: process_s(bare), PAIRS), 1)
        for name, words in commands.items()
    } | machine()


def cells() -> dict[str, object]:
    """(c) Wall seconds of the runs of every committed study, from its results."""
    found: dict[str, object] = {}
    for path in sorted(EXPERIMENTS.glob("*/results.csv")):
        rows = [row for row in csv.DictReader(path.open()) if row.get("role") == "arm" and row.get("seconds")]
        seconds = [float(row["seconds"]) for row in rows]
        if seconds:
            found[path.parent.name] = {
                "runs": len(seconds),
                "median_s": round(statistics.median(seconds), 2),
                "min_s": round(min(seconds), 2),
                "max_s": round(max(seconds), 2),
            }
    return found


def alternately(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of both, measured A B A B after one unmeasured round."""
    first(), second()
    results: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        results[0].append(first())
        results[1].append(second())
    return results


def ratio(first_s: Sequence[float], second_s: Sequence[float], units: int) -> dict[str, float]:
    """Median of the pairwise ratios with its range, and both medians in milliseconds per unit."""
    ratios = sorted(a / b for a, b in zip(first_s, second_s, strict=True))
    return {
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "first_ms": round(1000 * statistics.median(first_s) / units, 2),
        "second_ms": round(1000 * statistics.median(second_s) / units, 2),
        "pairs": len(ratios),
    }


def process_s(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=EXPERIMENTS.parent, check=False)
    return time.perf_counter() - started


def composed(overrides: Sequence[str]):  # type: ignore[no-untyped-def]
    import torch
    from hydra import compose, initialize_config_dir

    from research.config import conf_dir
    from research.schemas import register_schemas

    torch.set_num_threads(1)
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def write_cache() -> None:
    """The committed teacher's signals for MNIST, written once by the public command."""
    words = ["cache", "data=mnist", f"teacher.path={TEACHER}", f"cache_dir={CACHE}"]
    subprocess.run([*DISTILL, *words], check=True, cwd=EXPERIMENTS.parent)


def write_table(found: dict[str, dict]) -> None:
    """The README's table, between its markers."""
    lines = ["| what | ratio (median, range) | goal | first, ms | second, ms |", "|---|--:|--:|--:|--:|"]

    def row(what: str, goal: str, entry: dict) -> str:
        spread = f"{entry['ratio']} ({entry['low']} to {entry['high']})"
        return f"| {what} | {spread} | {goal} | {entry['first_ms']} | {entry['second_ms']} |"

    for arm in ARMS:
        if arm in found.get("step", {}):
            lines.append(row(f"step through Lightning / plain loop, {arm}", "<= 1.15", found["step"][arm]))
    if "cache" in found:
        lines.append(row("step with cached teacher / live teacher", "reported", found["cache"]))
    for name, entry in found.get("cli", {}).items():
        if name != "machine":
            lines.append(row(f"{name} / `import hydra`", "<= 3", entry))
    lines += ["", "| study | runs | median s per run | range |", "|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {e['runs']} | {e['median_s']} | {e['min_s']} to {e['max_s']} |"
        for name, e in found.get("cells", {}).items()
    ]
    write_between("results", lines)


DISTILL = [sys.executable, "-c", "import sys; from research.commands.main import main; sys.argv[0] = 'distill'; main()"]
BASE = ["experiment=mnist_hard", "data.holdout=0", "evaluation.variants=null", "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false"]  # fmt: skip
TEACHER = EXPERIMENTS / "teachers" / "mnist"
CACHE = EXPERIMENTS.parent / "outputs" / "benchmark_cache"
ARMS = {
    "hard": BASE,
    "soft": [*BASE, "method=soft_target", "method.temperature=20", "teacher=cached", f"teacher.path={CACHE}"],
}
SHORT = [f"trainer.limit_train_batches={STEPS}"]
LIVE = ["teacher=frozen", f"teacher.path={TEACHER}"]
BENCHMARKS: dict[str, Callable[[], dict[str, object]]] = {"step": step, "cache": cache, "cli": cli, "cells": cells}

if __name__ == "__main__":
    main(sys.argv[1:])
