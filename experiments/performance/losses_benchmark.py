"""Benchmark of divergences from hidden states: ours, chunked and dense, against public implementations.

    python experiments/performance/losses_benchmark.py                time and memory at every size, about an hour
    python experiments/performance/losses_benchmark.py time --classes 32000 --dtype float32
    python experiments/performance/losses_benchmark.py time --against torchtune Liger --rounds 20       these arms alone
    python experiments/performance/losses_benchmark.py --smoke        the same in sizes of seconds, which say nothing

The public ones come with `pip install '.[benchmark]'`; without it their rows say that they are missing. Times are CPU
times of one thread, all arms in turn, as multiples of the floor: the four matrix products that nobody can leave out.
Memory is the peak above the inputs, gradients included, each arm in a fresh process. Writes losses_results.json and its
table in README.md beside this file, but for --smoke and --against, which print. Figures of sizes that are not run again
are kept.
"""

import argparse
import json
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from losses_peers import ARMS, BETA, Shape, Work, arms_of
from measuring import about, in_turn, write_between

HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "bfloat16")
# classes: (positions, student width, teacher width)
TIMED = {32_000: (1024, 512, 1024), 50_257: (1024, 512, 1024), 151_936: (512, 512, 1024)}
WEIGHED = {32_000: (4096, 512, 512), 50_257: (2048, 768, 768), 151_936: (1024, 1024, 1024)}
SMOKE = {500: (48, 16, 24)}
COMPILED = ("chunked, compiled", "Liger, compiled")
SMALL_MEMORY = "Liger, chunks of 256"
MEBIBYTE = 2**20


def main(names: Sequence[str], chosen: argparse.Namespace) -> None:
    """Run the named benchmarks, or both, and write what they found."""
    path = HERE / "losses_results.json"
    prints_alone = chosen.smoke or chosen.against
    found = json.loads(path.read_text()) if path.exists() and not prints_alone else {}
    for name in names or BENCHMARKS:
        for shape in shapes(SMOKE if chosen.smoke else SIZES[name], chosen):
            found.setdefault(name, {})[str(shape)] = BENCHMARKS[name](shape, chosen)
            print(name, shape, json.dumps(found[name][str(shape)]), flush=True)
            if not prints_alone:
                path.write_text(json.dumps(found | {"about": about()}, indent=1) + "\n")
    if prints_alone:
        print("\n".join(table(found)))
    else:
        write_between("losses", table(found))


def shapes(sizes: dict[int, tuple[int, int, int]], chosen: argparse.Namespace) -> list[Shape]:
    return [
        Shape(classes, *sizes[classes], dtype, divergence)
        for classes in sizes
        for dtype in DTYPES
        for divergence in BETA
        if (not chosen.classes or classes in chosen.classes)
        and (not chosen.dtype or dtype in chosen.dtype)
        and (not chosen.divergence or divergence in chosen.divergence)
    ]


# -- time -------------------------------------------------------------------------------------------------------------


