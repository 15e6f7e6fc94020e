"""STaR with a student that is a vector of skills: what it keeps, what it learns, and that a kill changes nothing."""

import contextlib
import copy
import json
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from research.errors import CheckpointError, ConfigError, StoreError
from research.generation.base import AbstractGenerator, Written
from research.loops.kept_traces import FATES, summary
from research.loops.own_traces import Hints, OwnTraces
from research.loops.self_taught import ITERATION_KEYS, Schedule, SelfTaught
from research.models.weights import weights_sha256
from research.records import Completion, Sampling, Trace, Verdict
from research.seeding import rng_for
from research.tasks.arithmetic import ChainedSums
from research.tasks.grading import Grader
from research.text.codec import Codec
from research.text.templates import Plain
from research.text.tokenizer import build_tokenizer
from research.traces.store import TraceStore

NUM_PROBLEMS, NUM_SKILLS = 30, 6
TASK, TEMPLATE = ChainedSums(num_terms=3), Plain()
PROBLEMS = [replace(problem, level=problem.index % 3 + 1) for problem in TASK.problems("train", NUM_PROBLEMS)]
CODEC = Codec(build_tokenizer("characters", alphabet=TASK.alphabet + TEMPLATE.alphabet), TEMPLATE)
GRADER = Grader(TASK, TEMPLATE, CODEC.layout)
HINTS = Hints(1.0, "{problem}:{answer}")
SAMPLING = Sampling(temperature=1.0, max_new_tokens=32, seed=4)


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch):
    """fsync guards against those alone, and takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Not an Exception: nothing on the way may catch it, as nothing catches a kill."""


class Clock:
    """Counts events and kills at one of them."""

    def __init__(self, kill_at=None):
        self.now, self.kill_at = 0, kill_at

    def tick(self):
        self.now += 1
        if self.now == self.kill_at:
            raise Killed


class Skills(nn.Module):
    """Solves a problem with the chance that the skill of its index gives."""

    def __init__(self, start=0.3):
        super().__init__()
        self.skill = nn.Parameter(torch.full((NUM_SKILLS,), start))


class Solver(AbstractGenerator):
    """Draws what it writes from (seed, index, sample) and its skill; with a hint, it always has the answer."""

    def __init__(self, network, clock):
        self.network, self.clock, self.identity = network, clock, {"kind": "skills"}
        self.by_index = {problem.index: problem for problem in PROBLEMS}

    def generate(self, prompts, sampling):
        for prompt in reversed(prompts):
            self.clock.tick()
            assert list(prompt.ids) == CODEC.prompt_ids(prompt.text.removesuffix("="))
            written = [self.write(prompt, sampling, sample) for sample in range(sampling.num_samples)]
            yield Written(prompt.index, tuple(written))

    def write(self, prompt, sampling, sample):
        problem = self.by_index[prompt.index]
        draw = float(torch.rand((), generator=rng_for(sampling.seed, f"solver/{sample}", prompt.index)))
        good = f"{problem.chain}#{problem.answer}"
        if ":" in prompt.text:  # a hint
            lucky = f"00;00;00#{problem.answer}"
            copied = f"{problem.chain};:{problem.answer}#{problem.answer}"
            text = good if draw < 0.4 else lucky if draw < 0.7 else copied if draw < 0.8 else f"#{problem.answer}"
        else:
            skill = float(self.network.skill.detach()[prompt.index % NUM_SKILLS])
            text = good if draw < skill else ("01#02", "77", f"{good}|", f"00;01#{problem.answer}")[int(draw * 1e4) % 4]
        stop = "length" if text.endswith("|") else "eos"
        text = text.removesuffix("|")
        return Completion((*map(ord, text), 1), text, stop)


class Fit:
    """Each step practises the skill of one trace; goes on from its own last.ckpt."""

    def __init__(self, clock):
        self.clock, self.calls = clock, []

    def __call__(self, traces, steps, init_weights, folder):
        network = Skills()
        network.load_state_dict(init_weights)
        self.calls.append((list(traces), steps, weights_sha256(network)))
        init_weights["skill"].fill_(-1)  # whoever spoils its copy spoils nothing else
        folder.mkdir(parents=True, exist_ok=True)
        done, last = 0, folder / "last.ckpt"
        if last.exists():
            kept = torch.load(last, weights_only=True)
            done = kept["done"]
            network.load_state_dict(kept["network"])
        for step in range(done, steps):
            with torch.no_grad():
                network.skill[traces[step % len(traces)].index % NUM_SKILLS] += 0.02
            torch.save({"done": step + 1, "network": network.state_dict()}, last)
            self.clock.tick()
        return network


