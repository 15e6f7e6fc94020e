"""Problem sets on disk: where they are looked for, what damage is called, how splits are made."""

import gzip
import sys
from pathlib import Path

import pytest

from research.errors import ConfigError
from research.records import Problem
from research.tasks.base import TooFewProblems
from research.tasks.commonsense import CommonsenseQa
from research.tasks.drawing import split_of
from research.tasks.files import read_rows, split_by_text, with_hold_out
from research.tasks.word_problems import Gsm8k, Gsm8kR1, Svamp


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_damage_names_the_file_and_the_line(tmp_path: Path) -> None:
    good = '{"question": "q", "answer": "1"}\n'
    with pytest.raises(ConfigError, match=r"line 2: .*expected one JSON object"):
        read_rows(written(tmp_path / "a.gz", good + '{"question": '), ("question",))
    with pytest.raises(ConfigError, match=r"line 2 lacks answer"):
        read_rows(written(tmp_path / "b.gz", good + '{"question": "q"}'), ("question", "answer"))
    with pytest.raises(ConfigError, match=r"line 1 lacks question"):
        read_rows(written(tmp_path / "c.gz", "[1, 2]"), ("question",))
    (tmp_path / "d.gz").write_bytes(gzip.compress(good.encode())[:-12])
    with pytest.raises(ConfigError, match="is damaged"):
        read_rows(tmp_path / "d.gz", ("question",))
    with pytest.raises(ConfigError, match=r"nowhere\.gz is missing: .*task\.data_dir"):
        read_rows(tmp_path / "nowhere.gz", ("question",))


@pytest.mark.parametrize("task", [Gsm8k, Svamp, CommonsenseQa, Gsm8kR1])
def test_without_files_and_hub_the_extra_is_named(task: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESEARCH_DATA_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    expected = "on no hub" if task is Gsm8kR1 else r"pip install 'research-distillation\[hub\]'"
    with pytest.raises(ConfigError, match=f"RESEARCH_DATA_DIR are not set.*{expected}"):
        task().problems("test", 1)


def test_the_argument_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, number in (("argument", 1), ("environment", 2)):
        for split in ("train", "test"):
            row = f'{{"question": "{folder} {split}?", "answer": "so <<1+1=2>>2\\n#### {number},000"}}\n'
            written(tmp_path / folder / f"gsm8k/{split}.jsonl.gz", row)
    monkeypatch.setenv("RESEARCH_DATA_DIR", str(tmp_path / "environment"))
    assert Gsm8k(tmp_path / "argument").problems("test")[0] == Problem(0, "argument test?", "1000", "so 2", 1)
    assert Gsm8k().problems("test")[0].answer == "2000"
    assert Gsm8k(keep_marks=True).problems("test")[0].chain == "so <<1+1=2>>2"


def test_repeated_texts_are_left_out_and_counted() -> None:
    texts = [f"question {number}" for number in range(200)]
    train = [Problem(0, text, "1") for text in [*texts, texts[0], "seen in test"]]
    held = with_hold_out(train, [Problem(0, "seen in test", "1")])
    assert sum(held.dropped.values()) == 2 and held.dropped["repeated in test"] == 1
    assert {problem.text for problem in held.problems["val"]} == {text for text in texts if split_of(text) == "val"}
    assert len(held.problems["train"]) + len(held.problems["val"]) == 200
    split = split_by_text(train)
    assert [len(split.problems[name]) for name in ("train", "val", "test")] == [
        sum(split_of(text) == name for text in [*texts, "seen in test"]) for name in ("train", "val", "test")
    ]
    assert sum(split.dropped.values()) == 1


def test_a_split_that_holds_too_few_says_what_was_left_out() -> None:
    problems = [Problem(0, f"question {number % 100}", "1") for number in range(103)]
    official = split_by_text(problems)
    held = len(official.problems["val"])
    reasons = ", ".join(f"{count} {reason}" for reason, count in official.dropped.items())
    with pytest.raises(TooFewProblems) as told:
        official.first("mine", "val", 50)
    assert str(told.value) == f"mine: num=50: {told.value.held}"
    assert told.value.held == (
        f"split 'val' holds only {held} problems (of all splits, rows left out: {reasons}); null takes all"
    )
    with pytest.raises(TooFewProblems, match=r"holds only \d+ problems; null takes all"):
        split_by_text(problems[:100]).first("mine", "val", 50)
