"""What every task promises: gold answers right, nothing else right, splits and seeds apart, the same everywhere."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from research.arguments import accepted_types, check_names, check_types, locate_target
from research.records import Problem, Verdict
from research.tasks.base import AbstractTask
from research.tasks.drawing import SPLITS

CONF = Path(__file__).parents[2] / "conf" / "task"
TARGETS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*.yaml")) if path.stem != "none"}
FILES = {"gsm8k": "gsm8k", "gsm8k_r1": "traces", "svamp": "traces", "commonsense_qa": "traces"}
OWN_FOLDER = tempfile.TemporaryDirectory()  # a file as a user brings it; gone with this process
OWN_FILE = Path(OWN_FOLDER.name) / "mine.jsonl"
OWN_FILE.write_text(
    "".join(
        json.dumps({"problem": f"Add {a} and {b}{x}.", "answer": f"{b}{x}+{a}" if x else str(a + b)}) + "\n"
        for a in range(21, 41)
        for b in range(31, 51)
        for x in ("", "x")
    )
)
VARIANTS: dict[str, dict[str, Any]] = {
    "free_form": TARGETS["free_form"] | {"path": str(OWN_FILE), "timeout_s": 20.0},
    "sum5_verbose": TARGETS["sum5"] | {"verbose": True},
    "sum3_to_9": TARGETS["sum5"] | {"num_terms": 3, "highest": 9},
    "addition_terse": TARGETS["addition"] | {"verbose": False},
    "gsm8k_marks": TARGETS["gsm8k"] | {"keep_marks": True},
    "svamp_no_chain": TARGETS["svamp"] | {"chain": "none"},
}
NODES = TARGETS | VARIANTS
WIDE = {  # problems so many that two seeds need share none
    "sum5": TARGETS["sum5"],
    "addition": TARGETS["addition"] | {"min_digits": 5},
    "reasoning_gym": TARGETS["reasoning_gym"] | {"options": {"min_terms": 4, "min_digits": 3}},
}
FIRST_SUMS = ["00+49-34+55+11", "81+13-50-22-01"]
FIRST_ADDITIONS = ["89+19", "94+28"]
GENERATED = [name for name in NODES if name not in (*FILES, "gsm8k_marks", "svamp_no_chain", "free_form")]
NUM = 60


def built(node: dict[str, Any]) -> AbstractTask:
    options = {name: value for name, value in node.items() if name != "_target_"}
    return locate_target(node["_target_"], "task", ("research.tasks.",))(**options)


@pytest.fixture(scope="module", params=NODES)
def name(request: pytest.FixtureRequest, require_data: Callable[..., Path]) -> str:
    for key, folder in FILES.items():
        if request.param.startswith(key):
            require_data(folder)
    if request.param.startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym")
    if request.param == "free_form":
        pytest.importorskip("math_verify")
    return request.param


@pytest.fixture(scope="module")
def task(name: str) -> AbstractTask:
    return built(NODES[name])


@pytest.fixture(scope="module")
def some(task: AbstractTask) -> list[Problem]:
    return [problem for split in SPLITS for problem in task.problems(split, 20)]


@pytest.mark.parametrize("name", TARGETS)
def test_every_config_gives_every_option_of_its_task(name: str) -> None:
    node = TARGETS[name]
    called = locate_target(node["_target_"], "task", ("research.tasks.",))
    options = {key: value for key, value in node.items() if key != "_target_"}
    check_names(called, node["_target_"], "task", options)
    check_types(called, "task", options)
    assert set(options) == set(accepted_types(called) or {})


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_p77_the_gold_answer_is_correct(task: AbstractTask, some: list[Problem]) -> None:
    assert all(problem.answer and task.verify(problem, problem.answer) is Verdict.CORRECT for problem in some)


def test_p70_what_contains_the_answer_or_is_cut_off_is_not_correct(task: AbstractTask, some: list[Problem]) -> None:
    for problem in some:
        gold = problem.answer
        others = [
            f"{gold}0",
            f"1{gold}",
            f"{gold} or 7",
            f"not {gold}",
            gold[:-1],
            gold[1:],
            f"{gold}{gold}",
            "x" + gold,
        ]
        if gold.lstrip("-").isdigit():
            others += [str(int(gold) + 1), str(int(gold) - 1)]
        for other in others:
            same = other.isdigit() and int(other) == int(gold) and gold == str(int(gold))  # 017 is 17; not for 07
            assert same or task.verify(problem, other) is not Verdict.CORRECT, (problem, other)


@pytest.mark.parametrize("answer", [None, "", "   ", "??", "\x00", "x" * 100_000, "9" * 50_000, "(" * 5_000])
def test_p70_no_answer_is_never_correct_and_never_raises(
    task: AbstractTask, some: list[Problem], answer: str | None
) -> None:
    assert all(task.verify(problem, answer) is not Verdict.CORRECT for problem in some[:5])
    if answer is None or not answer.strip():
        assert all(task.verify(problem, answer) is Verdict.UNPARSED for problem in some)


def test_p73_text_never_becomes_code(task: AbstractTask, some: list[Problem], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for hostile in (f"__import__('pathlib').Path({str(proof)!r}).touch()", f"[open({str(proof)!r},'w')]", "9**9**9**9"):
        for problem in some[::10]:
            assert task.verify(problem, hostile) in (Verdict.UNPARSED, Verdict.WRONG)
            task.verify_steps(problem, hostile)
    assert not proof.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=60) | st.text(alphabet="0123456789+-*/()=;>., $%<#xis\n", max_size=60))
def test_no_text_makes_a_verifier_raise(task: AbstractTask, some: list[Problem], text: str) -> None:
    for problem in (some[0], some[25]):
        verdict = task.verify(problem, text)
        assert verdict is not Verdict.TRUNCATED and isinstance(verdict, Verdict)
        report = task.verify_steps(problem, text)
        assert (report is None) == (not task.checks_steps)
        if report is not None:
            assert 0 <= report.num_valid <= report.num_steps
            assert (report.first_wrong is None) == (report.num_valid == report.num_steps)


def test_p66_an_unreadable_gold_answer_is_never_correct(task: AbstractTask, some: list[Problem]) -> None:
    for gold in ("", "   "):
        broken = Problem(0, some[0].text, gold, details=some[0].details)
        for answer in (gold, some[0].answer, "0"):
            assert task.verify(broken, answer) is Verdict.UNPARSED


# -- chains -----------------------------------------------------------------------------------------------------------


def test_the_gold_chain_is_valid_and_leads_to_the_answer(name: str, task: AbstractTask, some: list[Problem]) -> None:
    """Exactly, where chains are generated. People leave steps in words, so that theirs are valid where checkable."""
    chains = [problem for problem in some if problem.chain and task.checks_steps]
    reports = [task.verify_steps(problem, problem.chain) for problem in chains]
    checked = [
        (problem, report) for problem, report in zip(chains, reports, strict=True) if report and report.num_steps
    ]
    assert len(checked) >= (len(chains) if name in GENERATED else 0.9 * len(chains))
    for problem, report in checked:
        assert report.valid, (problem, report)
    ends = [task.verify(problem, report.result) is Verdict.CORRECT for problem, report in checked]
    assert sum(ends) >= (len(ends) if name in GENERATED else 0.9 * len(ends))


def test_its_alphabet_covers_everything_it_writes(task: AbstractTask, some: list[Problem]) -> None:
    if task.alphabet is None:
        return
    assert not set(task.alphabet) & set("=#:"), "the plain template keeps these"
    for problem in some:
        assert set(problem.text + problem.chain + problem.answer) <= set(task.alphabet)


# -- splits and seeds -------------------------------------------------------------------------------------------------


def test_no_problem_stands_in_two_splits(name: str, task: AbstractTask) -> None:
    drawn = {
        split: {
            problem.text
            for seed in (0, 1, 7)
            for problem in task.problems(split, NUM if name in GENERATED else None, seed)
        }
        for split in SPLITS
    }
    assert all(drawn.values())
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not drawn[one] & drawn[other]


def test_indices_rise_from_0_nothing_repeats_and_fewer_are_a_prefix(task: AbstractTask) -> None:
    for split in SPLITS:
        problems = task.problems(split, NUM)
        assert [problem.index for problem in problems] == list(range(NUM))
        assert len({problem.text for problem in problems}) == NUM
        assert task.problems(split, 7) == problems[:7] and task.problems(split, 0) == []


@pytest.mark.parametrize("name", ["sum5", "addition", "reasoning_gym"])
def test_p74_neighbouring_seeds_share_nothing(name: str) -> None:
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    task = built(WIDE[name])
    lists = [{problem.text for problem in task.problems("train", 500, seed)} for seed in (42, 43)]
    assert len(lists[0]) == len(lists[1]) == 500 and len(lists[0] & lists[1]) == 0


@pytest.mark.parametrize("name", ["sum5", "reasoning_gym"])
def test_p75_a_long_list_repeats_nothing(name: str) -> None:
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    assert len({problem.text for problem in built(NODES[name]).problems("train", 5000)}) == 5000


def test_what_cannot_be_drawn_is_refused(name: str, task: AbstractTask) -> None:
    with pytest.raises(ValueError, match="give one of train, val, test"):
        task.problems("dev", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num=-1"):
        task.problems("test", -1)
    if name in GENERATED:
        with pytest.raises(ValueError, match="num=None"):
            task.problems("test")
    else:
        with pytest.raises(ValueError, match=r"num=100000: split 'test' holds only [0-9]+ problems"):
            task.problems("test", 100_000)
        assert task.problems("train", seed=1) == task.problems("train", seed=2), "files ignore the seed"


PROGRAM = """
import sys, json
sys.path.insert(0, sys.argv[1])
import test_task_contract as contract
for name in json.loads(sys.argv[2]):
    print(name, contract.digest(contract.built(contract.NODES[name])))
"""


def digest(task: AbstractTask) -> str:
    told = [(p.index, p.text, p.answer, p.chain, p.level) for split in SPLITS for p in task.problems(split, 10, 3)]
    return hashlib.blake2b(json.dumps(told).encode()).hexdigest()


def test_p76_another_process_with_another_hash_seed_draws_the_same(require_data: Callable[..., Path]) -> None:
    """Against this process, whose hash seed is drawn afresh in every run of the tests."""
    require_data("gsm8k"), require_data("traces")
    pytest.importorskip("reasoning_gym"), pytest.importorskip("math_verify")
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), json.dumps(list(NODES))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} {digest(built(NODES[name]))}" for name in NODES]


def test_the_draws_are_these_and_no_version_may_move_them() -> None:
    """A model trained on one version is tested on another: the first problems of seed 0 never change."""
    assert [problem.text for problem in built(TARGETS["sum5"]).problems("train", 2)] == FIRST_SUMS
    assert [problem.text for problem in built(TARGETS["addition"]).problems("test", 2)] == FIRST_ADDITIONS
