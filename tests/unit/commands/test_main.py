"""The front door: help that teaches, names for folders, masked printing, and the process left as it was found."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from research.commands.main import COMMANDS, _named
from research.schemas import SCHEMAS


def test_the_overview_names_every_command(distill: Callable[..., Any], tmp_path: Path) -> None:
    for call in ([], ["--help"], ["-h"], ["help"]):
        done = distill(*call, cwd=tmp_path)
        assert done.code == 0 and all(f"  {command}: " in done.out for command in COMMANDS)


def test_version(distill: Callable[..., Any], tmp_path: Path) -> None:
    assert distill("--version", cwd=tmp_path).out.startswith("distill 0.")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_command_teaches_it(command: str, flag: str, distill: Callable[..., Any], tmp_path: Path) -> None:
    done = distill(command, flag, cwd=tmp_path)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith(f"distill {command}: ") and f"\n  distill {command} " in done.out, "it shows examples"
    keys = next(line for line in done.out.splitlines() if line.startswith("Keys: "))
    assert all(f"{key}" in keys for key in SCHEMAS[command].__dataclass_fields__)
    assert "--cfg job --resolve" in done.out and "HYDRA_FULL_ERROR" in done.out


def test_the_help_of_train_lists_every_choice(distill: Callable[..., Any], tmp_path: Path, repository: Path) -> None:
    out = distill("train", "--help", cwd=tmp_path).out
    for path in (repository / "conf").glob("*/*.yaml"):
        if path.parent.name not in ("paths", "hydra", "generator", "filter"):  # the last two are of `distill traces`
            line = next(line for line in out.splitlines() if line.strip().startswith(path.parent.name))
            assert path.stem in line


@pytest.mark.parametrize("command", COMMANDS)
def test_the_config_can_be_printed(command: str, distill: Callable[..., Any], tmp_path: Path) -> None:
    done = distill(command, "--cfg", "job", "--resolve", cwd=tmp_path)
    assert done.code == 0 and list(OmegaConf.create(done.out)) == list(SCHEMAS[command].__dataclass_fields__)
    assert list(tmp_path.iterdir()) == [], "printing runs nothing"


def test_info(distill: Callable[..., Any], tmp_path: Path) -> None:
    assert "Defaults List" in distill("train", "--info", "defaults", cwd=tmp_path).out
    assert "Config search path" in distill("train", "--info", cwd=tmp_path).out


def test_p116_printing_masks_what_the_environment_resolves_to(
    distill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "hunter2hunter2")
    for flags in (["--cfg", "job", "--resolve"], ["--cfg", "all"], ["-c", "job", "--resolve"], ["--info", "config"]):
        done = distill("train", *flags, "+logger.api_key=${oc.env:SOME_KEY}", cwd=tmp_path)
        assert done.code == 0 and "hunter2" not in done.out + done.err


@pytest.mark.parametrize("line", ["--help", "--version", "train --help", "train --cfg job"])
def test_a_reader_that_has_gone_ends_it_quietly(line: str, tmp_path: Path) -> None:
    program = "from research.commands.main import main; main()"
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", program, *line.split()],
            stdout=out,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_pipe_that_breaks_elsewhere_is_told(
    distill: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(cfg: Any) -> None:
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr("research.commands.train.task", broken)
    done = distill("train", cwd=tmp_path)
    assert done.code == 1 and done.error == "a worker has gone"


def test_wrong_flags_show_the_right_ones(distill: Callable[..., Any], tmp_path: Path) -> None:
    done = distill("train", "--nope", cwd=tmp_path)
    assert done.code == 2 and "unrecognized arguments: --nope" in done.err and "--multirun" in done.err


def test_folders_need_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _named("study", ["experiments/x/", "preset=smoke"]) == ["folder='experiments/x'", "preset=smoke"]
    assert _named("report", ["experiments/it's"]) == [r"folder='experiments/it\'s'"]
    assert _named("evaluate", ["/"]) == ["run='/'"]
    assert _named("evaluate", ["run=x"]) == ["run=x"]
    assert _named("study", ["a", "b/", "preset=smoke"]) == ["folder=['a','b']", "preset=smoke"]
    assert _named("evaluate", ["a", "b"]) == ["run='a'", "b"], "one run"
    assert _named("study", ["--help"]) == ["--help"] and _named("study", []) == []
    assert _named("train", ["x"]) == ["x"], "train takes no folder"


def test_the_folder_of_a_cell_has_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "soft" / "seed=0").mkdir(parents=True)
    assert _named("evaluate", ["soft/seed=0"]) == ["run='soft/seed=0'"]
    assert _named("evaluate", ["soft/seed=1"]) == ["soft/seed=1"]


def test_the_process_is_left_as_it_was(distill: Callable[..., Any], tmp_path: Path) -> None:
    distill("train", "data.batch_size=0", cwd=tmp_path)  # what libraries set at their first import is theirs
    before, environment = list(sys.argv), dict(os.environ)
    distill("train", "sede=3", cwd=tmp_path)
    distill("train", "data.batch_size=0", cwd=tmp_path)
    assert sys.argv == before and dict(os.environ) == environment
