"""Benchmarks of training on the student's own words: whole optimizer steps, ratios inside one run, in turn.

    python experiments/performance/on_policy_benchmark.py             both, about five minutes
    python experiments/performance/on_policy_benchmark.py step        one of: step, share
    python experiments/performance/on_policy_benchmark.py --quick     the same in seconds, which says nothing

TRL comes with `pip install '.[benchmark]'`; without it its rows say that it is missing. Writes on_policy_results.json
and its tables in README.md beside this file; --quick prints alone. Times are CPU times of one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from benchmark import ratio
from measuring import Apart, about, in_turn, write_between
from on_policy_setting import ONE_LAYER, SIZES, Clock, Setting, fitted, write_models

from research.generation.decoding import LiveBatch

HERE = Path(__file__).resolve().parent
TRAINERS = ("GKDTrainer", "DistillationTrainer")
ARMS = {"ours": "on_policy", "rounded": "rounded_teacher"}  # of the first table
SHARED = ("on_policy", "policy_gradient")
MISSING = "not installed; pip install '.[benchmark]'"


def main(names: Sequence[str], quick: bool) -> None:
    """Run the named benchmarks, or both, and write what they found."""
    path = HERE / "on_policy_results.json"
    found = json.loads(path.read_text()) if path.exists() and not quick else {}
    rounds, steps = (2, 2) if quick else (9, 10)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), ONE_LAYER if quick else SIZES, steps)
        sizes: dict[str, Any] = {**write_models(setting), "steps": steps}
        for name in names or BENCHMARKS:
            found[name] = BENCHMARKS[name](setting, rounds) | sizes | about()
            print(name, json.dumps(found[name]), flush=True)
            if not quick:
                path.write_text(json.dumps(found, indent=1) + "\n")
    if quick:
        print("\n".join(table(found)))
    else:
        write_between("on-policy", table(found))


# -- against TRL ------------------------------------------------------------------------------------------------------


def step(setting: Setting, rounds: int) -> dict[str, Any]:
    """(b) One step of ours through Lightning against one of each trainer of TRL: same weights, prompts and loss.

    rounded   ours with the teacher's weights in bfloat16, theirs in float32 as they were
    """
    if find_spec("trl") is None:
        with Apart(["ours"]) as apart:
            seconds = in_turn({"ours": apart.call("ours", _seconds, setting, ARMS["ours"])}, rounds)["ours"]
        alone = {"ours_ms": round(1000 * statistics.median(seconds) / setting.steps, 2)}
        return alone | {name: {"missing": MISSING} for name in TRAINERS}
    with Apart([*ARMS, *TRAINERS]) as apart:
        agreement = {name: apart.call(name, _loss_differs_by, setting, name)() for name in TRAINERS}
        ours = {arm: apart.call(arm, _seconds, setting, method) for arm, method in ARMS.items()}
        theirs = {name: apart.call(name, _seconds_of_peer, setting, name) for name in TRAINERS}
        measured = in_turn(ours | theirs, rounds)
    return {
        name: ratio(measured[name], measured["ours"], setting.steps)
        | {"loss_differs_by": agreement[name]}
        | {"rounded": ratio(measured[name], measured["rounded"], setting.steps)}
        for name in TRAINERS
    }


def _seconds(setting: Setting, method: str) -> float:
    return fitted(setting, method, Clock).seconds


def _seconds_of_peer(setting: Setting, name: str) -> float:
    from on_policy_peers import Peers

    return Peers(setting).seconds(name)


def _loss_differs_by(setting: Setting, name: str) -> float:
    from on_policy_peers import Peers

    return Peers(setting).loss_differs_by(name)


# -- where the time goes ----------------------------------------------------------------------------------------------

DRAWING, OPTIMIZER, REST = "drawing, outside the model", "clipping and optimizer", "the rest"
WHILE_DRAWING = "student, while drawing"
PARTS = (WHILE_DRAWING, "teacher", "student", "backward", OPTIMIZER, DRAWING, REST)
OUTSIDE = (DRAWING, REST)


class Spans(Clock):
    """CPU seconds of each part of the timed steps; a part inside another counts for itself alone."""

    def __init__(self, method: Any) -> None:
        super().__init__(method)
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._open, self._last = [REST], 0.0
        self._watch(method.student, "student")
        if method.teacher is not None:
            method.teacher.signal_at = self._as_part("teacher", method.teacher.signal_at)
        rollouts = method._own_words._buffer
        rollouts.ready = self._as_part(DRAWING, rollouts.ready)

    def _as_part(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*given: Any) -> Any:
            self.begin(part)
            try:
                return call(*given)
            finally:
                self.end()

        return measured

    def _watch(self, network: Any, name: str) -> None:
        """Around the model, not on it: a model with hooks is sampled, and reads, by the library's pass."""
        network.register_forward_pre_hook(lambda *_: self.begin(name))
        network.register_forward_hook(lambda *_: self.end(), always_call=True)

    def setup(self, *_: object, **__: object) -> None:
        self._passes = LiveBatch.__init__, LiveBatch.feed
        for call in self._passes:
            setattr(LiveBatch, call.__name__, self._as_part(WHILE_DRAWING, call))

    def teardown(self, *_: object, **__: object) -> None:
        for call in self._passes:
            setattr(LiveBatch, call.__name__, call)

    def begin(self, part: str) -> None:
        self._note()
        self._open.append(part)

    def end(self) -> None:
        self._note()
        self._open.pop()

    def _note(self) -> None:
        now = time.process_time()
        self.parts[self._open[-1]] += now - self._last
        self._last = now

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.end())

    def on_before_backward(self, *_: object) -> None:
        self.begin("backward")

    def on_after_backward(self, *_: object) -> None:
        self.end()

    def on_before_optimizer_step(self, *_: object) -> None:  # the backward pass is over, clipping comes next
        self.begin(OPTIMIZER)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        super().on_train_batch_end(trainer)
        self._note()
        if trainer.global_step == 1:
            self.parts = dict.fromkeys(PARTS, 0.0)


