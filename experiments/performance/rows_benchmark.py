"""Filters and store over synthetic traces that are made on the way, in a process whose memory is its own.

    python experiments/performance/rows_benchmark.py filters ROWS
    python experiments/performance/rows_benchmark.py write ROWS FOLDER
    python experiments/performance/rows_benchmark.py read ROWS FOLDER

Called by traces_benchmark.py; prints one line of JSON. Time is CPU time, of whole blocks of rows; making the rows is
not in it.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import yaml

from research.records import Trace, Verdict
from research.seeding import rng_for
from research.traces.candidates import Candidate
from research.traces.filters import build_filters
from research.traces.manifest import Tally
from research.traces.sources import Block
from research.traces.store import StoreWriter, TraceStore
from research.traces.writer import judge

CURATED = Path(__file__).resolve().parents[2] / "conf" / "filter" / "curated.yaml"
PER_TEXT, BLOCKS = 8, 100
SPOILT = 100  # of so many rows in a row, the first few are spoilt, each in its own way


def main(what: str, rows: int, folder: str = "") -> None:
    """Measure one of filters, write, read."""
    torch.set_num_threads(1)
    before = peak_mb()
    measured = {"filters": filters, "write": write, "read": read}[what](rows, Path(folder))
    print(json.dumps(measured | {"rows": rows, "peak_mb": round(peak_mb()), "peak_mb_before": round(before)}))


def filters(rows: int, folder: Path) -> dict[str, object]:
    """Rows judged, counted and made ready for a store, as `distill traces` does it, by the curated list of filters."""
    words = Words()
    names = yaml.safe_load(CURATED.read_text())["filters"]
    chain = build_filters(names, available=("verdict",), evaluation_texts=words.evaluation_texts)
    seconds, tally, characters = [], Tally(), 0
    for candidates in blocks(words, rows):
        characters += sum(len(candidate.text) for candidate in candidates)
        started = time.process_time()
        _, counts = judge(Block(candidates), chain)
        seconds.append((time.process_time() - started) / len(candidates))
        tally.add(counts)
    if tally.kept + sum(tally.dropped.values()) != rows:
        raise SystemExit(f"{tally.written} of {rows} rows came out of the filters")
    told = {"filters": [node["name"] for node in names], "kept": tally.kept, "dropped": tally.dropped}
    return rates(seconds) | told | {"text_mb": round(characters / 1e6)}


def write(rows: int, folder: Path) -> dict[str, object]:
    """Rows into the shards of a store, hashed and on disk."""
    seconds, chain = [], build_filters([{"name": "answer_key"}])
    with StoreWriter(folder, {"rows": rows}) as writer:
        for candidates in blocks(Words(), rows):
            stored, tally = judge(Block(candidates), chain)
            started = time.process_time()
            writer.write(stored, tally)
            seconds.append((time.process_time() - started) / len(stored))
        writer.seal()
    shards = [path.stat().st_size for path in folder.rglob("*.parquet")]
    return rates(seconds) | {"shards": len(shards), "disk_mb": round(sum(shards) / 1e6, 1)}


def read(rows: int, folder: Path) -> dict[str, object]:
    """Every row of that store, the shards' hashes checked."""
    seconds, found, stored = [], 0, TraceStore(folder).rows()
    while True:
        started = time.process_time()
        num = sum(1 for _ in islice(stored, _block_rows(rows)))
        if num == 0:
            break
        seconds.append((time.process_time() - started) / num)
        found += num
    if found != rows:
        raise SystemExit(f"the store gives {found} rows; {rows} were written")
    return rates(seconds)


def rates(seconds_per_row: Sequence[float]) -> dict[str, object]:
    """Rows per second: the median over blocks with its range; later is the last tenth of the blocks over the first."""
    tenth = max(1, len(seconds_per_row) // 10)
    later = statistics.median(seconds_per_row[:tenth]) / statistics.median(seconds_per_row[-tenth:])
    return {
        "rows_per_s": round(1 / statistics.median(seconds_per_row)),
        "low": round(1 / max(seconds_per_row)),
        "high": round(1 / min(seconds_per_row)),
        "later": round(later, 2),
        "blocks": len(seconds_per_row),
    }


class Words:
    """Sentences of a teacher, and problems of an evaluation in the same words.

    The worst case for n-gram look-ups: nearly every word is known, and no run of words is, since every 13 words of a
    problem hold a "holds" or a "Who".
    """

    def __init__(self) -> None:
        rng = rng_for(0, "benchmark words")
        parts = ("ba", "den", "kor", "li", "mas", "ne", "pol", "ri")
        words = [f"{a}{b}{c}" for a in parts for b in parts for c in parts]

        def sentence(verb: str) -> str:
            a, b, c = (words[number] for number in torch.randint(len(words), (3,), generator=rng).tolist())
            m, n = torch.randint(1, 100, (2,), generator=rng).tolist()
            return f"The {a} {verb} {m} of the {b}, and the {c} {verb} {n} more: {m} + {n} = {m + n}."

        self.evaluation_texts = [f"{sentence('holds')} {sentence('holds')} Who has more?" for _ in range(1000)]
        self.sentences = [sentence("has") for _ in range(5000)]


def blocks(words: Words, rows: int) -> Iterator[list[Candidate]]:
    """All rows, block by block; none is made before it is asked for, or kept."""
    size = _block_rows(rows)
    for number, first in enumerate(range(0, rows, size)):
        share = range(first, min(first + size, rows))
        draws = torch.randint(
            len(words.sentences), (len(share), PER_TEXT), generator=rng_for(0, "benchmark rows", number)
        )
        yield [candidate(words, row, picks) for row, picks in zip(share, draws.tolist(), strict=True)]


def candidate(words: Words, row: int, picks: Sequence[int]) -> Candidate:
    """One row. Of every SPOILT rows, one is spoilt for each of the filters; the first duplicate is an original."""
    sentences = [words.sentences[pick] for pick in picks]
    problem, chain, verdict = f"{sentences[0]} How many in row {row}?", " ".join(sentences), Verdict.CORRECT
    kind = row % SPOILT
    if kind == 0:
        verdict = Verdict.WRONG
    elif kind == 1:
        chain = f"{chain} 因此答案是这个数"
    elif kind == 2:
        chain = " ".join([chain] * 4)
    elif kind == 3:
        chain = f"{chain}\n```\nprint({row})\n```"
    elif kind == 4:
        chain = " ".join(sentences[:1] * PER_TEXT)
    elif kind == 5:
        problem, chain = "Twice?", words.sentences[0]
    elif kind == 6:
        problem = words.evaluation_texts[row // SPOILT % len(words.evaluation_texts)]
    trace = Trace(problem, chain, str(row), row)
    return Candidate(trace, f"{chain} The answer is {trace.answer if kind != 5 else 'so'}.", verdict)


def _block_rows(rows: int) -> int:
    return -(-rows // BLOCKS)


def peak_mb() -> float:
    """Most memory that this program has held. A child's ru_maxrss begins at what its parent held: asked last."""
    status = Path("/proc/self/status")
    if status.exists():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024 / 1e6
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum / 1e6 if sys.platform == "darwin" else maximum * 1024 / 1e6


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
