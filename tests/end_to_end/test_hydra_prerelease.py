"""The sweeper on hydra-core 1.4's pre-release, in an environment of its own: `docs/sweeps.md` says how to make it."""

import os
import subprocess
from pathlib import Path

import pytest

VARIABLE = "RESEARCH_HYDRA14_PYTHON"
TESTS = ("tests/end_to_end/test_hydra_suites.py", "tests/unit/sweeps/test_search_space.py")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no python with hydra-core 1.4")
def test_hydras_suites_and_the_grammar_on_the_prerelease(repository: Path) -> None:
    python = os.environ[VARIABLE]
    version = subprocess.run(
        [python, "-c", "import hydra; print(hydra.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert version.startswith("1.4"), version
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [python, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=repository, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
