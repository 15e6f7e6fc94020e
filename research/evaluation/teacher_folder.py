"""What a teacher's folder says of it beside the weights: its tokens, how it stops, and how it was asked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.errors import ConfigError
from research.teachers.load import NETWORK_FOLDER
from research.text.hub import holds_tokenizer
from research.text.tokenizer import build_tokenizer


@dataclass(frozen=True)
class TeacherFolder:
    """Each is None where nothing says so.

    tokenizer     the one that lies beside the weights
    eos_ids       ids that end what the model writes, by its generation config or config
    head_rows     rows of the output head on disk: more than the tokenizer has tokens where the head is padded
    template      name of the template's class that its run trained under
    trace_format  that its run trained on
    """

    tokenizer: Any | None = None
    eos_ids: tuple[int, ...] | None = None
    head_rows: int | None = None
    template: str | None = None
    trace_format: str | None = None


def read_teacher_folder(source: str) -> TeacherFolder:
    """What lies at a teacher's source: a run folder, the `student` folder in one, or a Hugging Face folder.

    Nothing is known of a checkpoint file, of several sources, or of an address.
    """
    path = Path(source)
    if not path.is_dir():
        return TeacherFolder()
    folder = path / NETWORK_FOLDER if (path / NETWORK_FOLDER).is_dir() else path
    config = _json(folder / "config.json")
    config = {**config, **_mapping(config.get("text_config"))}
    run = _mapping(_json(folder.parent / "run.json").get("config"))
    target = _mapping(run.get("template")).get("_target_")
    trace_format = _mapping(run.get("data")).get("trace_format")
    return TeacherFolder(
        tokenizer=_tokenizer(folder),
        eos_ids=_ids(_json(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))),
        head_rows=config.get("vocab_size") if isinstance(config.get("vocab_size"), int) else None,
        template=str(target).rpartition(".")[2] if target else None,
        trace_format=str(trace_format) if trace_format else None,
    )


def _tokenizer(folder: Path) -> Any | None:
    if not holds_tokenizer(folder):
        return None
    try:
        return build_tokenizer(str(folder))
    except ConfigError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(_mapping(json.loads(path.read_text())))
    except (OSError, ValueError):
        return {}


def _mapping(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _ids(given: Any) -> tuple[int, ...] | None:
    listed = given if isinstance(given, list) else [given]
    return tuple(listed) if listed and all(isinstance(token, int) for token in listed) else None
