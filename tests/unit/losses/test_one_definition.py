"""Read from the source: a divergence is defined in one room, and this room imports torch alone."""

import ast
import sys
from pathlib import Path

import pytest

import research
from research.losses import divergences
from research.losses.logprob_divergences import LOGPROB_DIVERGENCES

PACKAGE = Path(research.__file__).parent
FOREIGN = {
    "kl_div",
    "KLDivLoss",
    "kl_divergence",
    "rel_entr",
    "jensenshannon",
    "KLDivergence",
    "JensenShannonDivergence",
}


def definitions_and_uses(source: str) -> set[str]:
    """Names in ``source`` that define or borrow a divergence: functions of a registered name, and foreign ones used."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") in divergences.DIVERGENCES:
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and node.attr in FOREIGN:
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} & FOREIGN
    return found


def test_p14_divergences_are_defined_only_in_losses():
    offenders = {
        str(path.relative_to(PACKAGE)): sorted(names)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "losses" and (names := definitions_and_uses(path.read_text()))
    }
    assert offenders == {}


@pytest.mark.parametrize(
    "source",
    [
        "def forward_kl(a, b):\n    return a",
        "class M:\n    def _jsd(self):\n        return 0",
        "import torch.nn.functional as F\nloss = F.kl_div(a, b)",
        "from scipy.special import rel_entr",
    ],
)
def test_p14_the_reader_sees_a_second_definition(source):
    assert definitions_and_uses(source)


def test_p14_each_maths_is_written_once_and_shared_by_dense_and_sparse():
    assert set(LOGPROB_DIVERGENCES) == set(divergences.DIVERGENCES)
    for path in (PACKAGE / "losses").glob("*.py"):
        if path.name in ("logprob_divergences.py", "divergences.py"):
            continue
        assert not definitions_and_uses(path.read_text()), path.name
    for node in ast.parse((PACKAGE / "losses" / "divergences.py").read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in divergences.DIVERGENCES:
            called = {call.func.attr for call in ast.walk(node) if is_method_call(call)}
            assert called == {node.name}, f"{node.name} must only hand on to the shared definition"


def is_method_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


def test_the_room_imports_torch_records_and_the_standard_library_alone():
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for path in (PACKAGE / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                inside = module == "research.records" or module.startswith("research.losses")
                assert inside or module.split(".")[0] in allowed, f"{path.name} imports {module}"