def share(setting: Setting, rounds: int) -> dict[str, Any]:
    """(c) What part of a step is spent where, and how much of it in no model: nets, gradients and optimizer."""
    fits: dict[str, list[Spans]] = {method: [] for method in SHARED}

    def seconds(method: str) -> float:
        fits[method].append(fitted(setting, method, Spans))
        return fits[method][-1].seconds

    in_turn({method: partial(seconds, method) for method in SHARED}, rounds)
    return {method: shares(kept[1:], setting.steps) for method, kept in fits.items()}


def shares(fits: Sequence[Spans], steps: int) -> dict[str, Any]:
    """Percent of the time in each part and in what is outside the model: median and range over the fits."""
    percent = {part: [100 * fit.parts[part] / fit.seconds for fit in fits] for part in PARTS}
    outside = [sum(percent[part][number] for part in OUTSIDE) for number in range(len(fits))]
    return {
        "outside": spread(outside),
        "parts": {part: spread(values) for part, values in percent.items()},
        "step_ms": round(1000 * statistics.median(fit.seconds for fit in fits) / steps, 2),
        "rounds": len(fits),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    named = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 2) for name, value in named.items()}


# -- the tables -------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> list[str]:
    """The README's two tables."""
    lines: list[str] = []
    if "step" in found:
        lines += ["| one step | ratio (median, range) | goal | theirs, ms | ours, ms |", "|---|--:|--:|--:|--:|"]
        entries = {name: found["step"][name] for name in TRAINERS}
        lines += [_compared(f"{name} / ours", entry) for name, entry in entries.items()]
        lines += [
            _compared(f"{name} / ours with a teacher in bfloat16", entry["rounded"])
            for name, entry in entries.items()
            if "rounded" in entry
        ]
        lines += [""]
    if "share" in found:
        methods = SHARED
        lines += ["| % of a step (median, range) | " + " | ".join(methods) + " |", "|---|" + "--:|" * len(methods)]
        for part in PARTS:
            cells = [found["share"][method]["parts"][part] for method in methods]
            lines.append(f"| {part} | " + " | ".join(map(_spread, cells)) + " |")
        cells = [found["share"][method]["outside"] for method in methods]
        lines.append("| outside the model, together | " + " | ".join(map(_spread, cells)) + " |")
    return lines


def _compared(name: str, entry: Mapping[str, Any]) -> str:
    if "missing" in entry:
        return f"| TRL {name} | missing | >= 1.3 | | |"
    spread = f"{entry['ratio']} ({entry['low']} to {entry['high']})"
    return f"| TRL {name} | {spread} | >= 1.3 | {entry['first_ms']} | {entry['second_ms']} |"


def _spread(entry: Mapping[str, float]) -> str:
    return f"{entry['median']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})"


BENCHMARKS = {"step": step, "share": share}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: both")
    parser.add_argument("--quick", action="store_true", help="sizes of seconds, printed and not written")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {sorted(unknown)[0]}; expected {', '.join(BENCHMARKS)}")
    main(given.names, given.quick)