def collector(problems=PROBLEMS, hints=HINTS, sampling=SAMPLING, block_problems=8, codec=CODEC):
    return OwnTraces(codec, GRADER, problems, sampling=sampling, hints=hints, block_problems=block_problems)


def loop(clock=None, *, iterations=3, restart=True, base=None, anchors=(), identity=None, **options):
    clock = clock or Clock()

    def evaluate(network):
        clock.tick()
        return {"val/skill": float(network.skill.detach().mean())}

    fit = Fit(clock)
    taught = SelfTaught(
        base or Skills(),
        collector(**options),
        Schedule(iterations, first_steps=5, growth=1.2, restart=restart, seed=11),
        generator_for=lambda network: Solver(network, clock),
        fit_student=fit,
        evaluate=evaluate,
        anchors=anchors,
        identity=identity,
    )
    return taught, fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of three iterations: folder, fits' arguments, result, and how many events it had."""
    folder, clock = tmp_path_factory.mktemp("star"), Clock()
    taught, fit = loop(clock)
    return folder, fit.calls, taught.run(folder), clock.now


def told(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_the_published_steps() -> None:
    schedule = Schedule(16)
    steps = [schedule.steps(iteration) for iteration in range(1, 17)]
    assert (steps[0], steps[1], steps[15], sum(steps)) == (40, 48, 616, 3490)
    assert [Schedule(3, 7, 1.0).steps(iteration) for iteration in (1, 2, 3)] == [7, 7, 7]
    assert Schedule(2, 100, 1.15).steps(2) == 115  # 100 * 1.15 is 114.99999999999999 in floating point


def test_p66_counts_add_up_to_the_problems_in_every_iteration(finished) -> None:
    _, _, result, _ = finished
    assert [record["iteration"] for record in result.records] == [0, 1, 2, 3]
    for record in result.records[1:]:
        assert tuple(record) == ITERATION_KEYS and tuple(record["fates"]) == FATES
        assert sum(record["fates"].values()) == record["num_problems"] == NUM_PROBLEMS
        assert sum(record["first_try"].values()) == NUM_PROBLEMS
        failed = NUM_PROBLEMS - record["fates"]["generated"]
        assert sum(record["hinted_try"].values()) == failed > 0  # everybody who fails is given a hint here
        assert record["first_try"]["kept"] == record["fates"]["generated"]
        assert record["hinted_try"]["kept"] == record["fates"]["rationalised"] > 0
        assert record["documents"] == record["fates"]["generated"] + record["fates"]["rationalised"]
        assert sum(level["problems"] for level in record["by_level"].values()) == NUM_PROBLEMS
        assert sum(level["rationalised"] for level in record["by_level"].values()) == record["fates"]["rationalised"]
    reasons = {reason for record in result.records[1:] for reason in record["first_try"] | record["hinted_try"]}
    assert reasons == {"kept", "wrong", "unparsed", "truncated", "hint_repeated", "empty_chain"}


def test_kept_traces_are_right_and_one_for_each_problem(finished) -> None:
    _, calls, _, _ = finished
    by_index = {problem.index: problem for problem in PROBLEMS}
    for traces, _, _ in calls:
        assert len({trace.index for trace in traces}) == len(traces) > 0
        for trace in traces:
            assert TASK.verify(by_index[trace.index], trace.answer) is Verdict.CORRECT
            assert trace.problem == by_index[trace.index].text


def test_the_hint_is_in_no_training_document(finished) -> None:
    """The student's prompts held it; what it learns from does not, not even where the student copied it."""
    folder, calls, result, _ = finished
    assert sum(record["hinted_try"].get("hint_repeated", 0) for record in result.records[1:]) > 0
    rationalised = 0
    for traces, _, _ in calls:
        for trace in traces:
            rationalised += trace.details["origin"] == "rationalised"
            document = CODEC.encode(trace)
            assert ":" not in CODEC.tokenizer.decode(list(document.ids)).replace(" ", "")
            assert list(document.ids[: document.prompt_length]) == CODEC.prompt_ids(PROBLEMS[trace.index].text)
    assert rationalised > 0
    stored = [row for row in TraceStore(folder / "iteration_01" / "traces").rows() if row.reason == "hint_repeated"]
    assert all(":" in row.text and ":" not in row.trace.problem for row in stored)


def test_false_positives_by_origin(finished) -> None:
    folder, _, result, _ = finished
    for record in result.records[1:]:
        rows = list(TraceStore(folder / f"iteration_{record['iteration']:02d}" / "traces").traces())
        for of in ("generated", "rationalised"):
            chains = [trace.chain for trace in rows if trace.details["origin"] == of]
            invalid = sum(chain.startswith("00;0") for chain in chains)  # the script's ways to be lucky
            found = record["false_positives"][of]
            assert found == {"checked": len(chains), "invalid": invalid, "rate": pytest.approx(invalid / len(chains))}
    assert result.records[1]["false_positives"]["rationalised"]["invalid"] > 0


def test_restart_begins_with_the_weights_of_the_base(finished) -> None:
    _, calls, result, _ = finished
    base = weights_sha256(Skills())
    assert [start for _, _, start in calls] == [base] * 3
    assert [record["init_sha256"] for record in result.records[1:]] == [base] * 3
    assert [record["steps"] for record in result.records[1:]] == [steps for _, steps, _ in calls] == [5, 6, 7]
    students = [record["student_sha256"] for record in result.records]
    assert students[0] == base and len(set(students)) == 4
    assert [record["writer_sha256"] for record in result.records[1:]] == students[:3]
    assert weights_sha256(result.student) == students[-1]


def test_continuing_begins_with_the_student_before(tmp_path) -> None:
    taught, fit = loop(restart=False)
    records = taught.run(tmp_path).records
    assert [start for _, _, start in fit.calls] == [record["student_sha256"] for record in records[:3]]
    assert {record["init"] for record in records[1:]} == {"previous"}


def test_the_base_is_left_alone(tmp_path) -> None:
    base = Skills(0.5)
    before = copy.deepcopy(base.state_dict())
    result = loop(base=base)[0].run(tmp_path)
    assert torch.equal(base.skill, before["skill"]) and result.student is not base
    assert result.records[0]["metrics"] == {"val/skill": 0.5}


@pytest.mark.parametrize("restart", [True, False])
def test_p81_a_kill_at_any_moment_changes_nothing(tmp_path, restart) -> None:
    """Within a block, between blocks, tries, steps of the fit, fit and evaluation, and between iterations."""
    whole, clock = tmp_path / "whole", Clock()
    options = {"restart": restart, "problems": PROBLEMS[:10], "block_problems": 2, "iterations": 2}
    expected = loop(clock, **options)[0].run(whole)
    assert len(TraceStore(whole / "iteration_01" / "traces").manifest.shards) >= 5 + 2  # several blocks of either try
    for kill_at in range(1 + 3 * restart, clock.now + 1, 6):
        folder = tmp_path / f"killed_{kill_at}"
        with pytest.raises(Killed):
            loop(Clock(kill_at), **options)[0].run(folder)
        if kill_at % 4 == 1:
            with contextlib.suppress(Killed):
                loop(Clock(5), **options)[0].run(folder)  # and again, a little later
        result = loop(**options)[0].run(folder)
        assert told(result.records) == told(expected.records), kill_at
        assert torch.equal(result.student.skill, expected.student.skill)
        for path in sorted(whole.rglob("*.safetensors")):
            assert (folder / path.relative_to(whole)).read_bytes() == path.read_bytes()
        for path in sorted(whole.rglob("traces")):
            assert list(TraceStore(folder / path.relative_to(whole)).rows()) == list(TraceStore(path).rows())


def test_a_resumed_loop_does_nothing_twice(tmp_path) -> None:
    loop()[0].run(tmp_path)
    again, idle = loop(Clock(kill_at=1))
    assert again.run(tmp_path).records[-1]["iteration"] == 3 and idle.calls == []
    more, further = loop(iterations=4)
    assert more.run(tmp_path).records[-1]["iteration"] == 4
    assert [steps for _, steps, _ in further.calls] == [8]


def test_a_finished_fit_is_not_fitted_again(tmp_path) -> None:
    clock = Clock()
    loop(clock, iterations=1)[0].run(tmp_path / "whole")
    with pytest.raises(Killed):
        loop(Clock(clock.now), iterations=1)[0].run(tmp_path / "killed")  # the last event is the evaluation
    again, fit = loop(iterations=1)
    record = again.run(tmp_path / "killed").records[1]
    assert fit.calls == [] and record["seconds"]["fit"] is None and record["metrics"] != {}


def test_blocks_do_not_change_what_is_kept(tmp_path) -> None:
    """Every problem has its own stream, so the size of a block is only how often something is saved."""
    small = collector(block_problems=4).collect(Solver(Skills(), Clock()), tmp_path / "small", {}, 3)
    large = collector(block_problems=100).collect(Solver(Skills(), Clock()), tmp_path / "large", {}, 3)
    assert small == large
    assert TraceStore(tmp_path / "small").manifest.tally == TraceStore(tmp_path / "large").manifest.tally


def test_hints_are_drawn_apart_for_every_problem_and_iteration() -> None:
    half = replace(HINTS, probability=0.5)
    drawn = [[half.is_given(seed, problem) for problem in PROBLEMS] for seed in range(40)]
    assert 0.4 < sum(map(sum, drawn)) / (40 * NUM_PROBLEMS) < 0.6
    assert len({tuple(row) for row in drawn}) == 40
    assert not any(replace(HINTS, probability=0.0).is_given(0, problem) for problem in PROBLEMS)
    assert all(HINTS.is_given(0, problem) for problem in PROBLEMS)
    fewer = [half.is_given(0, problem) for problem in PROBLEMS[::3]]
    assert fewer == drawn[0][::3]


def test_every_try_of_every_iteration_draws_anew(tmp_path) -> None:
    """A problem that failed by its random numbers must not fail by the same ones again."""
    seeds = []

    class Noted(Solver):
        def generate(self, prompts, sampling):
            seeds.append(sampling.seed)
            return super().generate(prompts, sampling)

    options = {"generator_for": lambda network: Noted(network, Clock()), "fit_student": Fit(Clock())}
    SelfTaught(Skills(), collector(block_problems=100), Schedule(3, 5), **options).run(tmp_path)
    assert len(seeds) == len(set(seeds)) == 6


def test_without_hints_nobody_is_asked_twice(tmp_path) -> None:
    records = loop(hints=Hints())[0].run(tmp_path).records
    for record in records[1:]:
        assert record["hinted_try"] == {} and record["fates"]["rationalised"] == record["fates"]["hint_failed"] == 0
        assert record["fates"]["not_hinted"] == NUM_PROBLEMS - record["fates"]["generated"]


def test_p66_an_unreadable_gold_answer_is_never_posed(tmp_path) -> None:
    problems = [replace(PROBLEMS[0], answer="??"), *PROBLEMS[1:]]
    record = loop(problems=problems, iterations=1)[0].run(tmp_path).records[1]
    assert record["fates"]["gold_unreadable"] == 1 and sum(record["fates"].values()) == NUM_PROBLEMS
    assert 0 not in {row.trace.index for row in TraceStore(tmp_path / "iteration_01" / "traces").rows()}


def test_a_problem_that_cannot_be_asked_is_counted_by_reason(tmp_path) -> None:
    problems = [replace(PROBLEMS[0], text="\u20ac"), *PROBLEMS[1:]]
    record = loop(problems=problems, hints=Hints(), iterations=1)[0].run(tmp_path).records[1]
    assert record["first_try"]["unknown_character"] == 1 and sum(record["first_try"].values()) == NUM_PROBLEMS
    (row,) = [row for row in TraceStore(tmp_path / "iteration_01" / "traces").rows() if row.trace.index == 0]
    assert not row.kept and row.text == "" and row.tokens is None


def test_of_several_right_samples_the_first_is_kept(tmp_path) -> None:
    own = collector(sampling=replace(SAMPLING, num_samples=4))
    rows = own.collect(Solver(Skills(0.6), Clock()), tmp_path, {}, 3)
    for problem in PROBLEMS:
        first = [row for row in rows if row.trace.index == problem.index and row.trace.details["origin"] == "generated"]
        fit_for_training = [row for row in first if row.reason in (None, "spare")]
        assert [row.trace.sample for row in first] == [0, 1, 2, 3]
        assert [row.kept for row in fit_for_training] == [True, False, False, False][: len(fit_for_training)]
    counted = summary(rows, own.problems, 0)
    assert sum(counted["fates"].values()) == NUM_PROBLEMS
    tally = TraceStore(tmp_path).manifest.tally
    assert tally.written == len(rows) == tally.kept + sum(tally.dropped.values()) and tally.problems == NUM_PROBLEMS
    assert tally.dropped == Counter(row.reason for row in rows if not row.kept)


def test_a_base_that_solves_nothing_ends_the_loop_and_says_so(tmp_path) -> None:
    problems = [problem for problem in PROBLEMS if problem.index % 2]

    class Silent(Solver):
        def write(self, prompt, sampling, sample):
            return Completion((1,), "", "eos")

    clock = Clock()
    options = {"generator_for": lambda network: Silent(network, clock), "fit_student": Fit(clock)}
    for folder, anchors in (("alone", ()), ("anchored", [Trace("01+02", "03", "03", 7)])):
        taught = SelfTaught(Skills(), collector(problems), Schedule(2, 5), anchors=anchors, **options)
        for _ in range(2):  # and says so again
            result = taught.run(tmp_path / folder)
        if anchors:
            assert [record["documents"] for record in result.records[1:]] == [1, 1]
        else:
            assert len(result.records) == 2 and "none of 15 problems was solved" in result.records[1]["stopped"]
            assert weights_sha256(result.student) == weights_sha256(Skills())


def test_another_plan_on_the_same_folder_is_refused(tmp_path) -> None:
    loop(iterations=1, identity={"lr": 0.1})[0].run(tmp_path)
    changes = [
        ({"restart": False}, "schedule"),
        ({"hints": replace(HINTS, probability=0.5)}, "hints"),
        ({"problems": PROBLEMS[1:]}, "problems_sha256"),
        ({"base": Skills(0.4)}, "base_sha256"),
        ({"anchors": [Trace("01+02", "03", "03", 0)]}, "anchors_sha256"),
    ]
    for change, key in changes:
        with pytest.raises(CheckpointError, match=rf"another plan \({key}: "):
            loop(identity={"lr": 0.1}, **change)[0].run(tmp_path)
    with pytest.raises(CheckpointError, match=r"identity: \{'lr': 0.1\}, now \{'lr': 0.2\}"):
        loop(identity={"lr": 0.2})[0].run(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path) -> None:
    loop(iterations=2)[0].run(tmp_path)
    path = tmp_path / "iteration_02" / "student.safetensors"
    good = path.read_bytes()
    path.write_bytes((tmp_path / "iteration_01" / "student.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="not as iteration 2 left it"):
        loop(iterations=3)[0].run(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        loop(iterations=3)[0].run(tmp_path)
    path.write_bytes(good)
    assert load_file(path)["skill"].shape == (NUM_SKILLS,)
    records = (tmp_path / "iterations.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in records] == [0, 1, 2]
    (tmp_path / "iterations.jsonl").write_text("\n".join(records[1:]) + "\n")
    with pytest.raises(CheckpointError, match="in order"):
        loop(iterations=3)[0].run(tmp_path)


def test_a_store_of_another_writer_is_refused(tmp_path) -> None:
    own = collector()
    own.collect(Solver(Skills(), Clock()), tmp_path, {"writer": "a"}, 3)
    with pytest.raises(StoreError, match="writer"):
        own.collect(Solver(Skills(), Clock()), tmp_path, {"writer": "b"}, 3)


@pytest.mark.parametrize(
    ("probability", "format", "message"),
    [
        (1.5, "{problem}[{answer}]", "from 0 to 1"),
        (0.5, None, "hint_format is null"),
        (0.5, "{problem}", "once each"),
        (0.5, "{problem}{answer}{answer}", "once each"),
        (0.5, "{problem}{answer}{0}", "once each"),
        (0.5, "{problem}{answer", "expected '}'"),
        (0.5, "{problem} {answer}", "something around the answer"),
    ],
)
def test_hints_that_cannot_be_given_are_refused(probability, format, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Hints(probability, format)


def test_a_hint_that_the_tokenizer_cannot_write_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"hint_format is '\{problem\}\[\{answer\}\]', which cannot be written"):
        collector(hints=Hints(1.0, "{problem}[{answer}]"))
    collector(hints=Hints(0.0, "{problem}[{answer}]"))


@pytest.mark.parametrize("change", [{"iterations": 0}, {"first_steps": 0}, {"growth": 0.9}, {"growth": float("nan")}])
def test_a_schedule_that_is_none_is_refused(change) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Schedule(**{"iterations": 2, **change})
