"""A store as one static page: accepted and dropped traces side by side, why they were dropped, what is trained on.

The page holds everything it needs and asks no server for anything. Every text of a trace is escaped: whatever a model
wrote is shown and never becomes markup.
"""

import html
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from research.records import Trace
from research.text.codec import Codec
from research.text.document import collate
from research.text.refusals import Refused
from research.traces.manifest import StoreManifest, Tally, replace_file
from research.traces.rows import StoredTrace
from research.traces.store import TraceStore

PAGE_TRACES = 200  # of each kind
_TOLD = ("outcome", "corruption", "gold")
LONGEST = 20_000  # characters or tokens of one trace on the page
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --trained: 46, 160, 67; --prompt: 128, 128, 128; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 1.5rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; height: .7em; background: rgb(var(--trained)); }
.sides { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.5rem; }
article { border-top: 1px solid var(--line); padding: .6rem 0; }
.facts { opacity: .75; font-size: .9em; }
.reason { font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font: 13px/1.6 ui-monospace, monospace; }
.token { border-right: 1px solid var(--line); }
details > summary { cursor: pointer; }
@media (max-width: 60rem) { .sides { grid-template-columns: minmax(0, 1fr); } }
"""


def write_explorer(store: TraceStore, codec: Codec | None, path: str | Path, *, num_traces: int = PAGE_TRACES) -> Path:
    """Write the page of a store; the first ``num_traces`` kept and dropped traces are on it.

    codec  colours each token by its weight in the loss and shows what would be encoded; None: plain text

    Raises StoreError where the store cannot be read.
    """
    kept = list(islice(store.rows(kept=True), num_traces))
    dropped = _of_every_reason(store, num_traces)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page(store.folder.resolve().name, store.manifest, kept, dropped, codec).encode())
    return path


def _of_every_reason(store: TraceStore, num_traces: int) -> list[StoredTrace]:
    """The first dropped traces of each reason, so that a rare one is not hidden behind a common one."""
    reasons = store.manifest.tally.dropped
    room = _shared_out(reasons, num_traces)
    found: list[StoredTrace] = []
    for name, shard in store.manifest.shards.items():
        if shard.rows == shard.tally.kept or not any(room[reason] for reason in shard.tally.dropped):
            continue
        for row in store.rows_of(name, kept=False):
            if row.reason is not None and room.get(row.reason, 0):
                room[row.reason] -= 1
                found.append(row)
    order = {reason: number for number, reason in enumerate(reasons)}
    return sorted(found, key=lambda row: order[str(row.reason)])


def _shared_out(reasons: Mapping[str, int], num_traces: int) -> dict[str, int]:
    """Places for each reason: equal ones, and what the rare reasons leave to the others."""
    room, left = {}, num_traces
    for number, (reason, count) in enumerate(sorted(reasons.items(), key=lambda item: item[1])):
        room[reason] = min(count, left // (len(reasons) - number))
        left -= room[reason]
    return room


def page(
    name: str,
    manifest: StoreManifest,
    kept: Sequence[StoredTrace],
    dropped: Sequence[StoredTrace],
    codec: Codec | None = None,
) -> str:
    """The page as HTML."""
    tally = manifest.tally
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        # nothing may be fetched or run, whatever a trace says
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{_text(name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(name)}</h1>",
        f"<p>{tally.kept:,} of {tally.written:,} traces kept, of {tally.problems:,} problems, {tally.tokens:,} tokens"
        f"{'' if manifest.complete else ' so far: the store is not finished'}.</p>",
        _ledger(tally),
        _settings(manifest),
        _legend(codec),
        '<div class="sides"><section>',
        f"<h2>Accepted: {len(kept):,} of {tally.kept:,}</h2>",
        *(_article(row, codec) for row in kept),
        "</section><section>",
        f"<h2>Dropped: {len(dropped):,} of {tally.written - tally.kept:,}</h2>",
        *(_article(row, codec) for row in dropped),
        "</section></div></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _ledger(tally: Tally) -> str:
    """Every trace once: kept, or under the first reason against it."""
    rows = [("kept", tally.kept), *tally.dropped.items()]
    lines = [_bar_row(name, number, tally.written) for name, number in rows]
    tables = [f"<table><caption>Drop ledger</caption>{''.join(lines)}</table>"]
    for title, counts in (
        ("Verdicts", tally.verdicts),
        ("Outcomes", tally.outcomes),
        ("Error channels", tally.corruptions),
    ):
        if counts:
            lines = [_bar_row(name, number, tally.written) for name, number in counts.items()]
            tables.append(f"<details><summary>{title}</summary><table>{''.join(lines)}</table></details>")
    return "\n".join(tables)


def _bar_row(name: str, number: int, of: int) -> str:
    share = number / of if of else 0.0
    bar = f'<span class="bar" style="width:{share * 20:.2f}rem"></span>'
    cells = f'<td class="number">{number:,}</td><td class="number">{share:.1%}</td><td>{bar}</td>'
    return f"<tr><td>{_text(name)}</td>{cells}</tr>"


def _settings(manifest: StoreManifest) -> str:
    told = json.dumps(manifest.settings, indent=1, ensure_ascii=False)
    return f"<details><summary>Settings</summary><pre>{_text(told)}</pre></details>"


def _legend(codec: Codec | None) -> str:
    if codec is None:
        return "<p>No tokenizer was given: traces are shown as text.</p>"
    return (
        f"<p>Tokens as {_text(codec.trace_format)} trains on them: "
        f'<span class="token" style="{_heat(1.0)}">weight 1</span> '
        f'<span class="token" style="{_heat(0.0)}">weight 0</span></p>'
    )


def _article(row: StoredTrace, codec: Codec | None) -> str:
    facts = [f"problem {row.trace.index}", f"sample {row.trace.sample}"]
    facts += [] if row.verdict is None else [row.verdict.value]
    facts += [
        f"{name} {row.trace.details[name]}" for name in ("outcome", "corruption", "gold") if name in row.trace.details
    ]
    facts += [] if row.tokens is None else [f"{row.tokens} tokens"]
    facts += [] if row.logprob is None else [f"logprob {row.logprob:.2f}"]
    reason = "" if row.reason is None else f'<span class="reason">{_text(row.reason)}</span> · '
    told = f'<div class="facts">{reason}{_text(" · ".join(facts))}</div>'
    return f"<article>{told}{_body(row, codec)}</article>"


def _body(row: StoredTrace, codec: Codec | None) -> str:
    """The document token by token where it has one, else the text as it was written."""
    if codec is not None:
        try:
            return f"<pre>{_tokens(row.trace, codec)}</pre>"
        except Refused as refusal:
            note = f'<div class="facts">cannot be encoded: {_text(refusal.reason)}</div>'
            return note + _plain(row)
    return _plain(row)


def _plain(row: StoredTrace) -> str:
    return f"<pre>{_text(_cut(row.trace.problem))}</pre><pre>{_text(_cut(row.text))}</pre>"


def _tokens(trace: Trace, codec: Codec) -> str:
    """Each token with the weight that predicting it has in the loss; the first is predicted by nothing."""
    document = codec.encode(trace)
    batch = collate([document], prompt_loss_weight=codec.prompt_loss_weight, pad_id=codec.pad_id)
    weights = [0.0, *batch.weight_BT[0, :-1].tolist()][:LONGEST]
    pieces = codec.pieces(document.ids[:LONGEST])
    spans = [
        f'<span class="token" title="{weight:g}" style="{_heat(weight)}">{_text(piece)}</span>'
        for piece, weight in zip(pieces, weights, strict=True)
    ]
    left_out = len(document.ids) - len(spans)
    return "".join(spans) + (f" … {left_out:,} more tokens" if left_out else "")


def _heat(weight: float) -> str:
    """Background of a token: green by its weight, grey where it is not trained on."""
    strength = min(1.0, max(0.0, weight))
    return (
        f"background: rgba(var(--trained), {0.08 + 0.32 * strength:.2f})"
        if strength
        else "background: rgba(var(--prompt), 0.12)"
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … {len(text) - LONGEST:,} more characters"


def _text(value: Any) -> str:
    """Text that stays text: escaped, and with control characters made visible."""
    shown = "".join(c if c >= " " or c in "\n\t" else chr(0x2400 + ord(c)) for c in str(value))
    return html.escape(shown, quote=True)
