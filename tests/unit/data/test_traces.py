"""Traces as training data: what is encoded, dropped, served and told, from the task, from files and from stores."""

import gc
import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from research.data.resume import rewind_to_last_step
from research.data.splits import DataError
from research.data.token_loader import TokenLoader
from research.data.traces import TraceData
from research.data.train_traces import reference_trace
from research.errors import ConfigError
from research.records import Problem, TokenBatch, Trace, Verdict
from research.tasks.addition import Addition
from research.tasks.arithmetic import ChainedSums
from research.tasks.base import AbstractTask, Split
from research.tasks.free_form import FreeFormMath
from research.tasks.word_problems import Gsm8k, Gsm8kR1, Svamp
from research.text.document import Document
from research.text.formats import TRACE_FORMATS
from research.text.templates import Alpaca, Plain
from research.traces.manifest import Tally
from research.traces.rows import StoredTrace
from research.traces.store import store_rows

NUM_TRAIN, NUM_VAL, NUM_TEST = 30, 6, 4


def make(task: AbstractTask | None = None, **changes: Any) -> TraceData:
    options = {"num_train": NUM_TRAIN, "num_val": NUM_VAL, "num_test": NUM_TEST, "batch_size": 8, **changes}
    options.setdefault("template", Plain())
    return TraceData(task=task or Addition(min_digits=1, max_digits=4), **options)


def text_of(data: TraceData, document: Document) -> str:
    return data.codec.tokenizer.decode(document.ids[:-1])


def references(num: int = NUM_TRAIN) -> list[Trace]:
    return [reference_trace(problem) for problem in Addition(min_digits=1, max_digits=4).problems("train", num)]


def write_jsonl(path: Path, traces: Sequence[Trace]) -> Path:
    rows = [{"question": trace.problem, "rationale": trace.chain, "answer": trace.answer} for trace in traces]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_store(folder: Path, traces: Sequence[Trace], dropped: frozenset[int] = frozenset()) -> Path:
    rows = []
    for number, trace in enumerate(traces):
        kept, reason = number not in dropped, None if number not in dropped else "answer_key"
        verdict = Verdict.CORRECT if kept else Verdict.WRONG
        rows.append(StoredTrace(trace, f"{trace.chain}#{trace.answer}", kept, reason, verdict, 9, -1.0))
    tally = Tally(written=len(rows), kept=len(rows) - len(dropped), dropped={"answer_key": len(dropped)})
    store_rows(folder, {"made": "here"}, [(rows, tally)])
    return folder


# -- documents --------------------------------------------------------------------------------------------------------


def test_documents_are_the_tasks_own_solutions() -> None:
    data = make()
    for split, num in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        problems = Addition(min_digits=1, max_digits=4).problems(split, num)
        written = [text_of(data, document) for document in data.documents(split)]
        assert written == [f"{p.text}={p.chain}#{p.answer}" for p in problems]
        assert [document.index for document in data.documents(split)] == list(range(num))
    eos = data.codec.eos_ids[0]
    assert all(document.ids[-1] == eos and document.ids.count(eos) == 1 for document in data.documents("train"))


def test_every_trace_format_trains_on_what_its_name_says() -> None:
    """Five totals to a chain; the prompt is the same under every format, and graded alike."""
    written = {}
    for trace_format in TRACE_FORMATS:
        data = make(ChainedSums(), trace_format=trace_format)
        documents = data.documents("train")
        assert len(documents) == NUM_TRAIN
        written[trace_format] = [text_of(data, document).partition("=")[2] for document in documents]
        prompts = [data.codec.tokenizer.decode(document.ids[: document.prompt_length]) for document in documents]
        assert prompts == [f"{problem.text}=" for problem in data.problems("train")]
    problems = make(ChainedSums()).problems("train")
    assert written["chain_then_answer"] == [f"{p.chain}#{p.answer}" for p in problems]
    assert written["answer_then_chain"] == [f"#{p.answer}:{p.chain}" for p in problems]
    assert written["answer_only"] == [f"#{p.answer}" for p in problems]
    assert written["filler_then_answer"] == [f"{'.' * len(p.chain)}#{p.answer}" for p in problems]
    for problem, text in zip(problems, written["shuffled_chain"], strict=True):
        chain, _, answer = text.partition("#")
        assert sorted(chain.split(";")) == sorted(problem.chain.split(";")) and answer == problem.answer
    shuffled = sum(p.chain not in text for p, text in zip(problems, written["shuffled_chain"], strict=True))
    assert shuffled > NUM_TRAIN - 3  # all but chains of equal totals
    swapped = [text.partition("#") for text in written["swapped_chain"]]
    assert Counter(chain for chain, _, _ in swapped) == Counter(p.chain for p in problems)
    assert [answer for _, _, answer in swapped] == [p.answer for p in problems]
    assert not any(chain == p.chain for (chain, _, _), p in zip(swapped, problems, strict=True))


