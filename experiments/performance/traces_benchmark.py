"""Benchmarks of written traces: ratios inside one run, in turn, medians with their range.

    python experiments/performance/traces_benchmark.py               all of them, about 15 minutes on two quiet cores
    python experiments/performance/traces_benchmark.py step          one or more of: step, packing, rollout, rows
    python experiments/performance/traces_benchmark.py --quick       the same in sizes of seconds, which say nothing

Writes traces_results.json and its table in README.md beside this file; --quick prints alone. Times are CPU times of one
thread, so that other work on the machine weighs less; absolute ones are of this machine alone. `packing` reads real
traces from RESEARCH_DATA_DIR.
"""

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmark import composed
from measuring import (
    LANGUAGE_MODEL,
    QUIET,
    about,
    built,
    compared,
    flat_weights,
    in_turn,
    plain_steps,
    write_between,
)
from rollout_benchmark import rollout

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sizes:
    """How much is measured: rounds in which every arm runs once, and what one arm does in a round."""

    documents: Mapping[str, int]  # of each real set, for packing
    rounds: int = 7
    steps: int = 150
    training: int = 150
    prompts: int = 256
    filter_rows: int = 1_000_000
    store_rows: int = 200_000


FULL = Sizes(documents={"gsm8k_r1distill": 96, "svamp_palm540b": 384})
QUICK = Sizes(
    documents={"gsm8k_r1distill": 8, "svamp_palm540b": 16},
    rounds=2, steps=4, training=20, prompts=16, filter_rows=2000, store_rows=2000,
)  # fmt: skip


def main(names: Sequence[str], quick: bool) -> None:
    """Run the named benchmarks, or all, and write what they found."""
    path = HERE / "traces_results.json"
    found = json.loads(path.read_text()) if path.exists() and not quick else {}
    for name in names or BENCHMARKS:
        found[name] = BENCHMARKS[name](QUICK if quick else FULL) | about()
        print(name, json.dumps(found[name]), flush=True)
        if not quick:
            path.write_text(json.dumps(found, indent=1) + "\n")
    if quick:
        print("\n".join(table(found)))
    else:
        write_between("traces", table(found))


# -- steps through Lightning ------------------------------------------------------------------------------------------


def step(sizes: Sizes) -> dict[str, Any]:
    """(a) One step of sft_trace on sum8 through Lightning, with its logger, against the same work in a plain loop."""
    cfg = composed([*SUM8, f"trainer.limit_train_batches={sizes.steps}", f"data.num_train={64 * sizes.steps}"])
    weights: dict[str, Any] = {}
    tokens = 0

    def lightning() -> float:
        nonlocal tokens
        seconds, method = lightning_epoch(cfg)
        weights["lightning"], tokens = flat_weights(method.student), method.tokens_seen
        return seconds / tokens

    def plain() -> float:
        parts = built(cfg)
        seconds = plain_steps(cfg, parts.method.student, parts.data.train_dataloader(), sizes.steps)
        weights["plain"] = flat_weights(parts.method.student)
        return seconds / tokens

    measured = in_turn({"lightning": lightning, "plain": plain}, sizes.rounds)
    difference = float((weights["lightning"] - weights["plain"]).abs().max())
    if not difference < 1e-3:
        raise SystemExit(f"the two loops end in weights that differ by {difference}: they did not do the same work")
    sizes_of = {"steps": sizes.steps, "tokens_per_step": tokens / sizes.steps, "weights_differ_by": difference}
    return {"sum8": compared(measured["lightning"], measured["plain"]) | sizes_of}


