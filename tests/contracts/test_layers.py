"""Imports go down only: the table of layers, read from the source, and what the light commands really load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "research"

# Rooms and single modules, from the bottom up. A module imports its own layer and those above it in this list, except
# where two rooms of one layer are kept apart below.
LAYERS = (
    ("errors", "records", "seeding"),
    ("losses", "metrics"),
    ("schemas", "arguments"),
    ("text", "models", "tasks"),
    ("teachers", "traces", "generation"),
    ("data",),
    ("methods",),
    ("results",),
    ("evaluation",),
    ("loops",),
    ("config",),
    ("sweeps",),
    ("commands",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# data knows nothing of teachers, although it stands above them
FORBIDDEN = {("data", "teachers"), ("data", "models"), ("losses", "metrics")}
LEAF_LIBRARIES = {"torch", "torchmetrics", "scipy", "numpy"}
HYDRA_ROOMS = {"config", "schemas", "sweeps", "commands"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {("pickle", "load"), ("pickle", "loads"), ("os", "system"), ("joblib", "load")}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, with full name."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            yield node.module or ""


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def test_p124_every_module_has_a_layer() -> None:
    assert {room_of(path) for path in modules()} <= set(LEVEL)


def test_p124_imports_go_down_only() -> None:
    for path in modules():
        room = room_of(path)
        for name in imports(path):
            head, _, rest = name.partition(".")
            if head != "research" or not rest:
                continue
            below = rest.partition(".")[0]
            assert LEVEL[below] <= LEVEL[room], f"{path} imports {name}, which stands above it"
            assert (room, below) not in FORBIDDEN, f"{path}: {room} must not know {below}"
            assert below != "commands" or room == "commands", f"{path}: nobody imports a command"


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_p124_libraries_stay_in_their_rooms(room: str) -> None:
    libraries = {name.partition(".")[0] for path in modules() if room_of(path) == room for name in imports(path)}
    if room in ("records", "seeding", "losses", "metrics"):
        assert libraries - set(sys.stdlib_module_names) <= LEAF_LIBRARIES | {"research"}
    if room not in HYDRA_ROOMS:
        assert not libraries & {"hydra", "omegaconf"}, f"{room} knows Hydra"
    if room == "results":
        assert not libraries & {"torch", "lightning", "torchmetrics"}, "results are built without torch"
    if room in ("teachers", "models"):
        assert "lightning" not in libraries
    if room not in ("models", "text", "generation"):
        assert "transformers" not in libraries


def test_p124_no_drawers() -> None:
    """A module is named after what it holds."""
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert not drawers & {part.removesuffix(".py") for path in modules() for part in path.relative_to(PACKAGE).parts}


def test_init_files_are_empty() -> None:
    """Importing a leaf loads the leaf."""
    rooms = [path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    assert rooms and all(path.read_text() == "" for path in rooms)


def test_p124_classes_are_two_deep() -> None:
    """A class of the package is abstract, or final: nothing derives from a class that itself derives from ours."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }

    def depth(name: str) -> int:
        return 1 + max((depth(base) for base in bases[name] if base in bases), default=0)

    assert {name: depth(name) for name in bases if depth(name) > 2} == {}


def test_p73_no_text_becomes_code() -> None:
    for path in modules():
        for call in calls(path):
            if isinstance(call.func, ast.Name):
                assert call.func.id not in FORBIDDEN_CALLS, f"{path}:{call.lineno}"
            if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
                assert (call.func.value.id, call.func.attr) not in FORBIDDEN_METHODS, f"{path}:{call.lineno}"


def test_checkpoints_are_read_as_plain_tensors() -> None:
    """P89: every torch.load says weights_only=True; shells are never started through a string."""
    for path in modules():
        for call in calls(path):
            named = {keyword.arg: keyword.value for keyword in call.keywords}
            if ast.unparse(call.func) == "torch.load":
                assert ast.unparse(named["weights_only"]) == "True", f"{path}:{call.lineno}"
            assert "shell" not in named, f"{path}:{call.lineno}"


def test_p79_no_assert_guards_a_user() -> None:
    """`python -O` drops assert statements, so validation never uses them."""
    found = [
        f"{path}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


LIGHT = {
    "help": "distill --help",
    "help of a command": "distill train --help",
    "unknown command": "distill trian",
    "misspelt key": "distill train sede=3",
    "unknown choice": "distill train method=softtarget",
    "report": "distill report nowhere",
}


def test_p114_light_commands_load_neither_torch_nor_lightning(tmp_path: Path) -> None:
    """One process runs them all: what the first loads, the last would show too."""
    program = f"""
import sys
from research.commands.main import main
import research.results.report, research.results.collect, research.results.terminal
for line in {list(LIGHT.values())!r}:
    sys.argv = line.split()
    try:
        main()
    except SystemExit:
        pass
    heavy = {{"torch", "lightning", "torchmetrics", "optuna", "sklearn", "transformers"}} & set(sys.modules)
    print("LOADED", line, sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert told == [f"LOADED {line} []" for line in LIGHT.values()], done.stdout
