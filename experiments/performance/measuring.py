"""What the benchmarks share: arms in turn, their ratio, a plain loop to stand against, and their tables' place."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent / "README.md"


def in_turn(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each arm measures, A B C A B C, after one unmeasured round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, measure in arms.items():
            seconds = measure()
            if number > 0:
                found[name].append(seconds)
    return found


class Apart:
    """Processes of their own for what is compared, each with one thread: no arm meets the memory that another left.

    with Apart(["ours", "theirs"]) as apart:
        in_turn({name: apart.call(name, measure) for name in ("ours", "theirs")}, rounds)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)

    def __enter__(self) -> "Apart":
        spawn = get_context("spawn")
        self._pools = {name: ProcessPoolExecutor(1, spawn, initializer=_one_thread) for name in self._names}
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.shutdown()

    def call(self, name: str, measure: Callable[..., float], *given: Any) -> Callable[[], float]:
        """What calls ``measure``, a function of a module, in the process of that name, and waits for it."""
        return lambda: self._pools[name].submit(measure, *given).result()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def compared(first_s: Sequence[float], second_s: Sequence[float]) -> dict[str, Any]:
    """CPU seconds per token of two arms: the median of their ratios round by round, its range, and tokens per second.

    ratio  time of the first / time of the second, so that below 1 the first is faster
    """
    ratios = sorted(a / b for a, b in zip(first_s, second_s, strict=True))
    named = {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
    speeds = {"first_tokens_per_s": first_s, "second_tokens_per_s": second_s}
    return (
        {name: round(value, 3) for name, value in named.items()}
        | {name: round(1 / statistics.median(seconds)) for name, seconds in speeds.items()}
        | {"rounds": len(ratios)}
    )


def built(cfg: Any) -> Any:
    """Fresh data, student and method; equal configs give equal initial weights."""
    from research.config import build

    parts = build(cfg)
    parts.data.setup()
    return parts


def flat_weights(network: Any) -> Any:
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).clone()


def about() -> dict[str, Any]:
    """Hardware and versions."""
    from research.results.record import collect_versions

    return machine() | {"versions": collect_versions()}


def plain_steps(cfg: Any, student: Any, loader: Iterable[Any], steps: int) -> float:
    """CPU seconds of so many steps in a short loop: same batches, loss, clipping, optimizer and schedule."""
    import torch
    from torch.nn.functional import cross_entropy

    from research.config import make

    optimizer = make(cfg.optimizer, "optimizer")(student.parameters())
    scheduler = make(cfg.scheduler, "scheduler")(optimizer, total_steps=steps)
    student.train()
    started = time.process_time()
    for batch in islice(loader, steps):
        logits_BTV = student(*batch.network_inputs())
        nll_N = cross_entropy(logits_BTV.flatten(0, 1), batch.label_BT.flatten(), reduction="none")
        loss = nll_N @ batch.weight_BT.flatten() / batch.step_weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.trainer.gradient_clip_val)
        optimizer.step()
        scheduler.step()
    return time.process_time() - started


QUIET = ["trainer.max_epochs=1", "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false"]
LANGUAGE_MODEL = ["data=traces", "model@student=llama", "method=sft_trace", "optimizer=adamw", "optimizer.lr=4.0e-3",
                  "student.initializer_range=0.1", "trainer.gradient_clip_val=1.0", *QUIET]  # fmt: skip


def machine() -> dict[str, object]:
    from research.results.record import hardware

    return {"machine": hardware(1)}


def write_between(name: str, lines: Iterable[str]) -> None:
    """Put tables into the README beside this file, between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = README.read_text()
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    README.write_text("\n".join([head, *lines, tail]))
