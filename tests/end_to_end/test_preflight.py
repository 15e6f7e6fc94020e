"""The preflight as a user meets it: in a run's folder, on its own, and in the way of a run that would learn noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from research.results.record import read_record
from research.teachers.load import load_network
from research.text.tokenizer import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = (
    "experiment=sum8_trace", "task.num_terms=3", "student.hidden_size=32", "student.num_layers=2", "data.num_train=64",
    "data.num_val=16", "data.num_test=8", "data.batch_size=32", "evaluation.max_new_tokens=16", "threads=1",
    "trainer.enable_progress_bar=false", "logger=none", "trainer.max_epochs=1",
)  # fmt: skip
Distill = Callable[..., Any]


@pytest.fixture(scope="module")
def teacher(distill: Distill, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    done = distill("train", *SMALL, "seed=3", "trainer.max_epochs=6", "hydra.run.dir=run", cwd=folder)
    assert done.code == 0, done.err
    assert not (folder / "run" / "preflight.json").exists(), "without a teacher there is nothing to look at"
    return folder / "run"


def distilled(teacher: Path) -> tuple[str, ...]:
    return (*SMALL, "method.soft_weight=1.0", "teacher=frozen", f"teacher.path='{teacher}'")


def test_a_run_writes_its_preflight_and_is_the_same_without_it(distill: Distill, teacher: Path, tmp_path: Path) -> None:
    """Weights and metrics to the last bit: it draws none of the run's random numbers and leaves nothing behind."""
    records = {}
    for mode in ("skip", "warn"):
        done = distill("train", *distilled(teacher), f"preflight={mode}", f"hydra.run.dir={mode}", cwd=tmp_path)
        assert done.code == 0, done.err
        records[mode] = read_record(tmp_path / mode / "run.json")
        assert (tmp_path / mode / "preflight.json").exists() == (mode == "warn")
    assert records["skip"].metrics == records["warn"].metrics
    one, two = (load_file(tmp_path / mode / "student" / "model.safetensors") for mode in ("skip", "warn"))
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    report = json.loads((tmp_path / "warn" / "preflight.json").read_text())
    levels = {finding["name"]: finding["level"] for finding in report["findings"]}
    assert levels["tokens"] == levels["vocabulary"] == levels["eos"] == levels["template"] == "ok"
    assert report["level"] == levels["overlap"] == "ok", "it is about to learn from traces"
    assert report["seconds"] < 30 and report["figures"]["accuracy_student"] == 0.0
    log = (tmp_path / "warn" / "train.log").read_text() if (tmp_path / "warn" / "train.log").exists() else ""
    log = log or next((tmp_path / "warn").glob("*.log")).read_text()
    assert "preflight: ok       overlap" in log and "preflight: ok       tokens" in log


