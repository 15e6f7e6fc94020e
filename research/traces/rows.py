"""One row of a trace store, and its columns on disk."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow

from research.records import Trace, Verdict


@dataclass(frozen=True, slots=True)
class StoredTrace:
    """A trace as a store keeps it: what was written, what the verifier said, and whether it is trained on.

    trace    its fields without any trace format; ``answer`` is "" where none was found
    text     the completion exactly as it was written
    kept     whether every filter let it through
    reason   the first filter that did not, None where all did
    verdict  the verifier's word; None where nobody verified
    tokens   length of the completion in the teacher's tokens, EOS included; None where not known
    logprob  natural log of the completion's probability as it was drawn; None where not known
    """

    trace: Trace
    text: str
    kept: bool = True
    reason: str | None = None
    verdict: Verdict | None = None
    tokens: int | None = None
    logprob: float | None = None


SCHEMA = pyarrow.schema(
    [
        pyarrow.field("problem", pyarrow.string(), nullable=False),
        pyarrow.field("chain", pyarrow.string(), nullable=False),
        pyarrow.field("answer", pyarrow.string(), nullable=False),
        pyarrow.field("index", pyarrow.int64(), nullable=False),
        pyarrow.field("sample", pyarrow.int32(), nullable=False),
        pyarrow.field("text", pyarrow.string(), nullable=False),
        pyarrow.field("verdict", pyarrow.string()),
        pyarrow.field("kept", pyarrow.bool_(), nullable=False),
        pyarrow.field("reason", pyarrow.string()),
        pyarrow.field("tokens", pyarrow.int32()),
        pyarrow.field("logprob", pyarrow.float64()),
        pyarrow.field("details", pyarrow.string(), nullable=False),
    ]
)
COLUMNS = tuple(SCHEMA.names)


def to_table(rows: Sequence[StoredTrace], metadata: Mapping[str, str]) -> pyarrow.Table:
    """The rows as a table with the file metadata of a shard; ``details`` becomes JSON text."""
    columns: dict[str, list[Any]] = {
        "problem": [row.trace.problem for row in rows],
        "chain": [row.trace.chain for row in rows],
        "answer": [row.trace.answer for row in rows],
        "index": [row.trace.index for row in rows],
        "sample": [row.trace.sample for row in rows],
        "text": [row.text for row in rows],
        "verdict": [row.verdict and row.verdict.value for row in rows],
        "kept": [row.kept for row in rows],
        "reason": [row.reason for row in rows],
        "tokens": [row.tokens for row in rows],
        "logprob": [row.logprob for row in rows],
        "details": [json.dumps(row.trace.details, sort_keys=True) if row.trace.details else "{}" for row in rows],
    }
    return pyarrow.table(columns, schema=SCHEMA.with_metadata(dict(metadata)))


def from_batch(batch: pyarrow.RecordBatch) -> Iterator[StoredTrace]:
    """The rows of one batch of a shard that has all columns."""
    columns = (batch.column(name).to_pylist() for name in COLUMNS)
    for problem, chain, answer, index, sample, text, verdict, kept, reason, tokens, logprob, details in zip(
        *columns, strict=True
    ):
        read = json.loads(details) if details != "{}" else {}
        yield StoredTrace(
            Trace(problem, chain, answer, index, sample, read),
            text,
            kept,
            reason,
            None if verdict is None else Verdict(verdict),
            tokens,
            logprob,
        )