def test_the_format_seed_alone_decides_which_chains_are_shuffled() -> None:
    def written(**changes: Any) -> list[tuple[int, ...]]:
        data = make(ChainedSums(), trace_format="shuffled_chain", **changes)
        return [document.ids for document in data.documents("train")]

    assert written() == written(seed=1) != written(format_seed=1)


def test_validation_documents_keep_the_reference_chain_whatever_is_trained_on() -> None:
    plain, swapped = make(ChainedSums()), make(ChainedSums(), trace_format="swapped_chain")
    assert plain.documents("val") == swapped.documents("val")


def test_rows_of_a_file_that_are_no_problem_are_told(tmp_path: Path) -> None:
    rows = [{"problem": f"What is {number} and 1?", "answer": number + 1, "chain": "add"} for number in range(60)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [*rows, *rows[:4]])))
    task = FreeFormMath(tmp_path / "mine.jsonl")
    data = make(task, template=Alpaca(), tokenizer="bpe", vocab_size=300, num_train=None, num_val=None, num_test=None)
    told = data.summary()
    assert sum(told["problems_left_out"].values()) == 4 and sum(told["rows"].values()) == 60
    assert all(reason.startswith("repeated in ") for reason in told["problems_left_out"])
    assert make().summary()["problems_left_out"] == {}