def test_warnings_are_refusals_where_that_is_asked_for(distill: Distill, teacher: Path, tmp_path: Path) -> None:
    own_words = (*SMALL, *ON_POLICY, "teacher=frozen", f"teacher.path='{teacher}'")
    stored_alone = ("method.on_policy_fraction=0", "method.hard_weight=1", "data.num_stored=8")
    done = distill("train", *own_words, *stored_alone, "preflight=refuse", "hydra.run.dir=stored", cwd=tmp_path)
    assert done.code == 0 and (tmp_path / "stored" / "preflight.json").exists(), done.err
    done = distill("train", *own_words, "preflight=refuse", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 1 and "the preflight refuses the run" in done.err and "overlap: on its own answers" in done.err
    assert (tmp_path / "run" / "preflight.json").exists() and not (tmp_path / "run" / "student").exists()
    (tmp_path / "run" / "preflight.json").unlink()
    again = ("preflight=refuse", "ckpt_path=last", "hydra.run.dir=run")
    done = distill("train", *own_words, *again, cwd=tmp_path)
    assert done.code == 1 and "the preflight refuses the run" in done.err, "there is no checkpoint to go on from"
    assert (tmp_path / "run" / "preflight.json").exists() and not (tmp_path / "run" / "checkpoints").exists()
    done = distill("train", *distilled(teacher), "preflight=of", "hydra.run.dir=other", cwd=tmp_path)
    assert "preflight is 'of'" in done.error and "Valid: skip, warn, refuse" in done.error


def test_a_run_that_goes_on_from_a_checkpoint_is_not_looked_at_again(
    distill: Distill, teacher: Path, tmp_path: Path
) -> None:
    done = distill("train", *distilled(teacher), "preflight=skip", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    more = ("preflight=refuse", "ckpt_path=last", "trainer.max_epochs=2", "hydra.run.dir=run")
    done = distill("train", *distilled(teacher), *more, cwd=tmp_path)
    assert done.code == 0 and not (tmp_path / "run" / "preflight.json").exists(), done.err


ON_POLICY = ("data=prompts", "data.num_prompts=8", "method=on_policy", "method.max_new_tokens=8", "trainer.max_steps=2")
REWARD_ALONE = ("method.soft_weight=0", "method.reward_weight=1", "method.num_samples=2")


@pytest.mark.parametrize("flags", [("method=sft_trace",), (*ON_POLICY, *REWARD_ALONE)], ids=["traces", "reward"])
def test_a_teacher_that_is_never_asked_needs_no_preflight(
    flags: tuple[str, ...], distill: Distill, teacher: Path, tmp_path: Path
) -> None:
    asked = ("teacher=frozen", f"teacher.path='{teacher}'", "preflight=refuse", "hydra.run.dir=run")
    done = distill("train", *SMALL, *flags, *asked, cwd=tmp_path)
    assert done.code == 0 and not (tmp_path / "run" / "preflight.json").exists(), done.err
    assert read_record(tmp_path / "run" / "run.json").ledger["teacher_scoring"]["tokens"] == 0


def test_of_two_phases_the_one_that_asks_is_looked_at_from_its_own_start(
    distill: Distill, teacher: Path, tmp_path: Path
) -> None:
    """Traces first, which ask nobody; the student that they made is what the second phase is refused for."""
    words = ", ".join(f"'{text}'" for text in ON_POLICY)
    loop = ("loop=strong_to_weak", f"loop.phases=[{{name: traces}}, {{name: words, overrides: [{words}]}}]")
    asked = ("teacher=frozen", f"teacher.path='{teacher}'", "preflight=refuse", "ckpt_path=last", "hydra.run.dir=run")
    first, second = tmp_path / "run" / "phases" / "1_traces", tmp_path / "run" / "phases" / "2_words"
    for _ in range(2):
        done = distill("train", *SMALL, *loop, *asked, cwd=tmp_path)
        assert done.code == 1 and "the preflight refuses the run" in done.err
        assert read_record(first / "run.json").status == "completed" and not (first / "preflight.json").exists()
        assert not (second / "checkpoints").exists()
        found = json.loads((second / "preflight.json").read_text())
        (second / "preflight.json").unlink()
    done = distill("evaluate", str(first), "preflight=true", f"reference='{teacher}'", cwd=tmp_path)
    assert json.loads((first / "preflight.json").read_text())["figures"] == found["figures"]


def test_a_teacher_of_other_tokens_is_refused_before_the_first_step(
    distill: Distill, teacher: Path, tmp_path: Path
) -> None:
    """Its vocabulary is as large, and its ids stand for other characters."""
    copy = tmp_path / "teacher" / "student"
    copy.mkdir(parents=True)
    for path in (teacher / "student").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    own = build_tokenizer(str(copy))
    letters = sorted(set(own.get_vocab()) - {"<pad>", "<eos>"})
    other = build_tokenizer("characters", alphabet="".join(letters[1:]) + "z")
    assert len(other) == len(own)
    other.save_pretrained(copy)
    told = json.loads((copy / "architecture.json").read_text())
    (copy / "architecture.json").write_text(json.dumps({**told, "tokenizer_sha256": None}))
    done = distill("train", *distilled(tmp_path / "teacher"), "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 1 and "ids mean other text to the teacher" in done.err
    assert not (tmp_path / "run" / "student").exists()


def test_evaluate_prints_a_preflight_of_its_own(
    distill: Distill, teacher: Path, tmp_path: Path, logprob_server: Any, repository: Path
) -> None:
    """Beside the run's own teacher, one named by its folder, or one behind a server."""
    done = distill("train", *distilled(teacher), "preflight=skip", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.err
    ask = ("evaluate", str(tmp_path / "run"), "preflight=true", "preflight_problems=8")
    done = distill(*ask, cwd=tmp_path)
    assert done.code == 0 and "-- the teacher's prompt" in done.out and "of 8 problems; the teacher" in done.out
    own = json.loads((tmp_path / "run" / "preflight.json").read_text())["figures"]
    done = distill(*ask, f"reference='{teacher}'", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())["figures"] == own
    done = distill("evaluate", str(teacher), "preflight=true", cwd=tmp_path)
    assert "preflight=true needs a teacher, and the run had none" in done.error

    tokenizer = build_tokenizer(str(teacher / "student"))
    network = load_network(teacher, vocab_size=len(tokenizer), tokenizer_sha256=None).network.eval()

    def logits_of(ids: Any) -> Tensor:
        ids_BT = torch.tensor([ids])
        return network(ids_BT, torch.arange(len(ids))[None], torch.ones_like(ids_BT))[0]

    with logprob_server.serving(logits_of, spell=lambda token: tokenizer.decode([token])) as server:
        served = ("teacher=served", f"teacher.base_url='{server.base_url}'", "teacher.model=tiny", "teacher.top_k=8")
        done = distill(*ask, *served, cwd=tmp_path)
        assert done.code == 0, done.err
        assert "ids spell the same on the server" in done.out
        there = json.loads((tmp_path / "run" / "preflight.json").read_text())["figures"]
        assert there["student/teacher_mass"] == pytest.approx(own["student/teacher_mass"], abs=1e-3)
        done = distill("train", *SMALL, "method.soft_weight=1.0", *served, "hydra.run.dir=far", cwd=tmp_path)
        assert done.code == 0, done.err
        record = read_record(tmp_path / "far" / "run.json")
        assert record.teacher is not None and record.teacher["kind"] == "served"
        line = record.ledger["teacher_scoring"]
        assert line["tokens"] and line["flops"] is None, "nobody knows them, which is not 0"
        limited = ("method.soft_weight=1.0", *served, "budget.flops=1e15", "hydra.run.dir=limited")
        done = distill("train", *SMALL, *limited, cwd=tmp_path)
        assert done.code == 1 and "budget.flops is 1e+15, but what this run spends is not known" in done.err
        done = distill("train", *SMALL, *limited, "teacher.num_parameters=10", cwd=tmp_path)
        assert done.code == 0, done.err
        line = read_record(tmp_path / "limited" / "run.json").ledger["teacher_scoring"]
        assert line["flops"] == 2 * 10 * line["tokens"]
    for path in ("conf/teacher/served.yaml", "docs/served_teacher.md"):
        told = (repository / path).read_text()
        assert "`budget.flops` is refused" in told or "budget.flops is refused" in told, path
    done = distill(*ask, *served, "teacher.max_retries=0", cwd=tmp_path)
    assert done.code == 1 and "the teacher tiny cannot be asked" in done.err
    done = distill("evaluate", str(tmp_path / "run"), "teacher=served", cwd=tmp_path)
    assert "teacher belongs to preflight=true" in done.error
