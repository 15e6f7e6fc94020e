"""The installed console command, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CONSOLE = Path(sys.executable).with_name("distill")


@pytest.fixture(scope="session")
def console() -> Path:
    """The script that `pip install` made of [project.scripts]."""
    if not CONSOLE.exists():
        pytest.fail(f"{CONSOLE} does not exist: install the project with pip install -e .")
    return CONSOLE


@pytest.fixture(scope="session")
def run_console(console: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_console("train", "seed=1", cwd=folder)`: one process, one thread."""

    def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(console), *arguments],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
