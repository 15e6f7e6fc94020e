"""Every notebook runs from top to bottom, was committed with its outputs, and defines nothing."""

import ast
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def _text(outputs: list) -> str:
    """What a cell printed or displayed as text; pictures are compared by being there."""
    parts = []
    for output in outputs:
        if output["output_type"] == "stream":
            parts.append(output["text"])
        elif "text/markdown" in output.get("data", {}):
            parts.append(output["data"]["text/markdown"])
    return "".join(parts)


def test_there_is_a_notebook_for_each_method() -> None:
    assert [path.name for path in NOTEBOOKS] == ["01_soft_targets.ipynb", "02_traces.ipynb", "03_on_policy.ipynb"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_says_what_was_committed(path: Path, require_data: Callable[..., Path]) -> None:
    if "RESEARCH_DATA_DIR" in path.read_text():
        require_data("traces")  # committed with the real traces at hand
    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        if new.cell_type != "code":
            continue
        assert _text(old.outputs) == _text(new.outputs), new.source
        pictures = [[o for o in cell.outputs if "image/png" in o.get("data", {})] for cell in (old, new)]
        assert len(pictures[0]) == len(pictures[1]), new.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defines_nothing_and_matches_its_source(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    for source in code:
        defined = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
        assert not defined, source
    script = path.with_suffix(".py").read_text()
    for source in code:
        assert source.strip() in script, source
