"""Every command line that the project writes down, in its README, its help and its YAML headers, still works."""

import functools
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from research.commands.main import COMMANDS
from research.results.study import cells
from research.results.study_file import read_study

REPOSITORY = Path(__file__).parents[2]
FILE = re.compile(r"```yaml\n(# [^\n]*\.yaml[^\n]*\n.*?)```", re.DOTALL)
SHELL = re.compile(r"```(?:bash|sh|console|shell)\n(.*?)```", re.DOTALL)


def shell_lines(path: Path) -> Iterator[str]:
    """Lines of the fenced shell blocks of a Markdown file, continued ones joined, comments and prompts cut off."""
    for block in SHELL.findall(path.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
            if command:
                yield command


def documents() -> list[Path]:
    return sorted(
        {*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("experiments/*/README.md")}
    )


def documented() -> Iterator[tuple[str, str]]:
    """(where it stands, command line) of everything that begins with `distill` or `make`."""
    for path in dict.fromkeys(documents()):
        for line in shell_lines(path):
            for part in re.split(r"\s&&\s|;\s", line):
                if part.startswith(("distill ", "make ")):
                    yield str(path.relative_to(REPOSITORY)), part
    for command in COMMANDS:
        for line in (importlib.import_module(f"research.commands.{command}").__doc__ or "").splitlines():
            if line.startswith("  distill "):
                text = re.split(r"\s{2,}", line.strip())[0]
                for part in text.split(" | "):
                    yield f"distill {command} --help", part if part.startswith("distill") else f"distill train {part}"
    for path in [*REPOSITORY.glob("conf/experiment/*.yaml"), *REPOSITORY.glob("experiments/*/study.yaml")]:
        for line in path.read_text().splitlines():
            if found := re.match(r"# (?:Command)?\s+((?:distill|make) .*)$", line):
                yield str(path.relative_to(REPOSITORY)), found[1]


LINES = list(dict.fromkeys(documented()))


def test_the_readme_shows_commands() -> None:
    """Nothing is checked below of a README that shows none."""
    shown = [line for where, line in LINES if where == "README.md"]
    assert any(line.startswith("make demo") for line in shown) and any(line.startswith("distill ") for line in shown)


@pytest.mark.parametrize(("where", "line"), [(w, line) for w, line in LINES if line.startswith("make ")])
def test_documented_make_targets_exist(where: str, line: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in line.split()[1:] if "=" not in word} <= targets, f"{where}: {line}"


@pytest.fixture(scope="module")
def checkout_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkout; for a page that shows YAML files, which open with their paths, one that holds them."""

    @functools.cache
    def place(where: str) -> Path:
        shown = FILE.findall((REPOSITORY / where).read_text()) if where.endswith(".md") else []
        if not shown:
            return REPOSITORY
        folder = tmp_path_factory.mktemp("checkout")
        for path in [*REPOSITORY.glob("[!.]*"), *REPOSITORY.glob("experiments/*")]:
            if path.name != "experiments":
                (folder / path.relative_to(REPOSITORY)).parent.mkdir(exist_ok=True)
                (folder / path.relative_to(REPOSITORY)).symlink_to(path)
        for text in shown:
            for name in re.findall(r"[\w./-]+\.yaml", text.partition("\n")[0]):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        return folder

    return place


@pytest.mark.parametrize(("where", "line"), [(w, line) for w, line in LINES if line.startswith("distill ")])
def test_documented_commands_compose(
    where: str, line: str, distill: Callable[..., Any], checkout_with: Callable[[str], Path]
) -> None:
    """Composed from the checkout; placeholders such as RUN are folders that the reader has."""
    words, place = shlex.split(line)[1:], checkout_with(where)
    if words[0] not in COMMANDS:
        assert distill(*words, cwd=place).code == 0, f"{where}: {line}"
        return
    if words[0] in ("study", "report") and len(words) > 1 and "=" not in words[1]:
        found = list((place / words[1]).rglob("study.yaml"))
        made = words[0] == "report" and words[1].startswith("outputs/")  # by the command that stands before it
        assert found or made or words[1].isupper(), f"{where}: {line}"
    if any(word.startswith("experiment=outputs/") for word in words):
        return  # a file that the command before it leaves; test_searches.py runs such a one
    printing = [] if {"--cfg", "--help", "-h", "--info"} & set(words) else ["--cfg", "job"]
    if "-m" in words or "--multirun" in words:  # one value of each sweep stands for all
        kept = [word for word in words if not word.startswith(("-", "hydra")) and not re.search(r"=\w+\(", word)]
        words = [re.sub(r"^([^=]*=)(\[[^\]]*\]|[^\[{'\",]*),.*$", r"\1\2", word) for word in kept]
    done = distill(*words, *printing, cwd=place)
    assert done.code == 0, f"{where}: {line}\n{done.err}"


@pytest.mark.parametrize("where", ["docs/studies.md", "docs/own_data.md"])
def test_the_studies_that_pages_show_are_read(where: str, checkout_with: Callable[[str], Path]) -> None:
    experiments = checkout_with(where) / "experiments"
    shown = [folder for folder in experiments.iterdir() if folder.is_dir() and not folder.is_symlink()]
    assert len(shown) == 1 and len(cells(read_study(shown[0]))) >= 18
