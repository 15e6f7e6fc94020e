"""reasoning-gym: what is refused, how strictly it is graded, which of its scorers would run text as code."""

import re
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from research.errors import ConfigError
from research.records import Problem, Verdict
from research.tasks import reasoning_gym as module
from research.tasks.drawing import SPLITS
from research.tasks.reasoning_gym import DATA_ONLY, REFUSED, ReasoningGym

package = pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("dataset", sorted(REFUSED))
def test_p76_p77_what_cannot_be_trusted_is_refused_with_the_reason(dataset: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[dataset])):
        ReasoningGym(dataset)


def test_p77_everything_without_a_reference_answer_is_refused() -> None:
    """Asked of the package itself, where drawing one problem is cheap."""
    for dataset in ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"):
        assert package.create_dataset(dataset, seed=1, size=1)[0]["answer"] is None and dataset in REFUSED


def test_p78_the_version_is_that_of_the_distribution() -> None:
    assert ReasoningGym().version == version("reasoning-gym")


def test_p73_every_scorer_that_runs_text_is_known() -> None:
    """Read from the installed source: a new release with another such scorer fails here."""
    found = set()
    evaluates = re.compile(r"(?<![\w.])(?:eval|exec|parse_expr|sympify)\(|(?:sp|sympy)\.(?:parse_expr|sympify)\(")
    for path in Path(package.__file__).parent.rglob("*.py"):
        source = path.read_text()
        scorer = source.partition("def score_answer")[2].partition("\n    def ")[0]
        if evaluates.search(scorer.replace('eval(entry["answer"])', "")):
            found.add(path.stem)
    assert found <= set(DATA_ONLY) | set(REFUSED) | {"propositional_logic"}, found
    assert {"countdown", "string_insertion", "simple_integration"} <= found