def test_what_is_too_long_is_dropped_and_counted() -> None:
    lengths = [len(document.ids) for document in make().documents("train")]
    limit = sorted(lengths)[NUM_TRAIN // 2]
    data = make(max_tokens=limit)
    data.setup()
    assert [len(document.ids) for document in data.documents("train")] == [n for n in lengths if n <= limit]
    told = data.summary()
    assert told["dropped"]["train"] == {"too_long": sum(n > limit for n in lengths)}
    assert told["rows"]["train"] == sum(n <= limit for n in lengths) and told["longest"] == limit
    assert told["train_tokens"] == sum(n for n in lengths if n <= limit)


def test_traces_without_chain_are_dropped_and_counted_where_a_chain_is_written(tmp_path: Path) -> None:
    traces = [replace(t, chain="") if t.index % 3 == 0 else t for t in references()]
    store = write_store(tmp_path / "store", traces)
    data = make(store=str(store), num_train=None)
    assert [document.index for document in data.documents("train")] == [n for n in range(NUM_TRAIN) if n % 3]
    assert data.summary()["dropped"]["train"] == {"empty_chain": NUM_TRAIN // 3}
    assert len(make(store=str(store), num_train=None, trace_format="answer_only").documents("train")) == NUM_TRAIN


# -- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "store"])
def test_a_file_and_a_store_train_like_the_traces_they_hold(kind: str, tmp_path: Path) -> None:
    expected = make()
    if kind == "store":
        path = write_store(tmp_path / "store", references())
    else:
        path = write_jsonl(tmp_path / f"traces.{kind}", references())
    data = make(store=str(path))
    assert data.documents("train") == expected.documents("train")
    assert data.fingerprint("train") == expected.fingerprint("train")
    assert data.summary()["store"] == path.name and expected.summary()["store"] is None
    few = make(store=str(path), num_train=7)
    assert few.documents("train") == expected.documents("train")[:7]
    assert few.problems("val") == expected.problems("val")


def test_bad_rows_of_a_file_are_counted_and_listed_with_their_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", references(9)).read_text().splitlines()
    lines = [*good[:4], "{", *good[4:], json.dumps({"question": "1+1", "rationale": "2"}), json.dumps([1])]
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(lines))
    data = make(store=str(path), num_train=None, max_tokens=24, tokenizer="bpe", vocab_size=280)
    data.list_bad_rows(tmp_path / "run" / "quarantine.jsonl")
    data.setup()
    dropped = dict(data.summary()["dropped"]["train"])
    assert 0 < dropped.pop("too_long") == 9 - len(data.documents("train")) < 9
    assert dropped == {"quarantine_not_json": 1, "quarantine_no_answer": 1, "quarantine_not_an_object": 1}
    listed = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    told = [(row["line"], row["reason"]) for row in listed]
    assert told == [(5, "not_json"), (11, "no_answer"), (12, "not_an_object")]
    assert caplog.text.count("3 of 12 rows") == 1, "told once, whatever the number of passes"
    few = make(store=str(path), num_train=5)
    assert few.summary()["dropped"]["train"] == {"quarantine_not_json": 1}, "no row behind the last that is taken"
    assert few.with_traces(references(3), seed=1).summary()["dropped"] == {"val": {}, "train": {}}


def rows_in_memory() -> int:
    gc.collect()
    return sum(isinstance(kept, Trace | Document) for kept in gc.get_objects())


@pytest.mark.parametrize("trace_format", ["chain_then_answer", "shuffled_chain", "filler_then_answer", "answer_only"])
def test_a_large_store_is_not_held_in_memory(trace_format: str, tmp_path: Path) -> None:
    store, before = write_store(tmp_path / "store", references(3000)), rows_in_memory()
    data = make(store=str(store), num_train=None, trace_format=trace_format)
    data.setup()
    assert data.summary()["rows"]["train"] == 3000 and len(data.fingerprint("train")) == 64
    assert rows_in_memory() < before + 100
    held = make(trace_format=trace_format, num_train=None).with_traces(references(3000), seed=0)
    assert data.documents("train") == held.documents("train") and data.fingerprint("train") == held.fingerprint("train")


def test_dropped_rows_of_a_store_are_not_trained_on(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", references(), dropped=frozenset({0, 4, 29}))
    data = make(store=str(store), num_train=None)
    kept = [trace for number, trace in enumerate(references()) if number not in (0, 4, 29)]
    assert [text_of(data, d) for d in data.documents("train")] == [f"{t.problem}={t.chain}#{t.answer}" for t in kept]


def test_traces_of_held_out_problems_are_dropped_and_counted(tmp_path: Path) -> None:
    """They are told by their words, whoever wrote the store and whatever the spacing."""
    data = make()
    asked = [*data.problems("val")[:2], *data.problems("test")[:1]]
    leaked = [replace(reference_trace(problem), problem=f" {problem.text} ") for problem in asked]
    path = write_jsonl(tmp_path / "traces.jsonl", [*leaked, *references(5)])
    mixed = make(store=str(path))
    assert [text_of(mixed, d).partition("=")[0] for d in mixed.documents("train")] == [t.problem for t in references(5)]
    assert mixed.summary()["dropped"]["train"] == {"held_out": 3}
    other = data.with_traces([*leaked, *references(4)], seed=1)
    assert len(other.documents("train")) == 4 and other.summary()["dropped"]["train"] == {"held_out": 3}
    with pytest.raises(DataError, match="none of 3 traces can be encoded as chain_then_answer: 3 held_out"):
        data.with_traces(leaked, seed=1).setup()


def test_released_traces_are_a_store_by_name(require_data: Callable[..., Path]) -> None:
    require_data("traces")
    options: dict[str, Any] = {
        "template": Alpaca(), "tokenizer": "bpe", "vocab_size": 300, "max_tokens": 4000, "num_train": 20, "num_val": 5,
        "num_test": 5,
    }  # fmt: skip
    every = TraceData(task=Svamp(), store="released:svamp_palm540b", **options)
    correct = TraceData(task=Svamp(), store="released:svamp_palm540b:correct", **options)
    assert len(every.traces()) == len(correct.traces()) == 20
    assert {trace.details["verdict"] for trace in correct.traces()} == {Verdict.CORRECT}
    assert {trace.details["verdict"] for trace in every.traces()} > {Verdict.CORRECT}
    correct.setup()
    dropped = correct.summary()["dropped"]["train"]
    assert dropped["wrong_answer"] > 20 and dropped.get("too_long", 0) == 0
    assert correct.with_traces(correct.traces(), seed=1).summary()["dropped"]["train"] == {}
    for store, told in (
        ("released:svamp_palm540b:right", "expected released:NAME or"),
        ("released:palm", "give one of"),
    ):
        with pytest.raises(ConfigError, match=told):
            TraceData(task=Svamp(), store=store, **options).setup()
    with pytest.raises(ConfigError, match="traces of svamp; the task is gsm8k"):
        TraceData(task=Gsm8k(), store="released:svamp_palm540b", **options).traces()


def test_a_task_without_chains_is_validated_on_the_release_s_own(require_data: Callable[..., Path]) -> None:
    """Real traces of held-out questions, one each; before, there was no document to measure a loss on."""
    require_data("traces")
    options: dict[str, Any] = {"template": Alpaca(), "tokenizer": "bpe", "vocab_size": 300, "max_tokens": 5000,
                               "num_train": 20, "num_val": 5, "num_test": 6}  # fmt: skip
    data = TraceData(task=Gsm8kR1(), store="released:gsm8k_r1distill:correct", **options)
    assert not any(problem.chain for problem in data.problems("test"))
    thoughts: dict[str, list[str]] = {}
    for row in Gsm8kR1().rows:
        thought = row["rationale"].partition("</think>")[0].strip().removeprefix("<think>").strip()
        thoughts.setdefault(row["question"].strip(), []).append(thought)
    for split, least in (("val", 4), ("test", 5)):
        for document in data.documents(split):
            question = data.problems(split)[document.index].text
            text = data.codec.tokenizer.decode(document.ids)
            assert question in text and any(thought in text for thought in thoughts[question])
        assert len(data.documents(split)) >= least
    asked = {" ".join(p.text.split()) for split in ("val", "test") for p in data.problems(split)}
    assert not asked & {" ".join(trace.problem.split()) for trace in data.traces()}, "split by question"
    own = TraceData(task=Svamp(), store="released:svamp_palm540b", **options)
    told = [own.codec.tokenizer.decode(document.ids) for document in own.documents("val")]
    assert all(problem.chain in text for problem, text in zip(own.problems("val"), told, strict=True)), (
        "chains of its own"
    )


def test_a_store_s_text_may_hold_what_the_characters_lack(tmp_path: Path) -> None:
    traces = references()
    traces[3] = replace(traces[3], chain="what?")
    data = make(store=str(write_jsonl(tmp_path / "traces.jsonl", traces)))
    assert len(data.documents("train")) == NUM_TRAIN - 1
    assert data.summary()["dropped"]["train"] == {"unknown_character": 1}


def test_a_byte_pair_tokenizer_is_trained_on_the_train_texts_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "traces.jsonl", references())
    one, same = (make(store=str(path), tokenizer="bpe", vocab_size=300) for _ in range(2))
    other = make(store=str(path), tokenizer="bpe", vocab_size=300, num_train=10)
    assert one.facts() == same.facts() and one.facts()["tokenizer_sha256"] != other.facts()["tokenizer_sha256"]
    assert text_of(one, one.documents("train")[0]) == text_of(make(), make().documents("train")[0])


def test_a_document_s_index_is_its_own_and_leads_to_the_trace_it_was_made_of(tmp_path: Path) -> None:
    """Three samples of each problem, one of them too long: the index of the problem would name three documents."""
    traces = [replace(trace, sample=sample) for trace in references(5) for sample in range(3)]
    traces[4] = replace(traces[4], chain="1" * 600)
    data = make(store=str(write_store(tmp_path / "store", traces)), num_train=None)
    indices = [document.index for document in data.documents("train")]
    assert indices == [number for number in range(15) if number != 4]
    found = [data.traces()[index] for index in indices]
    assert [(trace.index, trace.sample) for trace in found] == [divmod(index, 3) for index in indices]
    for document, trace in zip(data.documents("train"), found, strict=True):
        assert text_of(data, document) == f"{trace.problem}={trace.chain}#{trace.answer}"
    (batch,) = data.loader("train", batch_size=20)
    assert batch.index_D.tolist() == indices


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_file_of_answers_alone_trains_answer_only(suffix: str, tmp_path: Path) -> None:
    rows = [replace(trace, chain="") for trace in references()]
    path = write_jsonl(tmp_path / f"traces.{suffix}", rows)
    data = make(store=str(path), trace_format="answer_only")
    assert [text_of(data, document) for document in data.documents("train")] == [
        f"{t.problem}=#{t.answer}" for t in rows
    ]
    assert data.summary()["dropped"]["train"] == {}
    with pytest.raises(ConfigError, match=r"none of the 30 rows .*30 empty_chain"):
        make(store=str(path)).setup()


# -- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[dict[str, Any]]:
    """The stores "sums", of 24 traces of additions, and "rest", of 8 others."""
    written = references(32)
    return [
        {"store": str(write_store(tmp_path / "sums", written[:24]))},
        {"store": str(write_store(tmp_path / "rest", written[24:]))},
    ]


def mixed(parts: list[dict[str, Any]], *of: dict[str, Any], **changes: Any) -> TraceData:
    given = [{**part, **more} for part, more in zip(parts, of, strict=True)]
    return make(mixture=given, **{"num_train": None, **changes})


def test_a_mixture_by_count_trains_on_so_many_of_each_store(parts: list[dict[str, Any]]) -> None:
    data = mixed(parts, {"count": 10}, {"count": 6})
    problems = {trace.problem: store for store, few in (("sums", slice(24)), ("rest", slice(24, 32)))
                for trace in references(32)[few]}  # fmt: skip
    found = [problems[text_of(data, document).partition("=")[0]] for document in data.documents("train")]
    assert Counter(found) == {"sums": 10, "rest": 6} and found != sorted(found), "the stores interleave"
    told = data.summary()
    assert told["mixture"] == {"sums": {"traces": 10, "documents": 10}, "rest": {"traces": 6, "documents": 6}}
    assert told["rows"]["train"] == 16 and told["store"] is None
    assert "mixture" not in make().summary()


@pytest.mark.parametrize(
    ("weights", "num_train", "expected"), [((3, 1), None, (24, 8)), ((0.75, 0.25), 12, (9, 3)), ((1, 1), None, (8, 8))]
)
def test_a_mixture_by_weight_shares_num_train_out(
    weights: tuple[float, float], num_train: int | None, expected: tuple[int, int], parts: list[dict[str, Any]]
) -> None:
    data = mixed(parts, *({"weight": weight} for weight in weights), num_train=num_train)
    assert tuple(taken["traces"] for taken in data.summary()["mixture"].values()) == expected


def test_the_mixture_seed_alone_decides_which_traces_are_taken(parts: list[dict[str, Any]]) -> None:
    def served(**changes: Any) -> list[tuple[int, ...]]:
        return [document.ids for document in mixed(parts, {"count": 8}, {"count": 4}, **changes).documents("train")]

    assert served() == served(seed=4) == served(format_seed=1) != served(mixture_seed=1)
    assert {*served()} != {*served(mixture_seed=1)}


def test_what_a_mixture_loses_is_told_by_store(parts: list[dict[str, Any]]) -> None:
    """One trace of the second store is of a problem that the test split poses."""
    leaked = [reference_trace(make().problems("test")[0]), *references(32)[24:]]
    folder = Path(parts[1]["store"]).with_name("leaky")
    data = mixed([parts[0], {"store": str(write_store(folder, leaked))}], {"count": 4}, {"count": 9, "name": "web"})
    told = data.summary()
    assert told["mixture"] == {"sums": {"traces": 4, "documents": 4}, "web": {"traces": 9, "documents": 8}}
    assert told["dropped"]["train"] == {"held_out": 1}
    assert "mixture" not in data.with_traces(references(4), seed=1).summary()


@pytest.mark.parametrize(
    ("of", "changes", "told"),
    [
        (({"count": 10}, {"count": 9}), {}, "data.mixture: the mixture takes 9 traces of rest, which holds 8"),
        (({"weight": 1}, {"weight": 1}), {"num_train": 20}, "or write more (the total is data.num_train=20;"),
        (({"count": 10}, {"count": 8}), {"num_train": 17}, "takes 18 traces by count, and data.num_train is 17"),
        (({"weight": 1}, {"weight": -1}), {}, "data.mixture: mixture[1].weight is -1; expected a number above 0"),
        (({"weight": 1}, {"count": 1}), {}, "gives every store a count, or every store a weight"),
        (({"weight": 1}, {"wight": 1}), {}, "unknown key mixture[1].wight; nearest valid: weight"),
        (({"count": 1}, {"count": 1}), {"store": "elsewhere"}, "data.store is 'elsewhere' and data.mixture is set"),
    ],
)  # fmt: skip
def test_mixtures_that_cannot_be_are_refused(
    of: Any, changes: dict[str, Any], told: str, parts: list[dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError) as error:
        mixed(parts, *of, **changes).setup()
    assert told in str(error.value)


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture is empty; give \[\{store: FOLDER, weight: W\}, \.\.\]"):
        make(mixture=[])


# -- other traces, the same data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
def test_with_traces_shares_problems_and_codec(tokenizer: str) -> None:
    data = make(tokenizer=tokenizer, vocab_size=300, max_tokens=200)
    data.setup()
    before = data.documents("train")
    own = [replace(trace, chain=f"{trace.chain};{trace.answer}") for trace in references(9)]
    other = data.with_traces(own, seed=5)
    assert other.codec is data.codec and other.facts() == data.facts()
    assert other.documents("val") is data.documents("val") and other.problems("train") == data.problems("train")
    assert [text_of(other, d) for d in other.documents("train")] == [f"{t.problem}={t.chain}#{t.answer}" for t in own]
    assert other.fingerprint("train") != data.fingerprint("train")
    assert data.documents("train") is before and data.seed == 0
    orders = [data.with_traces(own, seed=seed).train_dataloader().order(0).tolist() for seed in (5, 5, 6)]
    assert orders[0] == orders[1] != orders[2]
    assert other.summary()["store"] is None and other.summary()["rows"]["train"] == 9


# -- loaders ----------------------------------------------------------------------------------------------------------


def test_loaders_serve_every_document_once() -> None:
    data = make(packed_to=72, prompt_loss_weight=0.5)
    train, val = data.train_dataloader(), data.val_dataloader()
    assert isinstance(val, TokenLoader)
    assert sorted(int(i) for batch in train for i in batch.index_D) == list(range(NUM_TRAIN))
    assert [int(i) for batch in val for i in batch.index_D] == list(range(NUM_VAL))
    (whole,) = data.loader("train", batch_size=NUM_TRAIN)
    assert whole.index_D.tolist() == list(range(NUM_TRAIN)) and whole.ids_BT.shape[0] == NUM_TRAIN
    documents = data.documents("train")
    weight = sum(len(d.ids) - d.prompt_length + 0.5 * (d.prompt_length - 1) for d in documents)
    assert whole.step_weight == pytest.approx(weight) == pytest.approx(float(whole.weight_BT.sum()))


@pytest.mark.parametrize("room", [2**28, 3000, 1])
def test_what_is_scored_has_room_for_all_its_logits(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document once and in order, 256 at most, as many as fit, and one where none would."""
    monkeypatch.setattr("research.data.traces.LOGITS_AT_ONCE", room)
    data = make(num_train=400)
    for split, loader in (("val", data.val_dataloader()), ("train", data.scoring_loader("train"))):
        batches, documents = list(loader), data.documents(split)  # type: ignore[arg-type]
        assert [int(index) for batch in batches for index in batch.index_D] == [one.index for one in documents]
        sizes = [len(batch) for batch in batches]
        longest = max(len(document.ids) for document in documents)
        fit = min(256, max(1, room // (longest * data.codec.vocab_size)))
        assert sizes == [fit] * (len(documents) // fit) + [len(documents) % fit] * (len(documents) % fit > 0)
        assert all(batch.ids_BT.numel() * data.codec.vocab_size <= max(room, longest * 64) for batch in batches)


def test_without_validation_problems_there_is_no_validation() -> None:
    data = make(num_val=0)
    assert not data.has_val and data.val_dataloader() == [] and data.problems("val") == []
    assert make().has_val and make().num_validation == NUM_VAL


class Killed(Exception):
    """The kill."""


class Noting(L.LightningModule):
    """One parameter, and the indices of every micro-batch it saw; killed in the one after ``kill_after``, if at all."""

    def __init__(self, kill_after: int | None = None) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.kill_after = kill_after
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        if len(self.seen) == self.kill_after:
            raise Killed
        self.seen.append(tuple(batch.index_D.tolist()))
        return (self.bias - float(batch.ids_BT.sum())) ** 2 / batch.step_weight

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rewind_to_last_step(checkpoint, self.trainer.accumulate_grad_batches)


class SaveWhenKilled(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def noted(accumulate: int, kill_after: int | None = None, saved: Path | None = None) -> Noting:
    """Two epochs of 30 documents in steps of 8, packed and grouped by length; saved, or gone on with from ``saved``."""
    module = Noting(kill_after)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, accumulate_grad_batches=accumulate,
        callbacks=[SaveWhenKilled(saved)] if kill_after and saved else [], **quiet,
    )  # fmt: skip
    data = make(packed_to=96, length_grouping=2, seed=3)
    with pytest.raises(Killed) if kill_after else nullcontext():
        trainer.fit(module, datamodule=data, ckpt_path=None if kill_after else saved, weights_only=True)
    assert kill_after or trainer.global_step == 2 * 4
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("accumulate", "killed"), [(1, 3), (1, 4), (2, 5)])
def test_p82_a_resumed_epoch_goes_on_with_the_documents_that_are_left(
    accumulate: int, killed: int, tmp_path: Path
) -> None:
    """The batch that was handed out and never trained on comes again, and with it the whole step it was a part of."""
    path, whole = tmp_path / "saved.ckpt", noted(accumulate)
    assert noted(accumulate, killed, path).seen == whole.seen[:killed]
    resumed = noted(accumulate, saved=path)
    assert resumed.seen == whole.seen[killed - killed % accumulate :] and torch.equal(resumed.bias, whole.bias)
    per_epoch = len(whole.seen) // 2
    for epoch in (whole.seen[:per_epoch], whole.seen[per_epoch:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(NUM_TRAIN))
    assert whole.seen[:per_epoch] != whole.seen[per_epoch:]


# -- identity ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_what_is_served_and_of_nothing_else() -> None:
    base = make().fingerprint("train")
    for same in ({"seed": 3}, {"batch_size": 4}, {"packed_to": 200}, {"length_grouping": 2}, {"num_test": 1}):
        assert make(**same).fingerprint("train") == base, same
    changes: list[dict[str, Any]] = [
        {"trace_format": "answer_only"}, {"trace_format": "shuffled_chain"}, {"prompt_loss_weight": 0.1},
        {"problem_seed": 1}, {"num_train": 29}, {"max_tokens": 40}, {"tokenizer": "bpe", "vocab_size": 300},
    ]  # fmt: skip
    found = [make(**change).fingerprint("train") for change in changes]
    assert len({base, *found}) == len(changes) + 1
    assert make().fingerprint("val") == make(num_train=3).fingerprint("val") != base


def test_facts_are_those_of_the_tokenizer() -> None:
    data = make(ChainedSums())
    facts, ids = data.facts(), data.codec.tokenizer.get_vocab()
    assert (facts["vocab_size"], facts["eos_token_id"], facts["pad_token_id"]) == (len(ids), ids["<eos>"], ids["<pad>"])
    assert set(ids) == {"<pad>", "<eos>", *"0123456789+-;=#:."}


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_train": 0}, "data.num_train is 0; expected at least 1, or null"),
        ({"num_val": -1}, "data.num_val is -1"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"max_tokens": 1}, "data.max_tokens is 1"),
        ({"trace_format": "chain"}, "data.trace_format is 'chain'; expected one of chain_then_answer"),
    ],
)
def test_options_that_fit_no_data_are_refused_at_once(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**change)
    assert told in str(error.value)


class Riddles(AbstractTask):
    """Open text without chains."""

    name = "riddles"

    def problems(self, split: Split, num: int | None = None, seed: int = 0) -> list[Problem]:
        return [Problem(n, f"What is {n} and {n}, for {split}?", str(2 * n)) for n in range(100)][:num]

    def verify(self, problem: Problem, answer: str | None) -> Verdict:
        return Verdict.CORRECT if answer == problem.answer else Verdict.WRONG


def test_characters_do_not_write_open_text() -> None:
    data = TraceData(task=Riddles(), template=Alpaca(), tokenizer="characters")
    with pytest.raises(ConfigError, match=r"data\.tokenizer is characters, but riddles has open text; give bpe or"):
        data.facts()


def test_nothing_left_to_train_on_is_an_error_that_tells_the_counts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 30 traces can be encoded as chain_then_answer: 30 too_long"):
        make(max_tokens=5).setup()
    data = TraceData(task=Riddles(), template=Alpaca(), tokenizer="bpe", vocab_size=300, num_train=12)
    with pytest.raises(DataError, match="none of 12 traces can be encoded as chain_then_answer: 12 empty_chain"):
        data.setup()
    traces = [replace(t, chain="" if t.index % 2 else "x" * 600) for t in references()]
    with pytest.raises(DataError, match=r"none of 30 traces .*: 15 (empty_chain|unknown_character), 15 "):
        make(store=str(write_store(tmp_path / "store", traces)), num_train=None).setup()


def test_a_store_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for path, told in ((tmp_path / "none.txt", "no folder of a trace store"), (tmp_path / "empty.jsonl", "is empty")):
        with pytest.raises(ConfigError, match=told):
            make(store=str(path)).setup()


def test_a_cut_prompt_keeps_its_end_in_training_and_when_it_is_posed() -> None:
    """The end of the problem and what the template writes behind it; completions are whole."""
    options = {"task": Addition(min_digits=4, max_digits=4), "num_prompts": 4}
    whole, cut = make(**options), make(**options, max_prompt_tokens=6)
    for row, short in zip(whole.prompts(), cut.prompts(), strict=True):
        assert len(row.ids) == 10 and short.ids == row.ids[-6:]
    whole, cut = make(task=options["task"]), make(task=options["task"], max_prompt_tokens=6)
    for document, short in zip(whole.documents("train"), cut.documents("train"), strict=True):
        assert short.prompt_length == 6 and short.ids == document.ids[4:]
    with pytest.raises(ValueError, match="max_prompt_tokens=1: give at least 2"):
        make(max_prompt_tokens=1).documents("train")


def test_a_further_token_may_end_what_is_written() -> None:
    assert make(extra_eos=["7"]).codec.eos_ids == (*make().codec.eos_ids, make().codec.tokenizer.get_vocab()["7"])


REASONS: list[tuple[Trace, dict[str, Any], str]] = [
    (
        Trace("1+1", "1+1=2", "2", 0),
        {},
        "unreadable: the texts hold marks of the template Plain (= #); give template=th",
    ),
    (Trace("1+1", "2", "2", 0), {"max_tokens": 5}, "too_long: raise data.max_tokens, now 5"),
    (Trace("1+1", "", "2", 0), {}, "empty_chain: give data.trace_format=answer_only"),
    (Trace("1+1", "", "2", 0), {"modes": "two"}, "empty_chain: data.modes=two needs a chain in each"),
    (Trace("1+1", "2", " ", 0), {}, "missing_answer: give traces with an answer each"),
    (Trace("x+1", "2", "2", 0), {}, "unknown_character: data.tokenizer has no token for a part of the texts; give bpe"),
    (Trace("1+1", "2<eos>", "2", 0), {}, "control_token: the texts spell a special token of the tokenizer; remove it"),
]


@pytest.mark.parametrize(("trace", "changes", "told"), REASONS, ids=[told.partition(":")[0] for _, _, told in REASONS])
def test_what_left_nothing_to_train_on_says_what_to_do(trace: Trace, changes: dict[str, Any], told: str) -> None:
    data = make(**changes).with_traces([trace], seed=0)
    reason = told.partition(":")[0]
    with pytest.raises(DataError) as refused:
        data.setup()
    assert str(refused.value).startswith(f"none of 1 traces can be encoded as chain_then_answer: 1 {reason}. {told}")


def test_rows_of_a_file_that_are_no_traces_are_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "traces.jsonl", [replace(references(1)[0], chain="1=2")])
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(
        DataError, match=r"1 unreadable, 1 quarantine_no_problem\. unreadable: .*in quarantine\.jsonl of"
    ):
        make(store=str(path)).setup()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_of_too_few_problems_names_its_key(split: Split) -> None:
    data = make(ChainedSums(num_terms=2, highest=1), **{f"num_{split}": 10_000})
    with pytest.raises(ConfigError, match=rf"data\.num_{split} is 10000, and of .* the split '{split}' holds only"):
        data.problems(split)
