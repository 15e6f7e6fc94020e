"""The console command `distill`: picks the command, and says what there is to pick.

Imports neither torch nor Lightning: help, a misspelt key and reports answer at once.
"""

import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType

from research.commands.application import USAGE_ERROR, fail, run_application, say
from research.sweeps.grammar import quoted

COMMANDS = ("train", "cache", "traces", "evaluate", "convert", "study", "report")
POSITIONAL = {"study": "folder", "report": "folder", "evaluate": "run", "convert": "source"}
SEVERAL = ("study",)


def main() -> None:
    """`distill COMMAND [overrides]`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.exit(say(_overview()))
    if arguments[0] == "--version":
        from importlib.metadata import version

        sys.exit(say(f"distill {version('research-distillation')}"))
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        from research.schemas import nearest

        near = nearest(command, COMMANDS, "distill ")
        sys.exit(fail(f"no command {command!r}{near}. Commands: {', '.join(COMMANDS)}", USAGE_ERROR))
    module = importlib.import_module(f"research.commands.{command}")
    if any(argument in ("-h", "--help") for argument in rest):
        sys.exit(say(_help(command, module)))
    sys.exit(run_application(command, module.task, _named(command, rest), _conf_dir()))


def _named(command: str, arguments: list[str]) -> list[str]:
    """The first words of a command that takes a folder become `folder=...` where they are one, or no override.

    One word, but for a command of SEVERAL.
    """
    key = POSITIONAL.get(command)
    if key is None:
        return arguments
    words = list(itertools.takewhile(_is_a_path, arguments if command in SEVERAL else arguments[:1]))
    paths = [quoted(word.rstrip("/") or word) for word in words]
    value = paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"
    return [f"{key}={value}", *arguments[len(words) :]] if paths else arguments


def _is_a_path(word: str) -> bool:
    return not word.startswith(("-", "+", "~")) and ("=" not in word or Path(word).exists())


def _conf_dir() -> Path:
    inside = Path(__file__).parent.parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def _overview() -> str:
    lines = ["distill COMMAND [key=value ...]   (each command explains itself: distill COMMAND --help)", ""]
    for command in COMMANDS:
        module = importlib.import_module(f"research.commands.{command}")
        lines.append(f"  {(module.__doc__ or '').splitlines()[0].removeprefix('distill ')}")
    return "\n".join(lines)


def _help(command: str, module: ModuleType) -> str:
    """The command's own text, the choices of its groups, and the keys of its root."""
    import dataclasses

    from research.schemas import SCHEMAS

    lines = [str(module.__doc__).strip(), ""]
    folders = {group: _conf_dir() / group.partition("@")[0] for group in module.GROUPS}
    if folders:
        lines.append("Groups (group=choice):")
        lines += [
            f"  {group}: {', '.join(sorted(path.stem for path in folders[group].glob('*.yaml')))}" for group in folders
        ]
        lines.append("")
    lines.append(f"Keys: {', '.join(field.name for field in dataclasses.fields(SCHEMAS[command]))}")
    lines += [
        "",
        "Hydra's flags work: --cfg job --resolve, --info, -m (multirun), hydra.run.dir=FOLDER.",
        "HYDRA_FULL_ERROR=1 in the environment shows an error's whole trace.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
