"""The page: hostile text stays text, nothing is fetched, heat is a token's loss weight, lengths are bounded."""

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from research.records import Trace, Verdict
from research.tasks.arithmetic import ChainedSums
from research.text.codec import Codec
from research.traces.explorer import LONGEST, write_explorer
from research.traces.manifest import Tally
from research.traces.rows import StoredTrace
from research.traces.store import StoreWriter, TraceStore, store_rows

HOSTILE = [
    "</pre><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<style>body{display:none}</style><!-- ",
    "&lt;script&gt; &amp; ]]> \x00 \x1b[31m",
    "javascript:alert(1) ' onmouseover='alert(1)",
]


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.spans: list[tuple[str, str]] = []
        self._title: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._title = dict(attrs).get("title") if tag == "span" else None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._title is not None:
            self.spans.append((data, self._title))
        self._title = None


def store_of(folder: Path, rows: list[StoredTrace], tally: Tally | None = None) -> TraceStore:
    kept = sum(row.kept for row in rows)
    dropped: dict[str, int] = {}
    for row in rows:
        if row.reason:
            dropped[row.reason] = dropped.get(row.reason, 0) + 1
    store_rows(folder, {"made": "<here>"}, [(rows, tally or Tally(written=len(rows), kept=kept, dropped=dropped))])
    return TraceStore(folder)


def test_hostile_text_never_becomes_markup(tmp_path: Path, sums_codec: Codec) -> None:
    rows = []
    for number, text in enumerate(HOSTILE):
        details = {"outcome": text, "gold": text, "corruption": text}
        reason = text if number % 2 else None
        rows.append(StoredTrace(Trace(text, text, text, number, 0, details), text, number % 2 == 0, reason))
    store = store_of(tmp_path / "<b>store&", rows)
    pages = [Page(write_explorer(store, codec, tmp_path / "page.html").read_text()) for codec in (None, sums_codec)]
    harmless = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "caption", "tr", "td",
                "span", "details", "summary", "pre", "div", "section", "article"}  # fmt: skip
    for page in pages:
        assert set(page.tags) <= harmless and page.tags.count("style") == 1
        assert {name for name, _ in page.attributes} <= {
            "lang", "charset", "http-equiv", "content", "class", "style", "title",
        }  # fmt: skip
        for text in HOSTILE:
            shown = text.replace("\x00", "␀").replace("\x1b", "␛")
            assert shown in page.text, "it is shown as it was written"


def test_the_page_fetches_and_runs_nothing(tmp_path: Path, make_rows: Callable[..., Any]) -> None:
    path = write_explorer(store_of(tmp_path / "store", make_rows(["a", "b"], {1: "length"})), None, tmp_path / "p.html")
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|img|iframe|object|form)|\b(src|href|action)\s*=|url\(|@import|https?:", text)


def test_accepted_and_dropped_stand_side_by_side_with_the_ledger(tmp_path: Path, make_rows: Callable[..., Any]) -> None:
    rows = make_rows([f"chain {n}" for n in range(6)], {1: "answer_key", 4: "length"})
    page = Page(write_explorer(store_of(tmp_path / "store", rows), None, tmp_path / "p.html").read_text())
    assert "4 of 6 traces kept" in page.text and "Accepted: 4 of 4" in page.text and "Dropped: 2 of 2" in page.text
    accepted, _, dropped = page.text.partition("Dropped: 2 of 2")
    assert all(f"chain {n}#" in (dropped if n in (1, 4) else accepted) for n in range(6))
    assert re.search(r"answer_key\s*1\s*16\.7%", page.text) and re.search(r"kept\s*4\s*66\.7%", page.text)


def test_the_heat_is_the_weight_that_each_token_is_trained_with(
    tmp_path: Path, sums: ChainedSums, sums_codec: Codec
) -> None:
    """By hand: the prompt's characters weigh nothing, chain, mark, answer and EOS weigh 1, whatever the shift."""
    problem = sums.problems("train", 1)[0]
    trace = Trace(problem.text, problem.chain, problem.answer, 0)
    store = store_of(tmp_path / "store", [StoredTrace(trace, f"{problem.chain}#{problem.answer}", True)])
    page = Page(write_explorer(store, sums_codec, tmp_path / "p.html").read_text())
    prompt, completion = f"{problem.text}=", f"{problem.chain}#{problem.answer}"
    assert page.spans == [*((c, "0") for c in prompt), *((c, "1") for c in completion), ("<eos>", "1")]


def test_prompt_weight_shows_as_heat(tmp_path: Path, sums: ChainedSums, sums_codec: Codec) -> None:
    problem = sums.problems("train", 1)[0]
    codec = Codec(sums_codec.tokenizer, sums_codec.template, max_tokens=128, prompt_loss_weight=0.25)
    trace = Trace(problem.text, problem.chain, problem.answer, 0)
    store = store_of(tmp_path / "store", [StoredTrace(trace, "", True)])
    spans = Page(write_explorer(store, codec, tmp_path / "p.html").read_text()).spans
    assert [weight for _, weight in spans[: len(problem.text) + 2]] == ["0", *["0.25"] * len(problem.text), "1"]


def test_what_cannot_be_encoded_says_why(tmp_path: Path, sums_codec: Codec) -> None:
    rows = [StoredTrace(Trace("17+32", "", "", 0), "4 9?", False, "no_answer", Verdict.UNPARSED)]
    page = Page(write_explorer(store_of(tmp_path / "store", rows), sums_codec, tmp_path / "p.html").read_text())
    assert "cannot be encoded: missing_answer" in page.text and "4 9?" in page.text


def test_the_page_has_bounds(tmp_path: Path, make_rows: Callable[..., Any]) -> None:
    rows = make_rows([f"c{n}." for n in range(60)], {n: "common" for n in range(10, 50)} | {59: "rare"})
    rows[0] = StoredTrace(Trace("p", "", "", 0), "x" * (LONGEST + 7), True)
    text = write_explorer(store_of(tmp_path / "store", rows), None, tmp_path / "p.html", num_traces=10).read_text()
    page = Page(text)
    assert text.count("<article>") == 20
    assert "Accepted: 10 of 19" in page.text and "Dropped: 10 of 41" in page.text
    assert "c59.#" in page.text, "a rare reason is not hidden behind a common one"
    assert "7 more characters" in page.text and "x" * (LONGEST + 1) not in text


def test_an_unfinished_store_can_be_looked_at(tmp_path: Path, make_rows: Callable[..., Any]) -> None:
    rows = make_rows(["a"])
    with StoreWriter(tmp_path, {}) as writer:
        writer.write(rows, Tally(written=1, kept=1))
    text = write_explorer(TraceStore(tmp_path, require_complete=False), None, tmp_path / "p.html").read_text()
    assert "the store is not finished" in html.unescape(text)


@pytest.mark.parametrize("rows", [[], ["a"]])
def test_an_empty_side(rows: list[str], tmp_path: Path, make_rows: Callable[..., Any]) -> None:
    page = Page(write_explorer(store_of(tmp_path / "s", make_rows(rows)), None, tmp_path / "p.html").read_text())
    assert f"Accepted: {len(rows)} of {len(rows)}" in page.text and "Dropped: 0 of 0" in page.text
