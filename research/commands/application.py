"""One Hydra application around a command's task: composed, guarded, and every error a user can act on in one line."""

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from research.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    NonFiniteLoss,
    Preempted,
    Pruned,
    RolloutError,
    StoreError,
)

FULL_ERROR = "HYDRA_FULL_ERROR"
FAILURE, USAGE_ERROR, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141
# whose message says it all; a stop is told with its own exit code
_TOLD_ALONE = (ConfigError, CheckpointError, CacheError, StoreError, NonFiniteLoss, RolloutError, Pruned)
_NO_CHOICE = "Config group override must be"  # the one composition error that Hydra raises as a plain ValueError
_MODULE = "research.commands.main"  # a module, since Lightning starts further ranks by a script or a module
_PRINTING_FLAGS = ("--cfg", "-c", "--info", "-i")

Task = Callable[[Any], Any]


def run_application(command: str, task: Task, arguments: list[str], conf_dir: Path) -> int:
    """Run one command; the exit code is 0, 1 for a failure, 2 for a config that does not compose, 128 + signal."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    full = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing, and errors are explained here
    try:
        return _run(command, task, arguments, conf_dir, keep_in_job=full)
    except HydraException as error:
        if full:
            raise
        return fail(_explained(command, arguments, conf_dir, error), USAGE_ERROR)
    except Preempted as error:
        return fail(f"stopped: {error}", error.exit_code)
    except KeyboardInterrupt as error:
        cause = error.__cause__
        code = cause.exit_code if isinstance(cause, Preempted) else INTERRUPTED
        return fail(f"stopped: {error}" if str(error) else "stopped by Ctrl-C", code)
    except _TOLD_ALONE as error:
        if full:
            raise
        return fail(str(error))
    except (ValueError, OSError, OmegaConfBaseException) as error:
        if full:
            raise
        if str(error).startswith(_NO_CHOICE):
            return fail(_explained(command, arguments, conf_dir, error), USAGE_ERROR)
        reason = "" if error.__cause__ is None else f": {error.__cause__}"
        return fail(f"{error}{reason}")
    finally:
        if not full:
            del os.environ[FULL_ERROR]


def fail(message: str, code: int = FAILURE) -> int:
    """Say what went wrong, in one line."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def say(text: str, end: str = "\n") -> int:
    """Print; the exit code is 0, or that of a closed pipe where whoever read has gone (`| head`), which is no error."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # takes what is left when Python flushes at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return CLOSED_PIPE
    return 0


def _explained(command: str, arguments: list[str], conf_dir: Path, error: Exception) -> str:
    from research.commands.explain import explain_composition

    return explain_composition(command, str(conf_dir), arguments, error)


def _run(command: str, task: Task, arguments: list[str], conf_dir: Path, *, keep_in_job: bool) -> int:
    import hydra

    from research.schemas import register_schemas
    from research.sweeps.best_experiment import with_experiment_file
    from research.sweeps.secrets import mask_printed, refuse_secret_overrides
    from research.sweeps.trial_context import set_application_program
    from research.sweeps.trial_values import refuse_test_monitor

    refuse_secret_overrides(arguments)
    register_schemas()
    arguments = with_experiment_file(arguments)
    check = refuse_test_monitor if command == "train" else None
    set_application_program((sys.executable, "-m", _MODULE, command), check)
    failures: list[BaseException] = []
    job = _guarded(command, task, failures, keep_in_job)
    code = 0
    printed = io.StringIO() if any(a.startswith(_PRINTING_FLAGS) for a in arguments) else None
    script, sys.argv = sys.argv, [f"distill {command}", *arguments]
    try:
        with contextlib.redirect_stdout(printed) if printed else contextlib.nullcontext():
            hydra.main(version_base="1.3", config_path=str(conf_dir), config_name=command)(job)()
    finally:
        sys.argv = script
        set_application_program(())  # another application of this process is not this one
        if printed:
            code = say(mask_printed(printed.getvalue()), end="")
    if failures:
        raise failures[0]
    return code


def _guarded(command: str, task: Task, failures: list[BaseException], keep_in_job: bool) -> Task:
    """The task behind a check of its root config.

    In a single run errors are carried around Hydra, which would print the overrides; in a multirun it must see them.
    A stop by a signal ends a multirun at once instead of starting its next job.
    """
    script = list(sys.argv)

    @functools.wraps(task)
    def job(cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from research.schemas import check_root
        from research.sweeps.trial_context import current_trial

        trial = current_trial()
        single = HydraConfig.get().mode == RunMode.RUN and trial is None
        sys.argv = (
            script if trial is None else _alone(script, command, trial)
        )  # what Lightning starts further ranks with
        try:
            check_root(cfg, command)
            return task(cfg)
        except Preempted as stopped:
            if single:
                raise
            raise KeyboardInterrupt(str(stopped)) from stopped
        except Exception as error:
            logging.getLogger(__name__).info("failed", exc_info=error)
            if keep_in_job or not single:
                raise
            failures.append(error)
            return None

    return job


def _alone(script: list[str], command: str, trial: Any) -> list[str]:
    """The command line that runs a sweep's trial by itself: its further ranks must not sweep, nor draw other values."""
    from research.sweeps.grammar import quoted

    return [script[0], command, *trial.overrides, "hydra.mode=RUN", f"hydra.run.dir={quoted(trial.folder)}"]
