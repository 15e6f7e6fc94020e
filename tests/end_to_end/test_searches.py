"""The searches of conf/hparams_search and the sweeper around real training runs, through the console command."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from research.results.record import read_record

pytestmark = pytest.mark.filterwarnings("ignore")
SWEEP = ("hydra/sweeper=optuna_study", "logger=none", "threads=1")


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_pruned_sweep_of_real_runs_and_its_best_file(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """Runs report every validation; the bad ones are stopped; the best one's file gives the same value again."""
    done = distill(
        "train", "-m", *SWEEP, *tiny, "optimizer.lr=0.003,0.0000001,0.0000002", "hydra/sweeper/study_sampler=grid",
        "hydra/sweeper/study_pruner=median", "hydra.sweeper.pruner.n_startup_trials=1",
        "hydra.sweeper.study_name=digits", "evaluation.splits=[val]", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    folder = tmp_path / "outputs" / "digits"
    rows = rows_of(folder)
    assert [row["state"] for row in rows] == ["complete", "pruned", "pruned"]
    whole, cut = (read_record(folder / number / "run.json") for number in ("0", "1"))
    assert (whole.status, cut.status) == ("completed", "pruned")
    assert "pruned at step" in str(cut.reason) and cut.reason == rows[1]["reason"]
    steps = [int(row["last_step"]) for row in rows]
    assert steps[1] < steps[0], "a pruned run is shorter"
    assert not (folder / "0" / "checkpoints").exists(), "nothing is gone on from a finished trial"
    assert "begins at step 0" not in done.err + (folder / "0" / "train.log").read_text(), "nobody asked for one"

    again = distill("train", f"experiment={folder}/best.yaml", *tiny[1:2], "hydra.run.dir=again", cwd=tmp_path)
    assert again.code == 0, again.err
    assert read_record(tmp_path / "again" / "run.json").metrics["val/errors"] == float(rows[0]["value"])

    before = (folder / "trials.csv").read_text()
    (folder / "trials.csv").unlink()
    (folder / "best.yaml").unlink()
    told = distill("report", str(folder), cwd=tmp_path)
    assert told.code == 0 and "1 complete, 2 pruned" in told.out
    assert (folder / "trials.csv").read_text() == before and (folder / "best.yaml").exists()


@pytest.mark.parametrize("monitor", ["monitor=test/errors", "monitor=val/errors,test/errors"])
def test_a_search_by_the_test_split_is_refused_before_a_trial(
    monitor: str, distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    more = ("optimizer.lr=choice(0.003,0.001)", "hydra.sweeper.study_name=peek")
    done = distill("train", "-m", *SWEEP, *tiny, *more, monitor, cwd=tmp_path)
    assert done.code == 1 and "monitor is test/errors" in done.err, done.err
    assert not list(tmp_path.glob("outputs/peek/**/run.json")) and not (tmp_path / "outputs" / "peek" / "0").exists()


def test_a_search_whose_trials_all_failed_has_failed(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    more = ("optimizer.lr=choice(0.003,0.001)", "hydra.sweeper.study_name=wrong", "hydra.sweeper.n_trials=2")
    done = distill("train", "-m", *SWEEP, *tiny, *more, "evaluation.bias_classes=[99]", cwd=tmp_path)
    assert done.code == 1 and "no trial of the sweep 'wrong' was completed (2 failed)" in done.err, done.err
    assert "Trial 0 ended with: ConfigError: evaluation.bias_classes" in done.err
    assert [row["state"] for row in rows_of(tmp_path / "outputs" / "wrong")] == ["failed"] * 2


@pytest.mark.slow
def test_a_trial_that_trains_on_two_ranks(distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path) -> None:
    """A process of its own for every trial, started so that Lightning can start its further rank the same way."""
    done = distill(
        "train", "-m", *SWEEP, *tiny, "optimizer.lr=0.003,0.001", "hydra/sweeper/study_sampler=grid",
        "trainer.accelerator=cpu", "trainer.devices=2", "hydra.sweeper.subprocess=true",
        "hydra.sweeper.study_name=ranks", "evaluation.splits=[val]", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "outputs" / "ranks")
    told = [(Path(row["folder"]) / "stderr.log").read_text()[-500:] for row in rows]
    assert [row["state"] for row in rows] == ["complete"] * 2, told
    for row in rows:
        record = read_record(Path(row["folder"]) / "run.json")
        assert record.metrics["val/errors"] == float(row["value"])
        assert record.config["optimizer"]["lr"] == float(row["param:optimizer.lr"])
        assert record.config["trainer"]["devices"] == 2


@pytest.mark.slow
def test_a_trial_of_two_ranks_is_pruned_on_both(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """The first rank alone reports; were the other not told to stop, it would wait for the first for ever."""
    done = distill(
        "train", "-m", *SWEEP, *tiny[1:], "optimizer.lr=choice(0.003,0.001)", "trainer.max_epochs=4",
        "trainer.accelerator=cpu", "trainer.devices=2", "hydra.sweeper.subprocess=true", "hydra.sweeper.n_trials=1",
        "hydra/sweeper/study_pruner=threshold", "hydra.sweeper.pruner.upper=0", "hydra.sweeper.study_name=ranks",
        "evaluation.splits=[val]", cwd=tmp_path,
    )  # fmt: skip
    rows = rows_of(tmp_path / "outputs" / "ranks")
    assert [row["state"] for row in rows] == ["pruned"], done.err
    record = read_record(Path(rows[0]["folder"]) / "run.json")
    assert record.status == "pruned" and record.config["trainer"]["devices"] == 2
    assert done.code == 1 and "no trial of the sweep 'ranks' was completed (1 pruned)" in done.err


def test_a_run_that_tells_its_pruner_nothing_is_warned_of(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """Its first validation would have come after its end."""
    seldom = ("trainer.check_val_every_n_epoch=9", "hydra/sweeper/study_pruner=median")
    done = distill("train", "-m", *SWEEP, *tiny, *seldom, "optimizer.lr=choice(0.001,0.002)",
                   "hydra.sweeper.study_name=digits", "evaluation.splits=[val]", "hydra.sweeper.n_trials=1",
                   cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    told = "".join(path.read_text() for path in (tmp_path / "outputs" / "digits" / "0").glob("*.log"))
    assert "the pruner was told nothing" in told and "check_val_every_n_epoch" in told


def test_accuracy_against_cost_comes_from_the_ledger(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    done = distill(
        "train", "-m", *SWEEP, *tiny[1:], "trainer.max_epochs=1,4", "hydra/sweeper/study_sampler=grid",
        "hydra.sweeper.objectives={val/errors: minimize, cost/flops: minimize}", "hydra.sweeper.study_name=cost",
        "evaluation.splits=[val]", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    short, long = rows_of(tmp_path / "outputs" / "cost")
    assert float(long["cost/flops"]) == pytest.approx(4 * float(short["cost/flops"]), rel=1e-6)
    record = read_record(tmp_path / "outputs" / "cost" / "1" / "run.json")
    own = sum(line["flops"] or 0 for name, line in record.ledger.items() if name != "teacher_training")
    assert float(long["cost/flops"]) == own and float(long["val/errors"]) == record.metrics["val/errors"]


def test_a_sweep_asks_each_teacher_once_and_every_temperature_learns_what_it_would_have_live(
    distill: Callable[..., Any], tiny: tuple[str, ...], digits_teacher: Path, tmp_path: Path
) -> None:
    """Two teachers x two temperatures: two caches, each written once; the errors are those of live teachers."""
    other = distill("train", *tiny, "logger=none", "seed=5", "hydra.run.dir=other", cwd=tmp_path)
    assert other.code == 0, other.err
    teachers = f"teacher.path='{digits_teacher}','{tmp_path}/other'"
    soft = ("method=soft_target", "teacher=frozen", teachers, "method.temperature=1,8", "data.holdout=200")
    grid = ("hydra/sweeper/study_sampler=grid", "monitor=val/nll", "evaluation.splits=[val]")
    tables = {}
    for name, place in (("live", "null"), ("kept", "'${hydra:sweep.dir}/signals'")):
        done = distill(
            "train", "-m", *SWEEP, *tiny, *soft, *grid, f"teacher_cache={place}", f"hydra.sweeper.study_name={name}",
            cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        tables[name] = rows_of(tmp_path / "outputs" / name)
    live, kept = ([float(row["value"]) for row in tables[name]] for name in ("live", "kept"))
    assert len(set(kept)) == 4 and kept == pytest.approx(live, rel=1e-6)
    folders = list((tmp_path / "outputs" / "kept" / "signals").iterdir())
    assert len(folders) == 2 and all(json.loads((f / "manifest.json").read_text())["rows"] == 1437 for f in folders)
    first = read_record(tmp_path / "outputs" / "kept" / "0" / "run.json")
    assert first.teacher is not None and (first.teacher["kind"], first.config["teacher"]["path"]) == (
        "cached", str(digits_teacher),
    )  # fmt: skip
    own = read_record(tmp_path / "outputs" / "live" / "0" / "run.json")
    assert first.metrics.keys() == own.metrics.keys(), "fidelity is still measured against the teacher itself"
    marks = {path: path.stat().st_mtime_ns for folder in folders for path in folder.glob("shard-*")}
    again = distill(
        "train", *tiny, *soft[:2], f"teacher.path='{digits_teacher}'", "logger=none", "hydra.run.dir=again",
        f"teacher_cache='{tmp_path}/outputs/kept/signals'", cwd=tmp_path,
    )  # fmt: skip
    assert again.code == 0 and {path: path.stat().st_mtime_ns for path in marks} == marks, "found, and not written"


def test_a_teacher_trained_anew_in_its_place_is_asked_anew(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """The path is the same, the process too, the weights are not."""
    kept = []
    for seed in (1, 2):
        distill("train", *tiny, "logger=none", f"seed={seed}", "hydra.run.dir=teacher", cwd=tmp_path)
        soft = ("method=soft_target", "teacher=frozen", f"teacher.path='{tmp_path}/teacher'", "teacher_cache=kept")
        done = distill("train", *tiny, "logger=none", *soft, f"hydra.run.dir=student_{seed}", cwd=tmp_path)
        assert done.code == 0, done.err
        record = read_record(tmp_path / f"student_{seed}" / "run.json")
        assert record.teacher is not None
        assert record.teacher["sha256"] == read_record(tmp_path / "teacher" / "run.json").student["sha256"]
        kept.append(record.teacher["sha256"])
    assert len(set(kept)) == 2 == len(list((tmp_path / "kept").iterdir()))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["teacher=frozen", "data.shift_pixels=1"], "changed anew in every epoch"),
        (["teacher=none"], "teacher=frozen or teacher=ensemble"),
        (["experiment=sum3_sft", "teacher=frozen"], "these data are text"),
    ],
)
def test_signals_that_would_be_wrong_are_not_kept(
    arguments: list[str], told: str, distill: Callable[..., Any], tiny: tuple[str, ...], digits_teacher: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = [f"teacher.path='{digits_teacher}'"] if "teacher=frozen" in arguments else []
    method = () if "experiment=sum3_sft" in arguments else (*tiny, "method=soft_target")
    done = distill("train", *method, "teacher_cache=kept", *arguments, *path, cwd=tmp_path)
    assert done.code != 0 and told in done.error and not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["monitor=test/errors"], "select"),
        (["hydra/sweeper/study_pruner=median", "loop=self_taught"], "needs problems"),
        (["hydra.sweeper.params={optimizer.lrr: 'choice(1,2)'}"], "optimizer.lr"),
    ],
)
def test_a_search_that_would_select_wrongly_is_refused(
    arguments: list[str], told: str, distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    done = distill("train", "-m", *SWEEP, *tiny, "seed=1,2", "hydra.sweeper.n_trials=2", *arguments, cwd=tmp_path)
    assert done.code != 0 and told in done.err
    assert not any(",complete," in path.read_text() for path in tmp_path.rglob("trials.csv"))


@pytest.fixture
def search_of_two(tmp_path: Path) -> Callable[..., "subprocess.Popen[bytes]"]:
    """`search_of_two(folder, overrides...)`: a search over two learning rates, begun in a process of its own."""

    def begin(folder: Path, *more: str) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable, "-c", "from research.commands.main import main; main()", "train", "-m", *SWEEP,
            "experiment=sum8_trace", "task.num_terms=5", "student.hidden_size=32", "data.num_train=1600",
            "data.num_val=16", "data.num_test=0", "trainer.max_epochs=1", "checkpoint_steps=3",
            "evaluation.splits=[val]", "evaluation.max_new_tokens=24", "optimizer.lr=0.001,0.002",
            "hydra/sweeper/study_sampler=grid", f"hydra.sweep.dir={folder}", *more,
        ]  # fmt: skip
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return begin


def await_first_checkpoint(folder: Path) -> None:
    checkpoint, deadline = folder / "0" / "checkpoints" / "last.ckpt", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert checkpoint.exists() and not (folder / "0" / "run.json").exists(), "it was still at work"


def check_equal_ends(cut: Path, whole: Path) -> None:
    assert [row["state"] for row in rows_of(cut)] == ["complete", "complete"]
    assert [row["value"] for row in rows_of(cut)] == [row["value"] for row in rows_of(whole)]
    weights = [json.loads((folder / "0" / "run.json").read_text())["student"]["sha256"] for folder in (cut, whole)]
    assert weights[0] == weights[1], "and with the same weights"


@pytest.mark.slow
def test_an_interrupted_training_run_goes_on_from_its_checkpoint(
    search_of_two: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    """kill -9 of the whole sweep in the middle of a run: the trial ends with the loss of one never killed."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = search_of_two(cut)
    await_first_checkpoint(cut)
    process.kill()
    process.wait()
    assert [search_of_two(folder).wait() for folder in (cut, whole)] == [0, 0]
    assert [row["attempts"] for row in rows_of(cut)] == ["2", "1"]
    check_equal_ends(cut, whole)


@pytest.mark.slow
def test_a_preempted_training_run_goes_on_from_its_checkpoint(
    search_of_two: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    """As a cluster takes a machine back: after a whole step, by the name of its signal, in a job that starts again."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = search_of_two(cut, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    await_first_checkpoint(cut)
    jobs = subprocess.run(["pgrep", "-f", f"submitit.core._submit {cut}"], capture_output=True, text=True, check=True)
    for job in jobs.stdout.split():
        os.kill(int(job), signal.SIGUSR2)
    assert process.wait() == 0
    assert [row["attempts"] for row in rows_of(cut)] == ["1", "1"], "a preemption is no fault of the trial"
    assert search_of_two(whole).wait() == 0
    check_equal_ends(cut, whole)


@pytest.mark.slow
def test_temperature_and_weights_runs(
    distill: Callable[..., Any], require_data: Callable[..., Path], repository: Path, tmp_path: Path
) -> None:
    require_data("mnist")
    done = distill(
        "train", "-m", "hparams_search=temperature_and_weights", "trainer=smoke", "student.hidden=[8]",
        f"teacher.path='{repository}/experiments/teachers/mnist'", "hydra.sweeper.n_trials=2", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "outputs" / "temperature_and_weights")
    assert [row["state"] for row in rows] == ["complete"] * 2
    assert float(rows[0]["param:method.temperature"]) == 4.0, "the point given by hand comes first"


def test_chain_ablation_runs(distill: Callable[..., Any], tmp_path: Path) -> None:
    done = distill(
        "train", "-m", "hparams_search=chain_ablation", "trainer=smoke", "data.num_train=200", "data.num_val=8",
        "evaluation.val_problems=4", "trainer.max_steps=choice(2,3)",
        "hydra.sweeper.n_trials=2", "hydra.sweeper.seeds=[0,1]", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "outputs" / "chain_ablation")
    assert all(row["seeds"] == "0 1" for row in rows)
    for row in rows:
        has_chain = row["param:data.trace_format"] in ("chain_then_answer", "answer_then_chain")
        assert bool(row["param:data.prompt_loss_weight"]) == has_chain, "a weight only where there is a chain"
        progress = json.loads((Path(row["folder"]) / "seed_0" / "progress.json").read_text())
        assert progress["step"] == int(row["param:trainer.max_steps"]), "the steps are searched too"


@pytest.mark.slow
def test_divergence_and_share_runs(distill: Callable[..., Any], tmp_path: Path) -> None:
    small = ("data.num_train=64", "data.num_val=4", "data.num_test=0", "student.hidden_size=16", "student.num_layers=1")
    for name in ("base", "teacher"):
        done = distill(
            "train", "experiment=sum3_base", "trainer=smoke", *small, "evaluation.splits=[val]",
            f"hydra.run.dir={name}", cwd=tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
    done = distill(
        "traces", "task=sum3", "template=plain", "source=reference", "data.num_problems=80", "filter=none",
        "explorer=false", "store=traces", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    done = distill(
        "train", "-m", "hparams_search=divergence_and_share", "trainer=smoke", *small, "init_from=base",
        "teacher.path=teacher", "data.store=traces", "data.num_prompts=8", "data.num_stored=8", "preflight=skip",
        "hydra.sweeper.n_trials=3", "hydra.sweeper.fixed={trainer.max_steps: 50}", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    folder = tmp_path / "outputs" / "divergence_and_share"
    rows = rows_of(folder)
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert all(float(row["cost/flops"]) > 0 for row in rows)
    for row in rows:
        is_jsd = row["param:method.divergence"] == "normalised_jsd"
        assert bool(row.get("param:method.teacher_mixture_weight")) == is_jsd
    solutions = yaml.safe_load((folder / "optimization_results.yaml").read_text())["solutions"]
    assert solutions and len(list(folder.glob("pareto_*.yaml"))) == len(solutions)


@pytest.mark.slow
def test_a_study_of_sweeps_records_what_each_search_found(
    distill: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """`command: sweep`: every cell is a whole search, which a kill of the study does not begin again."""
    folder = tmp_path / "experiments" / "searches"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(f"""
study: searches
command: sweep
claim: none
question: Does TPE find more than random search?
base: [hydra/sweeper=optuna_study, {", ".join(f'"{one}"' for one in tiny)}, logger=none, "evaluation.splits=[val]",
       "hydra.sweeper.params={{optimizer.lr: 'tag(log,interval(1e-4,1e-1))', scheduler: 'choice(constant,cosine)'}}",
       hydra.sweeper.n_trials=3,
       "hydra.sweeper.sampler.seed={{seed}}", threads=1]
arms:
  tpe: [hydra/sweeper/study_sampler=tpe, hydra.sweeper.sampler.n_startup_trials=1]
  random: [hydra/sweeper/study_sampler=random]
seeds: [0, 1]
metric: search/best
lower_is_better: true
comparison: {{kind: difference, baseline: random, treatment: tpe}}
curves: [{{metric: search/best, against: flops}}]
published: {{source: none}}
budget: {{trials: 3}}
""")
    done = distill("study", str(folder), cwd=tmp_path)
    assert done.code == 0, done.err
    runs = tmp_path / "outputs" / "studies" / "searches" / "runs"
    record = read_record(runs / "tpe" / "seed=1" / "run.json")
    rows = rows_of(runs / "tpe" / "seed=1" / "sweep")
    assert [row["state"] for row in rows] == ["complete"] * 3
    best = min(rows, key=lambda row: float(row["value"]))
    assert record.metrics["search/best"] == float(best["value"])
    assert record.metrics["search/optimizer.lr"] == float(best["param:optimizer.lr"])
    tried = [row["param:scheduler"] for row in rows]
    for name in set(tried):
        assert record.metrics[f"search/trials/scheduler={name}"] == tried.count(name) / 3
        assert record.metrics.get(f"search/best/scheduler={name}", 0.0) == float(name == best["param:scheduler"])
    parts = [read_record(runs / "tpe/seed=1/sweep" / str(n) / "run.json").ledger["student_update"] for n in range(3)]
    assert record.ledger["student_update"]["flops"] == sum(part["flops"] or 0 for part in parts)
    curve = (runs / "tpe" / "seed=1" / "curve.csv").read_text().splitlines()
    assert len(curve) == 4 and float(curve[-1].split(",")[1]) == record.ledger["student_update"]["flops"]
    first = {s: rows_of(runs / "random" / f"seed={s}" / "sweep")[0]["param:optimizer.lr"] for s in (0, 1)}
    assert first[0] != first[1], "every seed of the study has a sampler of its own"
    before = (runs / "tpe/seed=1/run.json").stat().st_mtime_ns
    again = distill("study", str(folder), cwd=tmp_path)
    assert again.code == 0 and (runs / "tpe/seed=1/run.json").stat().st_mtime_ns == before