@pytest.mark.parametrize("dataset", sorted(DATA_ONLY))
def test_p73_hostile_answers_reach_no_scorer(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, proof = ReasoningGym(dataset), tmp_path / "proof"
    item = package.create_dataset(dataset, seed=3, size=1)[0]
    problem = Problem(0, item["question"], item["answer"], details={"metadata": item["metadata"]})
    assert task.verify(problem, problem.answer) is Verdict.CORRECT
    asked: list[str] = []
    scorer = task._scorer.score_answer
    monkeypatch.setattr(task._scorer, "score_answer", lambda text, entry: asked.append(text) or scorer(text, entry))
    for hostile in (f"__import__('pathlib').Path({str(proof)!r}).touch()", "9**9**9**9", "[open]", "exit()"):
        assert task.verify(problem, hostile) is Verdict.UNPARSED
    assert not proof.exists() and asked == []
    assert task.counts == {"refused: no plain data": 4}


def test_p70_containment_earns_nothing_although_the_package_pays_for_it() -> None:
    task = ReasoningGym("letter_counting")
    problem = Problem(0, "How many?", "8", details={"metadata": {}})
    entry = {"question": "", "answer": "8", "metadata": {}}
    assert task._scorer.score_answer("18", entry) == 0.5, "the fault this guards against"
    told = {text: task.verify(problem, text) for text in ("8", " 8 ", "18", "the answer is 8", "9", "", "8 8")}
    assert [text for text, verdict in told.items() if verdict is Verdict.CORRECT] == ["8", " 8 "]


@pytest.mark.parametrize(
    ("dataset", "spoil"),
    [
        ("knights_knaves", "not {}"),
        ("gsm_symbolic", "the answer is not {}"),
        ("survo", "not {}"),
        ("game_of_life_halting", "xqzt"),
        ("sokoban", "xqzt{}"),
        ("kakurasu", "the answer is {}"),
    ],
)
def test_p70_scorers_that_believe_anything_are_not_believed(dataset: str, spoil: str) -> None:
    task = ReasoningGym(dataset)
    items = package.create_dataset(dataset, seed=1, size=6)
    lenient = 0
    for number in range(6):
        item = items[number]
        problem = Problem(0, item["question"], item["answer"], details={"metadata": item["metadata"]})
        spoilt = spoil.format(item["answer"])
        lenient += task._scorer.score_answer(spoilt, item) == 1.0
        assert task.verify(problem, spoilt) is not Verdict.CORRECT
        assert task.verify(problem, item["answer"]) is Verdict.CORRECT
    assert lenient > 0, "the package's own scorer gives full marks"


def test_another_solution_is_correct_where_the_scorer_works_it_out() -> None:
    task = ReasoningGym("countdown")
    metadata = {"numbers": [2, 3, 10], "target": 16, "expression": "2*3 + 10"}
    problem = Problem(0, "Make 16.", "2*3 + 10", details={"metadata": metadata})
    told = [task.verify(problem, text) for text in ("2*3 + 10", "10 + 3*2", "(2*3 + 10)", "2*3", "2*3 + 10 + 0", "16")]
    assert told == [Verdict.CORRECT] * 3 + [Verdict.WRONG] * 3


def drawn(dataset: str, size: int = 4) -> list[Problem]:
    items = package.create_dataset(dataset, seed=11, size=size)
    return [
        Problem(0, items[n]["question"], items[n]["answer"], details={"metadata": items[n]["metadata"]})
        for n in range(size)
    ]


def test_a_sum_needs_the_numbers_of_its_own_puzzle_and_exactly_its_value() -> None:
    """The package's scorer looks at neither: any four numbers in range will do, and 24.5 is cut to 24."""
    task = ReasoningGym("puzzle24")
    problem = Problem(0, "Make 24.", "10 + 3 + 4 + 7", details={"metadata": {"numbers": [10, 3, 4, 7]}})
    for foreign in ("2 + 9 + 6 + 7", "6*4*1*1"):
        assert task._scorer.score_answer(foreign, {"metadata": {}}) == 1.0
        assert task.verify(problem, foreign) is Verdict.WRONG
    told = {text: task.verify(problem, text).value for text in ("7+4+3+10", "(10 + 4 - 7) * 3", "10*(7 - 4) - 3")}
    assert told == {"7+4+3+10": "correct", "(10 + 4 - 7) * 3": "wrong", "10*(7 - 4) - 3": "wrong"}
    halves = Problem(0, "Make 24.", "", details={"metadata": {"numbers": [7, 7, 2, 1]}})
    assert task._scorer.score_answer("7*7*1/2", {"metadata": {}}) == 1.0, "24.5"
    assert module._worked_out(halves.details["metadata"], "7*7*1/2") is Verdict.WRONG


def test_a_unit_that_is_asked_for_must_not_be_another() -> None:
    task = ReasoningGym("time_intervals")
    problem = Problem(0, "How many days?", "99 days", details={"metadata": {"task_type": "date"}})
    told = {text: task.verify(problem, text).value for text in ("99", "99 day", "99 Days.", "99 hours", "98 days")}
    assert list(told.values()) == ["correct", "correct", "correct", "wrong", "wrong"], told


@pytest.mark.parametrize(
    ("dataset", "spoil"),
    [
        ("number_sorting", lambda gold: re.sub(r"\.[0-9]+", lambda found: f"{found[0]}001", gold, count=1)),
        ("number_sorting", lambda gold: re.sub(r"[0-9](?='\])", lambda found: f"{(int(found[0]) + 1) % 10}", gold)),
        ("pool_matrix", lambda gold: re.sub(r"\.[0-9]+", lambda found: f"{found[0]}001", gold, count=1)),
        ("advanced_geometry", lambda gold: re.sub(r"\.[0-9]+", lambda found: f"{found[0]}001", gold, count=1)),
        ("complex_arithmetic", lambda gold: "nan"),
        ("complex_arithmetic", lambda gold: "nan + nani"),
    ],
)
def test_what_is_nearly_right_earns_nothing_where_the_package_pays_for_it(dataset: str, spoil: Any) -> None:
    task, paid = ReasoningGym(dataset), 0
    for problem in drawn(dataset, 12):
        spoilt = spoil(problem.answer)
        entry = {"question": problem.text, "answer": problem.answer, "metadata": problem.details["metadata"]}
        if spoilt != problem.answer:
            paid += task._scorer.score_answer(spoilt, entry) == 1.0
            assert task.verify(problem, spoilt) is Verdict.WRONG
        assert task.verify(problem, problem.answer) is Verdict.CORRECT
    assert paid > 0, "the package's own scorer gives full marks"


@pytest.mark.parametrize(
    ("dataset", "again"),
    [
        ("complex_arithmetic", lambda gold: gold.replace(" ", "")),
        ("number_sorting", lambda gold: gold.replace(", ", ",")),
        ("group_anagrams", lambda gold: gold.replace(" ", "")),
        ("prime_factorization", lambda gold: " \u00d7 ".join(reversed(gold.split(" \u00d7 ")))),
        ("cryptarithm", lambda gold: ",".join(reversed(gold.split(",")))),
        ("power_function", lambda gold: f"{float(gold):.2e}"),
    ],
)
def test_the_same_answer_in_another_form_is_right(dataset: str, again: Any) -> None:
    task = ReasoningGym(dataset)
    held = [task.verify(problem, again(problem.answer)).value for problem in drawn(dataset, 6)]
    assert "correct" in held and (dataset == "power_function" or set(held) == {"correct"}), held


def test_partial_credit_earns_nothing() -> None:
    task = ReasoningGym("mini_sudoku")
    item = package.create_dataset("mini_sudoku", seed=1, size=1)[0]
    problem = Problem(0, item["question"], item["answer"], details={"metadata": item["metadata"]})
    spoilt = item["answer"][:-1] + ("1" if item["answer"][-1] != "1" else "2")
    assert task._scorer.score_answer(spoilt, item) > 0.8
    assert task.verify(problem, spoilt) is Verdict.WRONG


def test_numbers_are_compared_without_tolerance() -> None:
    task = ReasoningGym("decimal_arithmetic")
    item = {"question": "q", "answer": "3.14159", "metadata": {"decimal_places": 6, "num_terms": 2}}
    problem = Problem(0, "q", "3.14159", details={"metadata": item["metadata"]})
    assert task.verify(problem, "3.141590") is Verdict.CORRECT
    assert task.verify(problem, "3.1416") is Verdict.WRONG


@pytest.mark.parametrize(
    ("dataset", "gold", "metadata", "answer", "verdict"),
    [
        ("dice", "1/60", {}, "2/120", "wrong"),
        ("dice", "1/60", {}, "1/60", "correct"),
        ("dice", "1/60", {}, "1 / 60", "correct"),
        ("dice", "1/60", {}, "\\boxed{\\frac{1}{60}}", "correct"),
        ("dice", "1/60", {}, "1/61", "wrong"),
        ("basic_arithmetic", "9", {}, "18/2", "wrong"),
        ("basic_arithmetic", "9", {}, "3*3", "wrong"),
        ("basic_arithmetic", "9", {}, "9.0", "correct"),
        ("basic_arithmetic", "9", {}, "The answer is \\boxed{9}.", "correct"),
        ("basic_arithmetic", "9", {}, "\\boxed{18/2}", "wrong"),
        ("basic_arithmetic", "9", {}, "\\boxed{9} or \\boxed{8}", "wrong"),
        ("basic_arithmetic", "9", {}, "9 \\boxed{}", "unparsed"),
        ("basic_arithmetic", "9", {}, "\\boxed{9", "unparsed"),
        ("simple_equations", "9", {}, "x = 9", "correct"),
        ("simple_equations", "9", {}, "x = 19", "wrong"),
        ("coin_flip", "0.5", {}, "1/2", "correct"),  # its scorer reads fractions
        ("coin_flip", "0.5", {}, "0.50001", "wrong"),
    ],
)
def test_a_fraction_needs_the_scorer_too(dataset: str, gold: str, metadata: Any, answer: str, verdict: str) -> None:
    assert ReasoningGym(dataset).verify(Problem(0, "q", gold, details={"metadata": metadata}), answer) == verdict


@pytest.mark.parametrize("style", ["plain", "latex_inline", "latex_frac", "latex_dfrac"])
def test_a_fraction_that_was_to_be_reduced_earns_nothing_unreduced(style: str) -> None:
    """The answer copied out of the question, against the fractions that Python reduces."""
    task = ReasoningGym("fraction_simplification", {"styles": [style], "min_factor": 2})
    for problem in task.problems("train", 20):
        copied = problem.text.partition("fraction ")[2].partition(" to")[0]
        above, below = (int(part) for part in re.findall("[0-9]+", copied))
        reduced = Fraction(above, below)
        assert task._scorer._extract_fraction(copied) == (above, below) != (reduced.numerator, reduced.denominator)
        assert task.verify(problem, copied) is Verdict.WRONG
        for form in ("{}/{}", "\\frac{{{}}}{{{}}}", "$\\frac{{{}}}{{{}}}$", "so \\boxed{{{}/{}}}."):
            assert task.verify(problem, form.format(reduced.numerator, reduced.denominator)) is Verdict.CORRECT
            assert task.verify(problem, form.format(above, below)) is Verdict.WRONG


def test_p71_what_a_scorer_raises_is_counted_and_never_wrong() -> None:
    task = ReasoningGym("prime_factorization")
    item: dict[str, Any] = package.create_dataset("prime_factorization", seed=1, size=1)[0]
    problem = Problem(0, item["question"], item["answer"], details={"metadata": item["metadata"]})
    assert task.verify(problem, "xqzt") is Verdict.UNPARSED
    assert task.counts == {"scorer raised ValueError": 1}


def test_p71_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'research-distillation\[tasks\]'"):
        ReasoningGym()


def test_options_are_the_packages_own() -> None:
    task = ReasoningGym("chain_sum", {"min_terms": 3, "max_terms": 3})
    for problem in task.problems("train", 20):
        assert problem.details["metadata"]["num_terms"] == 3
    with pytest.raises(ConfigError, match=r"task\.options is \{'min_term': 3\}.*chain_sum"):
        ReasoningGym("chain_sum", {"min_term": 3})
    with pytest.raises(ConfigError, match=r"\['seed'\]: they are ours"):
        ReasoningGym("chain_sum", {"seed": 3})
    with pytest.raises(ConfigError, match=r"task\.dataset is 'chain_sums'; expected one of .*chain_sum,"):
        ReasoningGym("chain_sums")


def test_a_small_space_ends() -> None:
    task = ReasoningGym("coin_flip", {"min_trials": 3, "max_trials": 5})
    held = {}
    for split in SPLITS:
        with pytest.raises(ValueError, match=r"holds only \d+ distinct") as told:
            task.problems(split, 1000)
        held[split] = int(str(told.value).split("only ")[1].split()[0])
    assert 0 < sum(held.values()) < 100


def test_the_order_in_which_splits_are_asked_for_changes_nothing() -> None:
    one, other = ReasoningGym(), ReasoningGym()
    forward = [one.problems(split, 20, 5) for split in SPLITS]
    backward = [other.problems(split, 20, 5) for split in reversed(SPLITS)]
    assert forward == backward[::-1]
