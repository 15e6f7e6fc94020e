"""Where a model or tokenizer of a name is read from: a folder, the Hugging Face Hub, or the hub's local cache.

Whether the hub answers is asked once, before a library asks it six times for each of a dozen files.
"""

import re
from pathlib import Path

SECONDS = 10.0
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = (  # what a tokenizer is read from; any of them will do
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # no code, no pickles


def source_of(name: str | Path, revision: str | None = None) -> str:
    """What to hand to `from_pretrained`: ``name`` where it is a folder or the hub answers, else its cached snapshot.

    Raises OSError or ValueError at once where the hub does not answer and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download

    if Path(name).exists() or hub_answers():
        return str(name)
    return snapshot_download(str(name), revision=revision, local_files_only=True)


def hub_folder(name: str) -> Path | None:
    """The folder with a hub id's files, fetched or in the local cache; None for what is no hub id, or not to be had."""
    from huggingface_hub import snapshot_download

    if not HUB_ID.fullmatch(name):
        return None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=not hub_answers()))
    except (OSError, ValueError):
        return None


def holds_tokenizer(folder: Path) -> bool:
    """Whether one of TOKENIZER_FILES lies in a folder."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def hub_answers() -> bool:
    """Whether the hub can be reached; False in its offline mode (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of the transport, of a dozen kinds: no name, no route, no proxy, no time; a status is an answer
        return False
    return True


def why_unread(name: str | Path) -> str:
    """What to say of a name that could not be read."""
    if Path(name).exists():
        return "it is a folder that holds nothing readable"
    if hub_answers():
        return "it is no folder, and could not be read from the Hugging Face Hub"
    return "it is no folder, the Hugging Face Hub cannot be reached from here, and its local cache does not hold it"
