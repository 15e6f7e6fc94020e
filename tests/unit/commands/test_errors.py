"""What a user can do wrong: one line each, with what was given and what is valid, and an exit code other than 0."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import research.errors as errors

FEW = "data.num_train=8 data.num_val=2 data.num_test=2"
# command line -> parts that its one line of error must hold; exit code 2: the config does not compose
NOT_COMPOSED: dict[str, tuple[str, ...]] = {
    "trian": ("no command 'trian'", "nearest valid: distill train", "cache, traces, evaluate, convert, study, report"),
    "--verison": ("no command '--verison'", "Commands: train"),
    "train sede=3": ("unknown key 'sede'", "nearest valid: seed", "Valid keys: name, seed"),
    "train ~nope": ("unknown key 'nope'", "Valid keys: name"),
    "train data.batch_sise=3": ("unknown key 'data.batch_sise'", "nearest valid: data.batch_size", "under data:"),
    "train student.hiden=[3]": ("unknown key 'student.hiden'", "nearest valid: student.hidden"),
    "train optimizer.weigth_decay=1": ("unknown key 'optimizer.weigth_decay'", "nearest valid: optimizer.weight_decay"),
    "train scheduler.warmup=1": ("unknown key 'scheduler.warmup'", "nearest valid: scheduler.warmup_fraction"),
    "train trainer.max_epoch=3": ("unknown key 'trainer.max_epoch'", "nearest valid: trainer.max_epochs"),
    "train logger.nmae=3": ("unknown key 'logger.nmae'", "nearest valid: logger.name"),
    "train evaluation.split=test": ("unknown key 'evaluation.split'", "nearest valid: evaluation.splits"),
    "train paths.output=x": ("unknown key 'paths.output'", "nearest valid: paths.output_dir"),
    "train method.temprature=3": ("nearest valid: method.temperature, a key of ", "label_smoothing"),
    "train temperature=3 method=soft_target": ("unknown key 'temperature'", "nearest valid: method.temperature"),
    "train teacher.pth=x teacher=frozen": ("unknown key 'teacher.pth'", "nearest valid: teacher.path"),
    "train signal_transform.scop=x signal_transform=permuted": ("nearest valid: signal_transform.scope",),
    "train reference.pth=x teacher@reference=frozen": ("nearest valid: reference.path",),
    "traces generator=server generator.extra_body={top_k:1}": (
        "generator.extra_body holds no keys yet; add one with +generator.extra_body.top_k=...",
    ),
    "train hydra.foo=1": ("unknown key 'hydra.foo'", "Valid keys under hydra"),
    "train method=softtarget": ("no method 'softtarget'", "nearest valid: soft_target", "logit_matching"),
    "train data=mnits": ("no data 'mnits'", "nearest valid: mnist", "digits"),
    "train model@student=mpl": ("no model 'mpl'", "nearest valid: mlp"),
    "train experiment=mnist_sof": ("no experiment 'mnist_sof'", "nearest valid: mnist_soft_target"),
    "train experiment=nothere.yaml": ("experiment=nothere.yaml: there is no such file here", "by name: ", "mnist_hard"),
    "train debug=slow": ("no debug 'slow'", "fast, overfit, profile"),
    "train hydra/launcher=submitit": ("no hydra/launcher 'submitit'", "basic"),
    "train model=mlp": ("'model' is no group", "model@student"),
    "train student=pretrained_lm student.path=x": (
        "student is 'pretrained_lm', expected a model; write model@student=pretrained_lm",
    ),
    "train reference.path=x reference=frozen": (
        "reference is 'frozen', expected a teacher; write teacher@reference=frozen",
    ),
    "train teacher@nope=frozen": ("'teacher@nope' is no group", "teacher@reference"),
    "cache experiment=mnist_hard": ("'experiment' is no group of `distill cache`", "--help"),
    "train data=null": ("data is 'null'", "choose one", "digits, mnist, prompts, spoken_digits"),
    "train seed": ("cannot read 'seed'", "key=value"),
    "train =3": ("cannot read '=3'", "key=value"),
    "train seed=[1": ("cannot read 'seed=[1'", "key=value"),
    "train seed=": ("seed=", "could not be converted to Integer"),
    "train seed=x": ("seed=x", "could not be converted to Integer"),
    "train seed=1.5": ("seed=1.5", "could not be converted to Integer"),
    "train seed=null": ("seed=null", "not Optional"),
    "train threads=many": ("threads=many", "could not be converted to Integer"),
    "train tags=a": ("tags=a", "Invalid value assigned"),
    "train seed=1,2": ("'seed=1,2' holds several values", "-m"),
    "train --config-name=nope": ("Cannot find primary config 'nope'",),
    "train --config-dir=/nope": ("'/nope' not found",),
    "cache nope=1": ("unknown key 'nope'", "Valid keys: name, seed, data, teacher"),
    "evaluate nope=1": ("unknown key 'nope'", "Valid keys: name, seed, run"),
    "evaluate somewhere data.test_shift_pixels=2": ("add one with +data.test_shift_pixels=",),
    "evaluate somewhere split": ("cannot read 'split'",),
    "study nope=1": ("unknown key 'nope'", "Valid keys: name, folder"),
    "report nope=1": ("unknown key 'nope'", "Valid keys: name, folder"),
}

# exit code 1: the config composes, and the command refuses it
REFUSED: dict[str, tuple[str, ...]] = {
    "train +foo=1": ("unknown key foo", "Valid keys: name"),
    "train +evaluation.foo=1": ("unknown key evaluation.foo", "splits"),
    "train +data.batch_sise=3": ("unknown key data.batch_sise", "nearest valid: data.batch_size"),
    "train +student.hiden=[3]": ("unknown key student.hiden", "nearest valid: student.hidden"),
    "train +student.trust_remote_code=true": ("unknown key student.trust_remote_code",),
    "train +trainer.callbacks=[1]": ("trainer.callbacks is set by the run itself",),
    "train +evaluation.variants.x.foo=3": ("unknown key data.foo",),
    "train ~seed": ("the key seed was deleted",),
    "train ~student.hidden": ("student.hidden is not set",),
    "train student=pretrained_lm": ("student is 'pretrained_lm', expected a model; write model@student=pretrained_lm",),
    "train reference=outputs/teacher": ("reference is 'outputs/teacher'", "write teacher@reference=NAME"),
    "train teacher_template=think": ("expected a template; write template@teacher_template=think",),
    "train student.hidden=3": ("student.hidden is 3 (int); expected a list of int",),
    "train student.hidden=[]": ("hidden is []",),
    "train student.dropout=2": ("dropout is 2", "[0, 1)"),
    "train data.batch_size=abc": ("data.batch_size is 'abc' (str); expected int",),
    "train data.batch_size=0": ("batch_size=0", "at least 1"),
    "train data.fraction=0": ("fraction=0", "(0, 1]"),
    "train data.holdout=-4": ("holdout=-4",),
    "train optimizer.lr=fast": ("optimizer.lr is 'fast' (str); expected float",),
    "train optimizer.lr=-1": ("Invalid learning rate: -1",),
    "train scheduler.warmup_fraction=3": ("warmup_fraction is 3", "[0, 1)"),
    "train trainer.max_epochs=abc": ("trainer.max_epochs is 'abc' (str); expected int or null",),
    "train trainer.profiler=foo": ("simple", "advanced"),
    "train trainer.accelerator=foo": ("accelerator='foo'", "cpu"),
    "train trainer.precision=16-bit": ("trainer.precision is '16-bit'", "bf16-mixed"),
    "train trainer.max_steps=-5": ("max_steps", "-5"),
    "train trainer.val_check_interval=0": ("trainer.val_check_interval is 0", "trainer.limit_val_batches=0"),
    "train trainer.check_val_every_n_epoch=0": ("trainer.check_val_every_n_epoch is 0", "limit_val_batches=0"),
    "train trainer.accumulate_grad_batches=0": ("trainer.accumulate_grad_batches is 0; expected at least 1",),
    "train trainer.gradient_clip_val=-1": ("trainer.gradient_clip_val is -1; expected 0 or more",),
    f"train experiment=sum8_trace {FEW} evaluation.num_samples=-1": ("evaluation.num_samples is -1; expected 0",),
    f"train experiment=sum8_trace {FEW} evaluation.sampling_temperature=-1": (
        "evaluation.sampling_temperature is -1.0; expected 0 (greedy) or a positive number",
    ),
    f"train experiment=sum8_trace {FEW} evaluation.max_new_tokens=0": ("evaluation.max_new_tokens is 0; expected at",),
    "train threads=0": ("threads is 0; expected at least 1",),
    "train name=a/b": ("a/b",),
    "train monitor=val/erors": ("monitor is 'val/erors'", "val/errors"),
    "train experiment=sum8_trace signal_transform=permuted": (
        "signal_transform is PermutedWrongClasses",
        "of classifiers' signals",
        "signal_transform=none",
    ),
    "train evaluation.weights=bst": ("evaluation.weights is 'bst'", "nearest valid: best"),
    "train evaluation.splits=[tset]": ("evaluation.splits is 'tset'", "nearest valid: test"),
    "train evaluation.splits=[val] data.holdout=0": ("evaluation.splits", "data.holdout is 0"),
    "train evaluation.bias_classes=[3] data.holdout=0": ("evaluation.bias_classes", "data.holdout is 0"),
    "train evaluation.bias_classes=[77]": ("evaluation.bias_classes is [77]", "0 to 9"),
    "train ckpt_path=nope.ckpt": ("ckpt_path is nope.ckpt, which does not exist",),
    "train method=soft_target": ("needs a teacher", "teacher=frozen"),
    "train teacher=frozen": ("teacher.path is not set",),
    "train teacher=frozen teacher.path=/nope": ("/nope", "run folder"),
    "train teacher=cached teacher.path=/nope": ("/nope", "distill cache"),
    "train teacher=ensemble": ("teacher.paths is empty",),
    "train signal_transform=permuted": ("signal_transform needs a teacher",),
    "train signal_transform=virtual": ("signal_transform.temperature", "method.temperature"),
    "train data._target_=null": ("data._target_ is None",),
    "train method._target_=os.system": ("method._target_ is 'os.system'", "expected something under"),
    "train student._target_=os.system": ("student._target_ is 'os.system'",),
    "train optimizer._target_=torch.optim.Adamm": ("optimizer._target_ is 'torch.optim.Adamm'", "does not exist"),
    "train paths.output_dir=/proc/nowhere": ("/proc/nowhere",),
    "train --resolve": ("--resolve", "--cfg"),
    "train logger.api_key=hunter2": ("logger.api_key is a secret", "environment"),
    "cache": ("teacher.path is not set",),
    "cache teacher=none": ("needs a teacher", "teacher=frozen"),
    "traces source=reference task=lookup template=plain data.num_problems=100000": (
        "data.num_problems is 100000, and of lookup",
        "the split 'train' holds only",
    ),
    "cache split=dev": ("split is 'dev'", "train, val, test"),
    "cache shard_rows=0": ("shard_rows is 0",),
    "evaluate": ("run is not set", "distill evaluate run="),
    "evaluate nowhere": ("run is nowhere", "no run.json"),
    "evaluate nowhere split=tset": ("split is 'tset'", "nearest valid: test"),
    "study": ("which study? give its folder", "none here"),
    "study folder=3": ("folder is 3 (int): expected a study's folder",),
    "study nowhere": ("nowhere holds no study.yaml",),
    "report nowhere": ("nowhere holds no study.yaml",),
}


def check(line: str, parts: tuple[str, ...], code: int, distill: Callable[..., Any], folder: Path) -> None:
    done = distill(*line.split(), cwd=folder)
    for part in parts:
        assert part in done.error, f"{part!r} is not in: {done.error}"
    assert done.code == code
    assert "Traceback" not in done.err and done.out == ""


@pytest.mark.parametrize("line", NOT_COMPOSED)
def test_p111_a_line_that_does_not_compose(line: str, distill: Callable[..., Any], tmp_path: Path) -> None:
    check(line, NOT_COMPOSED[line], 2, distill, tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing was run, so no folder is left"


@pytest.mark.parametrize("line", REFUSED)
def test_p111_a_config_that_a_command_refuses(line: str, distill: Callable[..., Any], tmp_path: Path) -> None:
    check(line, REFUSED[line], 1, distill, tmp_path)


def test_a_sweep_is_composed_whole_before_its_first_job(distill: Callable[..., Any], tmp_path: Path) -> None:
    check("train -m seed=0,x", ("seed=x", "could not be converted to Integer"), 2, distill, tmp_path)
    assert list(tmp_path.rglob("run.json")) == []


SOFT: dict[str, tuple[str, ...]] = {
    "method.temperature=0": ("method.temperature is 0", "positive"),
    "method.temperature=-1": ("method.temperature is -1",),
    "method.temperature=inf": ("method.temperature is inf", "finite"),
    "method.temperature=hot": ("method.temperature is 'hot' (str); expected float",),
    "method.hard_weight=-1": ("method.hard_weight is -1",),
    "method.soft_weight=0": ("both 0",),
    "method.divergence=kl": ("'kl'", "forward_kl"),
}


@pytest.mark.parametrize("override", SOFT)
def test_soft_targets_out_of_range(
    override: str, distill: Callable[..., Any], digits_teacher: Path, tmp_path: Path
) -> None:
    soft = ["method=soft_target", "teacher=frozen", f"teacher.path='{digits_teacher}'"]
    done = distill("train", *soft, override, cwd=tmp_path)
    assert done.code == 1
    for part in SOFT[override]:
        assert part in done.error, done.error


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_absent_logger_names_its_extra(name: str, distill: Callable[..., Any], tmp_path: Path) -> None:
    if _is_installed(name):
        pytest.skip(f"{name} is installed here, so nothing is absent")
    done = distill("train", f"logger={name}", "trainer=smoke", cwd=tmp_path)
    assert f"logger={name} needs a package that is not installed" in done.error
    assert f"research-distillation[{name}]" in done.error and done.code == 1


def _is_installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_gpu_that_is_not_there(distill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = distill("train", "trainer=gpu", cwd=tmp_path)
    assert done.error == "trainer.accelerator is 'gpu', but torch finds no GPU on this machine; give trainer=cpu"


@pytest.fixture
def own_configs(tmp_path: Path) -> Callable[[str], str]:
    """`--config-dir` with an experiment of this text, as a user would add one."""

    def written(text: str) -> str:
        (tmp_path / "own" / "experiment").mkdir(parents=True)
        (tmp_path / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        return f"--config-dir={tmp_path}/own"

    return written


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sede: 3", ("unknown key 'sede' in conf/experiment/mine.yaml", "nearest valid: seed")),
        ("evaluation: {split: [test]}", ("unknown key 'evaluation.split' in", "nearest valid: evaluation.splits")),
        ("data: {batch_sise: 3}", ("unknown key data.batch_sise", "nearest valid: data.batch_size")),
        ("student: {hiden: [3]}", ("unknown key student.hiden", "nearest valid: student.hidden")),
        ("method: {temprature: 3}", ("unknown key method.temprature", "label_smoothing")),
        ("optimizer: {beta: 3}", ("unknown key optimizer.beta", "nearest valid: optimizer.betas")),
        ("scheduler: {warmup: 3}", ("unknown key scheduler.warmup", "nearest valid: scheduler.warmup_fraction")),
        ("trainer: {max_epoch: 3}", ("unknown key trainer.max_epoch", "nearest valid: trainer.max_epochs")),
        ("logger: {nmae: 3}", ("unknown key logger.nmae", "nearest valid: logger.name")),
        ("defaults: [{override /data: mnits}]", ("no data 'mnits'", "nearest valid: mnist")),
        ("seed: x", ("could not be converted to Integer",)),
        ("logger: {token: hunter2}", ("logger.token is a secret",)),
        ("data: {_target_: os.system}", ("data._target_ is 'os.system'",)),
    ],
)
def test_p111_a_typing_error_in_a_file(
    text: str, parts: tuple[str, ...], own_configs: Callable[[str], str], distill: Callable[..., Any], tmp_path: Path
) -> None:
    done = distill("train", own_configs(text), "experiment=mine", cwd=tmp_path)
    for part in parts:
        assert part in done.error, done.error
    hidden = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file() and "hunter2" in path.read_text()]
    assert hidden == [], "what Hydra had written was masked"


def test_the_whole_trace_is_one_variable_away(
    distill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="batch_size=0"):
        distill("train", "data.batch_size=0", cwd=tmp_path)


def test_the_trace_stands_in_the_log(distill: Callable[..., Any], tmp_path: Path) -> None:
    distill("train", "data.batch_size=0", "hydra.run.dir=run", cwd=tmp_path)
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


OWN_ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("flags", [(), ("-m", "seed=3")], ids=["run", "multirun"])
@pytest.mark.parametrize("kind", OWN_ERRORS, ids=lambda kind: kind.__name__)
def test_the_message_of_every_own_error_stands_alone(
    kind: type[Exception],
    flags: tuple[str, ...],
    distill: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_stop = kind is errors.Preempted

    def failing(cfg: Any) -> None:
        raise kind("told once", *[143] * is_stop) from OSError("and why")

    monkeypatch.setattr("research.commands.train.task", failing)
    done = distill("train", *flags, cwd=tmp_path)
    assert done.err.splitlines()[-1] == ("error: stopped: told once" if is_stop else "error: told once")
    assert "Traceback" not in done.err and done.code == (143 if is_stop else 1)


def test_a_failing_job_of_a_multirun_is_named(distill: Callable[..., Any], tmp_path: Path) -> None:
    done = distill("train", "-m", "data.batch_size=0,-1", cwd=tmp_path)
    assert done.code == 1
    assert "data.batch_size=0" in done.err and done.err.splitlines()[-1].startswith("error: batch_size=0")
    assert "Traceback" not in done.err
