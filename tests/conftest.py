"""What all tests share: one thread, real data where it is at hand, and the console command in this process."""

import contextlib
import gc
import importlib.util
import io
import logging
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from research.commands.main import main

REPOSITORY = Path(__file__).parents[1]
DATA_VARIABLE = "RESEARCH_DATA_DIR"


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay to the end: without this every full collection of garbage walks over them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run beside each other, and sums over several threads are not the same to the last bit everywhere."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _composed_in_half_the_time() -> Iterator[None]:
    """In this process a YAML file is parsed once, until it changes, and Hydra composes a config once for a run.

    It would once more, to ask the config for `hydra.mode`; no file of ours says it (test_configs.py).
    """
    asked, loaded, kept = Hydra.get_mode, OmegaConf.load, dict[tuple[str, int, int], bytes]()

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        return asked(self, config_name, overrides) if any("hydra.mode" in text for text in overrides) else None

    def load(file: Any) -> Any:
        path = Path(file if isinstance(file, str | Path) else file.name).absolute()
        state = path.stat()
        key = (str(path), state.st_mtime_ns, state.st_size)
        if key not in kept:
            kept[key] = pickle.dumps(loaded(file))
        return pickle.loads(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", get_mode)
        patch.setattr(OmegaConf, "load", staticmethod(load))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that these tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def require_data() -> Callable[..., Path]:
    """`require_data("mnist")`: that folder of the real data.

    Without it the test is skipped with the reason; in continuous integration a data folder that is announced and then
    absent is a failure.
    """

    def find(*parts: str) -> Path:
        announced = os.environ.get(DATA_VARIABLE)
        if not announced:
            pytest.skip(f"{DATA_VARIABLE} is not set: no {'/'.join(parts)}")
        folder = Path(announced, *parts)
        if not folder.exists():
            told = f"{DATA_VARIABLE} is {announced}, but {folder} does not exist"
            pytest.fail(told) if os.environ.get("CI") == "true" else pytest.skip(told)
        return folder

    return find


@dataclass(frozen=True)
class Done:
    """What a call of the console command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong; the test fails where there is none, or more than that."""
        lines = self.err.splitlines()
        assert self.code != 0, f"it exited with 0 and printed {self.out}"
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


@pytest.fixture(scope="session")
def distill() -> Callable[..., Done]:
    """`distill("train", "seed=1", cwd=folder)`: the console command's own function, called in this process."""

    def call(*arguments: str, cwd: Path) -> Done:
        return _done(main, ["distill", *arguments], cwd)

    return call


@pytest.fixture(scope="session")
def run_script() -> Callable[..., Done]:
    """`run_script(file, "x=1,2", cwd=folder)`: a program's own file, run as the main program in this process."""

    def call(file: Path, *arguments: str, cwd: Path) -> Done:
        return _done(lambda: runpy.run_path(str(file), run_name="__main__"), [str(file), *arguments], cwd)

    return call


def _done(program: Callable[[], Any], argv: list[str], cwd: Path) -> Done:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with _called_as(argv, cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


class Begun:
    """The console command at work in a process that was forked from this one; what it prints is in `out` and `err`."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, out: Path, err: Path) -> None:
        self.out, self.err = out, err
        fork = multiprocessing.get_context("fork")  # it has imported what a fresh process would need ten seconds for
        self.process = fork.Process(target=self._run, args=(["distill", *arguments], cwd))
        self.process.start()

    def _run(self, argv: list[str], cwd: Path) -> None:
        sys.argv = argv
        os.chdir(cwd)
        with self.out.open("w") as out, self.err.open("w") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()

    @property
    def code(self) -> int | None:
        """What it ended with, below 0 a signal's number; None while it is at work."""
        return self.process.exitcode

    def signal(self, number: int) -> int | None:
        """Send a signal, and wait for the end; returns the code."""
        os.kill(int(self.process.pid or 0), number)
        self.process.join(600)
        return self.code

    def kill_when(self, reached: Callable[[], bool], later_s: float = 0.0) -> None:
        """SIGKILL, so many seconds after `reached()`; the test fails where it had come to its end by itself."""
        deadline = time.monotonic() + 300
        while self.code is None and not reached():
            assert time.monotonic() < deadline, f"it did not come so far in 300 s:\n{self.err.read_text()}"
            time.sleep(0.001)
        time.sleep(later_s)
        assert self.signal(signal.SIGKILL) == -signal.SIGKILL, f"it had ended by itself:\n{self.err.read_text()}"


@pytest.fixture
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Begun]]:
    """`begin("train", "seed=1", cwd=folder)`: the console command, to be stopped or killed while it is at work."""
    begun: list[Begun] = []

    def start(*arguments: str, cwd: Path) -> Begun:
        told = tmp_path_factory.mktemp("told")
        begun.append(Begun(arguments, cwd, told / "out", told / "err"))
        return begun[-1]

    yield start
    for one in begun:
        one.process.kill()
        one.process.join()


@contextlib.contextmanager
def _called_as(argv: list[str], cwd: Path) -> Iterator[None]:
    """Arguments, folder and logging as of a fresh process, put back afterwards."""
    root, before = logging.getLogger(), sys.argv
    handlers, level, threads = list(root.handlers), root.level, torch.get_num_threads()
    sys.argv = argv
    try:
        with contextlib.chdir(cwd):
            yield
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.handlers, root.level = handlers, level
        for logger in root.manager.loggerDict.values():  # Hydra's settings disable those that are there already
            if isinstance(logger, logging.Logger):
                logger.disabled = False
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits_teacher(distill: Callable[..., Done], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder: a small network on scikit-learn's digits, three epochs."""
    folder = tmp_path_factory.mktemp("teacher")
    done = distill("train", "name=teacher", *TINY, f"hydra.run.dir={folder}/run", cwd=folder)
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="session")
def logprob_server() -> Any:
    """The module ``logprob_server.py`` beside this file: `with logprob_server.serving(logits_of) as server:`."""
    spec = importlib.util.spec_from_file_location("logprob_server", Path(__file__).with_name("logprob_server.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = ("trainer.max_epochs=3", "trainer.enable_progress_bar=false", "student.hidden=[32]")


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that make any digits run take a fraction of a second."""
    return TINY