def timed(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of every arm, in turn, as multiples of the floor of the same round."""
    torch.set_num_threads(1)
    names = tuple(name for name in ARMS if name != SMALL_MEMORY and (chosen.compiled or name not in COMPILED))
    if chosen.against:
        names = ("floor", "chunked", *(name for name in ARMS if name in chosen.against))
    arms, missing = arms_of(shape, names)
    work = Work(shape)
    agreement = {name: gradients_differ_by(work, name) for name in arms if name != "floor"}

    def measured(name: str) -> float:
        started = time.process_time()
        work.run(arms[name])
        return time.process_time() - started

    seconds = in_turn({name: lambda name=name: measured(name) for name in arms}, 1 if chosen.smoke else chosen.rounds)
    told: dict[str, Any] = {}
    for name, values in seconds.items():
        ratios = sorted(value / floor for value, floor in zip(values, seconds["floor"], strict=True))
        told[name] = {
            "floors": round(statistics.median(ratios), 3),
            "low": round(ratios[0], 3),
            "high": round(ratios[-1], 3),
            "times_ours": round(statistics.median(map(operator.truediv, values, seconds["chunked"])), 3),
            "ms": round(1000 * statistics.median(values), 1),
            "rounds": len(values),
            "gradients_differ_by": agreement.get(name),
        }
    return told | {name: {"missing": reason} for name, reason in missing.items()}


def gradients_differ_by(work: Work, name: str) -> float:
    """Largest difference from our chunked gradients in units of their largest; raises where it is other work."""
    work.run(ARMS["chunked"])
    ours = [tensor.grad.float() for tensor in (work.hidden, work.head)]
    work.run(ARMS[name])
    theirs = [tensor.grad.float() for tensor in (work.hidden, work.head)]
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not worst < (1e-4 if work.shape.dtype == "float32" else 0.1):
        raise SystemExit(f"{name} gives gradients that differ from ours by {worst:.3g} at {work.shape}")
    return float(f"{worst:.2g}")


# -- memory -----------------------------------------------------------------------------------------------------------


def weighed(shape: Shape, chosen: argparse.Namespace) -> dict[str, Any]:
    """Peak MiB above the inputs of every arm but the compiled ones, each in a process of its own."""
    names = tuple(name for name in ARMS if name not in ("floor", *COMPILED))
    arms, missing = arms_of(shape, ("chunked", "dense") if chosen.smoke else names)
    told: dict[str, Any] = {name: {"mb": peak_of(name, shape)} for name in arms}
    return told | {name: {"missing": reason} for name, reason in missing.items()}


def peak_of(name: str, shape: Shape) -> float:
    command = [sys.executable, __file__, "--peak", json.dumps({"arm": name, **asdict(shape)})]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name} at {shape} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def print_peak(told: str) -> None:
    """Peak resident MiB of one step above what was resident before it; the kernel keeps the high-water mark."""
    options = json.loads(told)
    name, shape = options.pop("arm"), Shape(**options)
    torch.set_num_threads(1)
    arms_of(shape, (name,))  # imports, thread pools and kernels are not the loss's
    work = Work(shape)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work.run(ARMS[name])
    print((_resident("VmHWM") - before) / MEBIBYTE)


def _resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


# -- the tables -------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, unit in (("time", "time / floor (median, range)"), ("memory", "peak above the inputs, MiB")):
        if name not in found:
            continue
        sizes = list(found[name])
        arms = [arm for arm in ARMS if any(arm in found[name][size] for size in sizes)]
        lines += [f"| {unit} | " + " | ".join(sizes) + " |", "|---|" + "--:|" * len(sizes)]
        for arm in arms:
            lines.append(f"| {arm} | " + " | ".join(_cell(found[name][size].get(arm)) for size in sizes) + " |")
        lines.append("")
    return lines[:-1]


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if "missing" in entry:
        return "missing"
    if "mb" in entry:
        return f"{entry['mb']:,.0f}"
    return f"{entry['floors']:.2f} ({entry['low']:.2f} to {entry['high']:.2f}), {entry['ms']:,.0f} ms"


SIZES = {"time": TIMED, "memory": WEIGHED}
BENCHMARKS = {"time": timed, "memory": weighed}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="time, memory; both where none is named")
    parser.add_argument("--classes", type=int, nargs="*", help="vocabularies to run")
    parser.add_argument("--dtype", choices=DTYPES, nargs="*")
    parser.add_argument("--divergence", choices=list(BETA), nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile, which takes minutes to start")
    parser.add_argument(
        "--against", choices=list(ARMS), nargs="*", help="time the floor, ours and these alone; writes nothing"
    )
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds; writes nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.against and given.names != ["time"]:
        parser.error("--against chooses arms to time: write `time --against ...`")
    if given.peak:
        print_peak(given.peak)
    else:
        main(given.names, given)
