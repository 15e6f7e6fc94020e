"""Text from command to run folder and back: trained, graded, loaded elsewhere, scored again, killed and resumed."""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from research.evaluation.completions import read_samples, regrade
from research.records import Sampling
from research.results.items import read_items
from research.results.record import RunRecord, read_record
from research.tasks.arithmetic import ChainedSums
from research.tasks.grading import Grader
from research.teachers.load import load_network
from research.text.templates import Plain
from research.text.tokenizer import build_tokenizer, tokenizer_sha256

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = (
    "experiment=sum8_trace", "task.num_terms=3", "student.hidden_size=32", "student.num_layers=2", "data.num_train=320",
    "data.num_val=16", "data.num_test=50", "data.batch_size=32", "evaluation.max_new_tokens=16", "threads=1",
    "trainer.enable_progress_bar=false", "logger=none",
)  # fmt: skip
SMOKE = (*SMALL, "trainer=smoke")
TASK = ChainedSums(num_terms=3, highest=9)
Distill = Callable[..., Any]


@pytest.fixture(scope="module")
def run(distill: Distill, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run long enough for some right answers, with four samples a problem."""
    folder = tmp_path_factory.mktemp("text")
    longer = ("trainer.max_epochs=12", "evaluation.num_samples=4", "evaluation.sampling_temperature=0.7")
    done = distill("train", *SMALL, *longer, "hydra.run.dir=run", cwd=folder)
    assert done.code == 0, done.err
    return folder / "run"


def verdict_by_hand(text: str, stop: str, problem: str) -> str:
    """The running totals are joined by ; and # announces the last of them, written as one digit."""
    if stop == "length":
        return "truncated"
    _, mark, answer = text.partition("#")
    if not mark or not answer or "=" in text:
        return "unparsed"
    total = sum(int(term) for term in problem.replace("+", " +").replace("-", " -").split())
    if not re.fullmatch("-?[0-9]+", answer):
        return "unparsed"
    return "correct" if answer == str(total) else "wrong"


def test_a_run_leaves_graded_items_and_samples(run: Path) -> None:
    record, problems = read_record(run / "run.json"), TASK.problems("test", 50)
    grader = Grader(TASK, Plain(), "chain_then_answer")
    items = read_items(run / record.artifacts["items/test"])
    by_hand = [
        verdict_by_hand(text, stop, problems[index].text)
        for index, text, stop in zip(items["index"], items["completion"], items["stop"], strict=True)
    ]
    assert items["verdict"].tolist() == by_hand == [verdict.value for verdict in regrade(grader, problems, items)]
    right = Counter(by_hand)["correct"]
    assert 0 < right < 50 and record.metrics["test/accuracy"] == pytest.approx(right / 50)
    assert record.metrics["test/errors"] == 50 - right
    samples, sampling = read_samples(run / record.artifacts["samples/test"])
    assert sampling == Sampling(4, 0.7, 1.0, 16, 0)
    assert Counter(samples["index"].tolist()) == dict.fromkeys(range(50), 4)
    right_samples = Counter(samples["index"][samples["verdict"] == "correct"].tolist())
    assert items["num_samples"].tolist() == [4] * 50
    assert items["num_right"].tolist() == [right_samples[index] for index in range(50)] and right_samples.total() > 0
    for k, name in ((1, "test/sampled_pass_at_1"), (2, "test/sampled_pass_at_2"), (4, "test/sampled_pass_at_4")):
        passed = [1 - comb(4 - int(count), k) / comb(4, k) for count in items["num_right"]]
        assert record.metrics[name] == pytest.approx(sum(passed) / 50), "pass@k follows from the items alone"
    solved = [verdict.value == "correct" for verdict in regrade(grader, problems, samples)]
    assert record.metrics["test/sampled_pass_at_1"] == pytest.approx(sum(solved) / 200)
    any_of_4 = sum(any(solved[first : first + 4]) for first in range(0, 200, 4))
    assert record.metrics["test/sampled_pass_at_4"] == pytest.approx(any_of_4 / 50)
    assert record.ledger["student_update"]["flops"] > 0 and record.data["summary"]["rows"]["train"] == 320


def test_plain_transformers_loads_the_student_and_writes_what_was_graded(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    own = build_tokenizer(str(run / "student"))
    network = load_network(run, vocab_size=len(tokenizer), tokenizer_sha256=tokenizer_sha256(own)).network.eval()
    items = read_items(run / "items_test.parquet")
    for problem, text, stop in zip(TASK.problems("test", 8), items["completion"], items["stop"], strict=False):
        ids = torch.tensor([tokenizer(f"{problem.text}=").input_ids])
        with torch.no_grad():
            logits = network(ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids))
            assert torch.equal(model(ids).logits, logits)
        written = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
        assert (written[-1] == tokenizer.eos_token_id) == (stop == "eos")
        assert tokenizer.decode(written, skip_special_tokens=True) == text


# -- distill evaluate -------------------------------------------------------------------------------------------------


def test_p90_evaluate_gives_what_the_run_recorded(run: Path, distill: Distill, tmp_path: Path) -> None:
    record = read_record(run / "run.json")
    sampled = ("sampling.num_samples=4", "sampling.sampling_temperature=0.7")
    done = distill("evaluate", str(run), *sampled, cwd=tmp_path)
    assert done.code == 0, done.err
    scored = json.loads((run / "evaluation_test.json").read_text())
    recorded = {name: value for name, value in record.metrics.items() if name.startswith("test/")}
    assert len(recorded) > 20 and scored["metrics"] == pytest.approx(recorded, rel=1e-6)
    assert scored["sampling"]["max_new_tokens"] == 16, "the run's own length limit"


def test_evaluate_poses_longer_problems(run: Path, distill: Distill, tmp_path: Path) -> None:
    done = distill("evaluate", str(run), "+data.task.num_terms=4", "+data.num_test=20", cwd=tmp_path)
    assert done.code == 0, done.err
    told = json.loads((run / "evaluation_test_num_test=20_task.num_terms=4.json").read_text())
    assert told["metrics"]["test/problems_level_4"] == 20 and told["data"] == {"num_test": 20, "task.num_terms": 4}
    items = read_items(run / "evaluation_test_num_test=20_task.num_terms=4" / "items_test.parquet")
    longer = ChainedSums(num_terms=4, highest=9).problems("test", 20)
    assert items["gold"].tolist() == [problem.answer for problem in longer]
    assert (
        "data.task is 'sum5'; give keys of the task"
        in distill("evaluate", str(run), "+data.task=sum5", cwd=tmp_path).error
    )
    assert "nearest valid: task.num_terms" in distill("evaluate", str(run), "+data.task.num_term=4", cwd=tmp_path).error


def test_what_is_omitted_for_one_reason_is_one_line_before_the_scores(distill: Distill, tmp_path: Path) -> None:
    done = distill("train", *SMOKE, "data.trace_format=answer_only", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    done = distill("evaluate", "run", cwd=tmp_path)
    omitted = json.loads((tmp_path / "run" / "evaluation_test.json").read_text())["omitted"]
    assert done.code == 0 and len(omitted) > len(set(omitted.values())) >= 1, done.err
    first, last = done.out.splitlines()[: len(set(omitted.values()))], done.out.splitlines()[-1]
    assert all(line.startswith("omitted (") for line in first) and done.out.count("omitted (") == len(first)
    assert first[0].startswith("omitted (the layout answer_only writes no chain): test/") and ", test/" in first[0]
    assert sorted(", ".join(line.rpartition("): ")[2] for line in first).split(", ")) == sorted(omitted)
    assert last.startswith("written: ")


def test_a_run_is_scored_again_without_the_store_that_its_tokenizer_was_trained_on(
    distill: Distill, tmp_path: Path
) -> None:
    rows = [{"problem": p.text, "chain": p.chain, "answer": p.answer} for p in TASK.problems("train", 60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("data.store=mine.jsonl", "data.tokenizer=bpe", "data.vocab_size=300", "data.num_test=5")
    done = distill("train", *SMOKE, *own, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    (tmp_path / "mine.jsonl").unlink()
    done = distill("evaluate", "run", cwd=tmp_path)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "run" / "evaluation_test.json").read_text())
    trained = read_record(tmp_path / "run" / "run.json").metrics
    assert told["metrics"] and told["metrics"] == {name: trained[name] for name in told["metrics"]}
    assert told["data"] == {}, "what the run itself has is no change"


def test_a_variant_poses_longer_problems(distill: Distill, tmp_path: Path) -> None:
    longer = ("+evaluation.variants.longer.task.num_terms=4", "+evaluation.variants.longer.num_test=5")
    done = distill("train", *SMOKE, *longer, "data.num_test=4", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    metrics = read_record(tmp_path / "run" / "run.json").metrics
    assert metrics["test/problems_level_3"] == 4 and metrics["test_longer/problems_level_4"] == 5


# -- loops and stores -------------------------------------------------------------------------------------------------


def test_a_self_taught_run_leaves_its_iterations(distill: Distill, tmp_path: Path) -> None:
    loop = (
        "loop=self_taught", "loop.iterations=2", "loop.first_steps=40", "loop.num_problems=40", "loop.num_anchors=160",
        "data.num_test=6",
    )  # fmt: skip
    done = distill("train", *SMALL, *loop, "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    record = read_record(tmp_path / "run" / "run.json")
    numbers = {name.rpartition("_")[2] for name in record.metrics if name.startswith("self_taught/accuracy_")}
    assert record.status == "completed" and len(numbers) >= 2 and record.metrics["test/problems"] == 6
    assert record.metrics[f"self_taught/documents_{max(numbers)}"] > 160, "anchors, and what the student solved"
    lines = (tmp_path / "run" / "self_taught" / "iterations.jsonl").read_text().splitlines()
    told = {f"{line['iteration']:02d}": line["false_positives"] for line in map(json.loads, lines[1:])}
    rates = {f"self_taught/false_positives_{origin}_{number}": of["rate"]
             for number, by_origin in told.items() for origin, of in by_origin.items()}  # fmt: skip
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    assert rates and rates == {n: value for n, value in record.metrics.items() if "false_positives" in n}
    ledger, posed = record.ledger, TASK.problems("train", 200)[160:]
    assert ledger["rollout"]["tokens"] > 0 and ledger["student_update"]["tokens"] > 0
    assert ledger["prompt_prefill"]["tokens"] == 2 * sum(len(f"{problem.text}=") for problem in posed)
    assert ledger["prompt_prefill"]["flops"] > 0 and ledger["rollout"]["flops"] > 0
    parts = ("prompt_prefill", "rollout", "student_update")
    assert all(ledger[part]["seconds"] > 0 for part in parts)
    assert sum(ledger[part]["seconds"] for part in parts) < record.wall_s


def test_traces_of_a_run_teach_the_next(run: Path, distill: Distill, tmp_path: Path) -> None:
    """A teacher writes, the right answers are kept, a student trains on them, and the store's page is written again."""
    asked = ("task=sum8", "task.num_terms=3", "data.num_problems=60", "sampling.max_new_tokens=16", "threads=1")
    done = distill("traces", f"teacher.path='{run}'", *asked, "filter=answer_key", "store=store", cwd=tmp_path)
    assert done.code == 0, done.err
    written = read_record(tmp_path / "store" / "run.json")
    kept = written.metrics["traces/kept"]
    assert 0 < kept < 60
    student = (f"data.store='{tmp_path}/store'", "data.num_train=null", "data.batch_size=8", "hydra.run.dir=run")
    done = distill("train", *SMOKE, *student, cwd=tmp_path)
    assert done.code == 0, done.err
    record = read_record(tmp_path / "run" / "run.json")
    teacher = read_record(Path(run) / "run.json").ledger["student_update"]["flops"]
    once = written.ledger["teacher_scoring"]["flops"] + teacher
    assert record.ledger["teacher_training"]["flops"] == once, "the teacher's training, and the writing of its traces"
    data = record.data["summary"]
    assert data["store"] == "store" and data["rows"]["train"] == kept and data["dropped"]["train"] == {}
    page = tmp_path / "store" / "explorer.html"
    before = page.read_bytes()
    page.unlink()
    done = distill("report", "store", cwd=tmp_path)
    assert done.code == 0 and page.read_bytes() == before


def test_bad_rows_of_a_file_are_in_the_record_and_listed_beside_it(distill: Distill, tmp_path: Path) -> None:
    rows = [{"question": p.text, "rationale": p.chain, "answer": p.answer} for p in TASK.problems("train", 40)]
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, rows), "{", json.dumps(rows[0] | {"answer": True})]))
    command = (*SMOKE, "data.store=in.jsonl", "data.num_train=null", "data.batch_size=8", "hydra.run.dir=run")
    done = distill("train", *command, cwd=tmp_path)
    assert done.code == 0, done.err
    record = read_record(tmp_path / "run" / "run.json")
    dropped = record.data["summary"]["dropped"]["train"]
    assert dropped == {"quarantine_not_json": 1, "quarantine_wrong_type": 1}
    listed = (tmp_path / "run" / record.artifacts["quarantine"]).read_text().splitlines()
    assert [(row["line"], row["reason"]) for row in map(json.loads, listed)] == [(41, "not_json"), (42, "wrong_type")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert distill("train", *command, cwd=tmp_path).code == 0
    assert "quarantine" not in read_record(tmp_path / "run" / "run.json").artifacts


def test_a_mixture_of_stores_is_a_key_of_the_command(distill: Distill, tmp_path: Path) -> None:
    """Two stores, three to one; the record says how many of each, and the same command takes the same."""
    for seed, count in ((1, 30), (2, 10)):
        asked = (
            "task=sum8",
            "task.num_terms=3",
            "template=plain",
            "source=reference",
            f"data.problem_seed={seed}",
            "threads=1",
        )
        done = distill("traces", *asked, f"data.num_problems={count}", f"store=of_{seed}", cwd=tmp_path)
        assert done.code == 0, done.err
    by_weight = "data.mixture=[{store: of_1, weight: 0.75, name: reasoning}, {store: of_2, weight: 0.25}]"
    for folder in ("one", "two"):
        options = (by_weight, "data.num_train=40", "data.batch_size=8", f"hydra.run.dir={folder}")
        done = distill("train", *SMOKE, *options, cwd=tmp_path)
        assert done.code == 0, done.err
    one, two = (read_record(tmp_path / folder / "run.json") for folder in ("one", "two"))
    assert one.data["fingerprint"] == two.data["fingerprint"] and one.metrics == two.metrics
    told = one.data["summary"]
    assert {name: of["traces"] for name, of in told["mixture"].items()} == {"reasoning": 30, "of_2": 10}
    assert told["rows"]["train"] + told["dropped"]["train"].get("held_out", 0) == 40
    refused = distill("train", *SMOKE, by_weight, "data.num_train=41", cwd=tmp_path).error
    assert "which holds" in refused and "data.num_train=41; null takes as many as fit" in refused
    both = distill("train", *SMOKE, by_weight, "data.store=of_1", cwd=tmp_path).error
    assert both == "data.store is 'of_1' and data.mixture is set; give one of them"


# -- killed -----------------------------------------------------------------------------------------------------------

RESUMED = (
    *SMALL, "data.num_train=80", "data.batch_size=16", "data.packed_to=64", "data.length_grouping=2", "data.num_test=4",
    "trainer.accumulate_grad_batches=2", "trainer.max_epochs=12", "student.dropout=0.2", "seed=5",
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def test_p81_a_killed_run_goes_on_to_the_weights_of_one_that_was_not(
    distill: Distill, begin: Callable[..., Any], tmp_path: Path
) -> None:
    """SIGKILL somewhere after the second epoch, in a run with dropout, packing, grouping and accumulation."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begin("train", *RESUMED, f"hydra.run.dir={cut}", cwd=tmp_path).kill_when(lambda: step_of(cut) >= 10)
    saved = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 5 <= saved < 60 and not (cut / "run.json").exists()
    records: list[RunRecord] = []
    for folder, resume in ((cut, ["ckpt_path=last"]), (whole, [])):
        done = distill("train", *RESUMED, *resume, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert done.code == 0, done.err
        records.append(read_record(folder / "run.json"))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(cut)[name]), name
    assert records[0].metrics == records[1].metrics
    spent = [record.ledger["student_update"] for record in records]
    assert spent[0]["tokens"] == spent[1]["tokens"] and spent[0]["flops"] == spent[1]["flops"]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("trainer.max_epochs=2",), id="epochs"),
        pytest.param(("trainer.max_steps=13",), id="a validation before the end", marks=pytest.mark.slow),
        pytest.param(("budget.tokens=2000", "trainer.max_epochs=-1"), id="budget"),
        pytest.param(("early_stopping=threshold", "early_stopping.threshold=9"), id="early", marks=pytest.mark.slow),
    ],
)
def test_p81_a_run_killed_while_it_is_scored_leaves_the_same_record(
    flags: tuple[str, ...], distill: Distill, tmp_path: Path
) -> None:
    """It has its last checkpoint and no record; gone on with, it takes no step, and so validates nothing again."""
    command = ("train", *SMALL, *flags, "data.num_train=200", "evaluation.val_problems=6", "hydra.run.dir=run")
    run, records = tmp_path / "run", []
    for more in ((), ("ckpt_path=last",)):
        done = distill(*command, *more, cwd=tmp_path)
        assert done.code == 0, done.err
        records.append(read_record(run / "run.json"))
        (run / "run.json").unlink()
        shutil.rmtree(run / "student")
    assert {"val/nll", "val/accuracy", "val/nll_best", "test/errors"} <= records[0].metrics.keys()
    assert records[1].metrics == records[0].metrics and records[1].reason == records[0].reason
    assert records[1].student == records[0].student


def step_of(folder: Path) -> int:
    path = folder / "progress.json"
    return int(json.loads(path.read_text())["step"]) if path.exists() else 0


# -- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_p46_two_ranks_take_the_steps_of_one(
    run_console: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Ragged documents, means over tokens: plain gradient descent ends in the same weights, to rounding."""
    flags = (
        "data=traces", "task=addition", "template=plain", "model@student=llama", "method=sft_trace", "optimizer=sgd",
        "scheduler=constant", "data.num_train=50", "data.num_val=6", "data.num_test=4", "data.batch_size=16",
        "student.num_layers=1", "trainer.max_epochs=2", "trainer.enable_progress_bar=false", "logger=none",
        "monitor=val/nll", "evaluation.max_new_tokens=4",
    )  # fmt: skip
    for devices in (1, 2):
        done = run_console("train", *flags, f"trainer.devices={devices}", f"hydra.run.dir=on_{devices}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "on_1"), weights(tmp_path / "on_2")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    records = [read_record(tmp_path / f"on_{devices}" / "run.json") for devices in (1, 2)]
    assert records[1].metrics["val/nll"] == pytest.approx(records[0].metrics["val/nll"], rel=1e-5)


def test_the_precision_of_a_gpu_trains_what_the_cpu_trains(distill: Distill, tmp_path: Path) -> None:
    """trainer=gpu is bf16-mixed, with the bound on gradients and the fused optimizer that every text experiment has."""
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        done = distill("train", *SMOKE, f"trainer.precision={precision}", f"hydra.run.dir={precision}", cwd=tmp_path)
        assert done.code == 0, done.err
        losses.append(read_record(tmp_path / precision / "run.json").metrics["test/nll"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)