def lightning_epoch(cfg: Any) -> tuple[float, Any]:
    """CPU seconds of one training epoch inside Trainer.fit, as `distill train` sets it up, and the trained method."""
    import lightning as L

    from research.config import build_logger, build_trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # importing lightning sets it to INFO
    warnings.filterwarnings("ignore", module="lightning")

    class Clock(L.Callback):
        seconds = 0.0

        def on_train_epoch_start(self, *_: object) -> None:
            self.started = time.process_time()

        def on_train_end(self, *_: object) -> None:
            self.seconds = time.process_time() - self.started

    clock, parts = Clock(), built(cfg)
    with tempfile.TemporaryDirectory() as folder:
        late = {"default_root_dir": folder, "callbacks": [clock], "logger": build_logger(cfg, Path(folder))}
        quiet = {"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        trainer = build_trainer(cfg.trainer, **late, **quiet)
        trainer.fit(parts.method, datamodule=parts.data)
    return clock.seconds, parts.method


# -- packing ----------------------------------------------------------------------------------------------------------


def packing(sizes: Sizes) -> dict[str, Any]:
    """(b) Packed rows, and steps of like lengths, against shuffled padded rows, on the lengths of real traces."""
    return {name: packing_of(name, num, sizes) for name, num in sizes.documents.items()}


def packing_of(name: str, num: int, sizes: Sizes) -> dict[str, Any]:
    """The same documents in the plain loop, one epoch for each arm and round."""
    cfg = composed([*REAL, *REAL_SETS[name]])
    parts = built(cfg)
    codec, traces = parts.data.codec, parts.data.traces()  # the tokenizer is of all traces, the documents every so many
    documents = codec.encode_all(traces[:: max(1, len(traces) // num)][:num])[0]
    lengths = sorted(map(len, documents))
    tokens = sum(lengths)
    arms = {"padded": {}, "packed": {"packed_to": PACKED_TO[name]}, "grouped": {"length_grouping": 50}}
    places: dict[str, float] = {}

    def epoch(arm: str) -> float:
        loader = token_loader(documents, codec.pad_id, cfg.data.batch_size, arms[arm])
        batches = list(loader)
        places[arm] = sum(batch.ids_BT.numel() for batch in batches) / tokens
        if sum(int((batch.segment_BT > 0).sum()) for batch in batches) != tokens:
            raise SystemExit(f"{arm}: not every token of {name} is in the batches")
        student = copy.deepcopy(parts.method.student)  # every epoch begins with the same weights
        return plain_steps(cfg, student, loader, len(batches)) / tokens

    measured = in_turn({arm: partial(epoch, arm) for arm in arms}, sizes.rounds)
    about_lengths = {"documents": len(documents), "median_tokens": statistics.median(lengths), "longest": lengths[-1]}
    return {
        arm: compared(measured[arm], measured["padded"])
        | {"places_per_token": round(places[arm], 3), "padded_places_per_token": round(places["padded"], 3)}
        | options
        | about_lengths
        for arm, options in arms.items()
        if arm != "padded"
    }


def token_loader(documents: Sequence[Any], pad_id: int, batch_size: int, options: Mapping[str, Any]) -> Any:
    """The loader that TraceData makes, over these documents, at its first epoch."""
    from research.data.token_loader import TokenLoader

    def first() -> tuple[int, int]:
        return 0, 0

    return TokenLoader(documents, pad_id=pad_id, batch_size=batch_size, shuffle=True, where=first, **options)


# -- filters and store ------------------------------------------------------------------------------------------------


def rows(sizes: Sizes) -> dict[str, Any]:
    """(c) Rows per second and peak memory of the curated filters and of the store, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "filters": in_own_process("filters", sizes.filter_rows),
            "write": in_own_process("write", sizes.store_rows, folder),
            "read": in_own_process("read", sizes.store_rows, folder),
        }


def in_own_process(what: str, num: int, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "rows_benchmark.py"), what, str(num), *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


# -- the tables -------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> list[str]:
    """The README's two tables."""
    lines = [
        "| what | ratio of time per token (median, range) | goal | first, tokens/s | second, tokens/s |",
        "|---|--:|--:|--:|--:|",
    ]
    for what, goal, entry in ratios_of(found):
        spread = f"{entry['ratio']} ({entry['low']} to {entry['high']})"
        speeds = f"{entry['first_tokens_per_s']:,} | {entry['second_tokens_per_s']:,}"
        lines.append(f"| {what} | {spread} | {goal} | {speeds} |")
    lines += ["", "| what | rows | rows/s (median, range) | last tenth / first | peak memory, MB |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for what, key in (("curated filters", "filters"), ("store, written", "write"), ("store, read", "read")):
        if entry := found.get("rows", {}).get(key):
            spread = f"{entry['rows_per_s']:,} ({entry['low']:,} to {entry['high']:,})"
            memory = f"{entry['peak_mb']} ({entry['peak_mb_before']} before the first row)"
            lines.append(f"| {what} | {entry['rows']:,} | {spread} | {entry['later']} | {memory} |")
    return lines


def ratios_of(found: Mapping[str, Any]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    """(what, goal, entry) of everything that is compared."""
    if "step" in found:
        yield "sft_trace on sum8 through Lightning / plain loop", "<= 1.15", found["step"]["sum8"]
    for name in REAL_SETS:
        for arm, entry in found.get("packing", {}).get(name, {}).items():
            yield f"{arm} / padded, lengths of {name}", "reported", entry
    for name in ("greedy", "sampled"):
        if entry := found.get("rollout", {}).get(name):
            yield f"LocalGenerator / `model.generate`, {name}", "reported", entry


SUM8 = ["experiment=sum8_trace", "data.num_val=1", "data.num_test=1", *QUIET]
REAL = [*LANGUAGE_MODEL, "template=think", "data.tokenizer=bpe", "data.num_val=1", "data.num_test=1",
        "data.max_tokens=1024", "student.max_positions=1024"]  # fmt: skip
PACKED_TO = {"gsm8k_r1distill": 1024, "svamp_palm540b": 512}
REAL_SETS = {
    "gsm8k_r1distill": ["task=gsm8k_r1", "data.store=released:gsm8k_r1distill", "data.num_train=1000",
                        "data.batch_size=16"],
    "svamp_palm540b": ["task=svamp", "data.store=released:svamp_palm540b", "data.batch_size=64"],
}  # fmt: skip
BENCHMARKS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "step": step,
    "packing": packing,
    "rollout": lambda sizes: rollout(sizes.training, sizes.prompts, sizes.rounds),
    "rows": rows,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--quick", action="store_true", help="sizes of seconds, printed and not written")
    given = parser.parse_args()
    if unknown := set(given.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {sorted(unknown)[0]}; expected {', '.join(BENCHMARKS)}")
    main(given.names, given.quick)
