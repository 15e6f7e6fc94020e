"""The package away from its checkout: as a wheel, and under `python -O`."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

WHEEL = ["wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]


def test_p120_an_installed_wheel_composes_its_root_configs(repository: Path, tmp_path: Path) -> None:
    """The wheel carries conf/ and all rooms; a run from it writes nothing into it."""
    for needed in ("hatchling", "pip"):
        try:
            importlib.metadata.version(needed)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{needed} is not installed, so no wheel can be built here without a download")
    build = [sys.executable, "-m", "pip", *WHEEL, "--wheel-dir", str(tmp_path)]
    built = subprocess.run(build, cwd=repository, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    program = f"""
import sys
sys.path.insert(0, {str(wheel.with_suffix(""))!r})
import research
assert research.__file__.startswith({str(tmp_path)!r}), research.__file__
from research.commands.main import main
for command in ("train", "cache", "evaluate", "study", "report"):
    sys.argv = ["distill", command, "--cfg", "job"]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0, ended.code
import research.config
from research.commands.main import _conf_dir
assert research.config.conf_dir() == _conf_dir()
"""
    unpack = [sys.executable, "-m", "zipfile", "-e", str(wheel), str(wheel.with_suffix(""))]
    subprocess.run(unpack, check=True, timeout=60)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("name: train") == 1 and "_target_: research.data.digits.Digits" in done.stdout
    names = {path.relative_to(wheel.with_suffix("")).parts[0] for path in wheel.with_suffix("").rglob("*.py")}
    assert names == {"research", "hydra_plugins"}, "tests and notebooks stay at home"
    carried = {path.name for path in (wheel.with_suffix("") / "research" / "conf").rglob("*.yaml")}
    assert carried == {path.name for path in (repository / "conf").rglob("*.yaml")}


BAD = {
    "train method=soft_target teacher=frozen teacher.path={teacher} method.temperature=0": "method.temperature is 0",
    "train data.batch_size=0": "batch_size=0",
    "train student.hidden=[]": "hidden is []",
    "train evaluation.bias_classes=[77]": "evaluation.bias_classes is [77]",
    "train method._target_=os.system": "method._target_ is 'os.system'",
}


@pytest.mark.slow
def test_p79_a_bad_config_is_refused_under_optimisation(digits_teacher: Path, tmp_path: Path) -> None:
    """`python -O` drops every assert statement: none of these checks may be one."""
    lines = [line.format(teacher=f"'{digits_teacher}'") for line in BAD]
    program = f"""
import sys
assert False, "asserts are on: this is not python -O"
from research.commands.main import main
for line in {lines!r}:
    sys.argv = ["distill", *line.split()]
    try:
        main()
    except SystemExit as ended:
        print("EXIT", ended.code)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.split() == ["EXIT", "1"] * len(BAD), done.stderr
    for told, line in zip(BAD.values(), done.stderr.splitlines(), strict=True):
        assert told in line
