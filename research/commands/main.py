"""The console command `distill`: picks the Hydra application and turns errors a user can act on into one line.

Imports neither torch nor Lightning: help, a misspelt key and reports answer at once.
"""

import importlib
import os
import sys
from pathlib import Path

COMMANDS = ("train", "cache", "evaluate", "study", "report")
POSITIONAL = {"study": "folder", "report": "folder", "evaluate": "run"}
USAGE_ERROR = 2
FULL_ERROR = "HYDRA_FULL_ERROR"


def main() -> None:
    """`distill COMMAND [overrides]`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean `distill {close[0]}`?" if close else ""
        sys.exit(_fail(f"no command {command!r}{hint} Commands: {', '.join(COMMANDS)}"))
    module = importlib.import_module(f"research.commands.{command}")
    if any(argument in ("-h", "--help") for argument in rest):
        print(_help(command, module))
        return
    sys.argv = [f"distill {command}", *_named(command, rest)]
    sys.exit(_run(command, module.task))


def _named(command: str, arguments: list[str]) -> list[str]:
    """The first bare word of a command that takes a folder becomes `folder=...`."""
    key = POSITIONAL.get(command)
    if key and arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        return [f"{key}={arguments[0].rstrip('/')}", *arguments[1:]]
    return arguments


def _run(command: str, task: object) -> int:
    """Run the Hydra application; the exit code is 0, 1 for a failure, 2 for a usage error, 128 + signal if stopped."""
    import hydra
    from hydra.errors import HydraException

    from research.commands.explain import explain_composition
    from research.errors import NonFiniteLoss, Preempted
    from research.schemas import register_schemas

    full = os.environ.get(FULL_ERROR) == "1"
    os.environ[FULL_ERROR] = "1"  # Hydra then raises instead of printing, and errors are explained here
    register_schemas()
    try:
        hydra.main(version_base="1.3", config_path=str(_conf_dir()), config_name=command)(task)()  # type: ignore[arg-type]
    except HydraException as error:
        if full:
            raise
        return _fail(explain_composition(command, str(_conf_dir()), sys.argv[1:], error), USAGE_ERROR)
    except Preempted as error:
        return _fail(f"stopped: {error}", error.exit_code)
    except (ValueError, OSError, NonFiniteLoss) as error:
        if full:
            raise
        return _fail(f"{error}\n(set {FULL_ERROR}=1 for the whole trace)")
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C", 130)
    return 0


def _conf_dir() -> Path:
    inside = Path(__file__).parent.parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _overview() -> str:
    lines = ["distill COMMAND [key=value ...]   (each command explains itself: distill COMMAND --help)", ""]
    for command in COMMANDS:
        module = importlib.import_module(f"research.commands.{command}")
        lines.append(f"  {(module.__doc__ or '').splitlines()[0].removeprefix('distill ')}")
    return "\n".join(lines)


def _help(command: str, module: object) -> str:
    """The command's own text, the choices of its groups, and the keys of its root."""
    import dataclasses

    from research.schemas import SCHEMAS

    lines = [str(module.__doc__).strip(), ""]
    groups = [
        f"  {group}: {', '.join(sorted(path.stem for path in (_conf_dir() / group.split('@')[0]).glob('*.yaml')))}"
        for group in str(getattr(module, "GROUPS", "")).split()
        if (_conf_dir() / group.split("@")[0]).is_dir()
    ]
    if groups:
        lines += ["Groups (group=choice):", *groups, ""]
    keys = [field.name for field in dataclasses.fields(SCHEMAS[command])]
    lines += [f"Keys: {', '.join(keys)}", "", "Hydra's flags work: --cfg job --resolve, --info, -m (multirun), hydra.run.dir=FOLDER."]
    return "\n".join(lines)
