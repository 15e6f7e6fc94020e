"""What a trace store says of itself: the settings it was written with, its shards' hashes, and the drop ledger."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from research.errors import StoreError

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
SHARD_FOLDER = "data"  # shards lie apart from the manifest, so that any parquet reader can be given the folder
SHARDS = "shard-*.parquet"


@dataclass
class Tally:
    """Counts of one shard or of a whole store; ``written == kept + sum(dropped.values())``.

    problems        problems that the traces were written for; 0 for imported files
    written         traces that came, whether or not they are stored
    tokens          tokens of all completions, EOS included, as far as they were counted
    dropped         filter's reason -> traces it was the first to drop
    verdicts        verdict -> traces of it; "none" where nobody verified
    outcomes        how chain and answer go together (``research.tasks.grading.OUTCOMES``) -> traces
    kept_outcomes   the same, of the kept traces alone: what slipped through
    corruptions     error channel -> traces it was drawn for
    """

    problems: int = 0
    written: int = 0
    kept: int = 0
    tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    kept_outcomes: dict[str, int] = field(default_factory=dict)
    corruptions: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Tally") -> None:
        """Count another shard's traces in."""
        for item in fields(self):
            mine, its = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, dict):
                for name, number in its.items():
                    mine[name] = mine.get(name, 0) + number
            else:
                setattr(self, item.name, mine + its)


@dataclass(frozen=True)
class Shard:
    """One shard file.

    sha256  of its bytes
    rows    rows stored in it
    tally   counts of the traces that came, stored or not
    tokens  tokens generated for it, as the generator counts them; None: not known, as for the other costs
    flops   of generation
    seconds of wall time, over all processes that worked at it
    prefill of these costs, those of the passes over the prompts: flops, tokens, seconds; None where not told apart
    """

    sha256: str
    rows: int
    tally: Tally
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    prefill: dict[str, float | None] | None = None


@dataclass(frozen=True)
class StoreManifest:
    """The manifest of one store.

    settings  everything its rows depend on: task, split, teacher, template, sampling, filters, ...; plain JSON values
    complete  whether every trace that was asked for is in it
    shards    file name -> :class:`Shard`, in order
    """

    settings: dict[str, Any]
    complete: bool = False
    shards: dict[str, Shard] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    @property
    def rows(self) -> int:
        """Stored rows, dropped ones included."""
        return sum(shard.rows for shard in self.shards.values())

    @property
    def tally(self) -> Tally:
        """The counts of all shards."""
        total = Tally()
        for shard in self.shards.values():
            total.add(shard.tally)
        return total

    @property
    def cost(self) -> dict[str, float | None]:
        """Tokens, FLOPs and seconds of all shards; None where that of one is not known."""
        return {
            name: _total(getattr(shard, name) for shard in self.shards.values())
            for name in ("tokens", "flops", "seconds")
        }

    @property
    def prefill(self) -> dict[str, float | None]:
        """Of that, the passes over the prompts; their tokens were read, not generated, and are no part of ``cost``."""
        return {
            name: _total((shard.prefill or {}).get(name) for shard in self.shards.values())
            for name in ("tokens", "flops", "seconds")
        }


def _total(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Write ``manifest.json`` whole or not at all; totals stand beside the shards they are summed from."""
    plain = {"schema": manifest.schema, "complete": manifest.complete, "settings": manifest.settings}
    plain |= {"rows": manifest.rows, "tally": asdict(manifest.tally)}
    plain["cost"] = manifest.cost
    plain["shards"] = {name: asdict(shard) for name, shard in manifest.shards.items()}
    replace_file(folder / MANIFEST_FILE, (json.dumps(plain, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> StoreManifest:
    """The manifest of a store folder. Raises StoreError where it is missing, damaged or of another version."""
    path = folder / MANIFEST_FILE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        version = plain["schema"]
        shards = {name: Shard(**{**shard, "tally": Tally(**shard["tally"])}) for name, shard in plain["shards"].items()}
        manifest = StoreManifest(dict(plain["settings"]), bool(plain["complete"]), shards, version)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"no {MANIFEST_FILE} in {folder}; expected a trace store, written by `distill traces`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is not the manifest of a trace store ({error!r}); write the store again") from None
    if version != SCHEMA_VERSION:
        raise StoreError(f"{path} has schema {version!r}; this version reads {SCHEMA_VERSION}; write the store again")
    return manifest


def refuse_difference(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise StoreError naming every setting, with its path, in which a store differs from what is asked of it."""
    told = [f"{key}: the store has {ours!r}, the run {theirs!r}" for key, ours, theirs in _differences(found, wanted)]
    if told:
        raise StoreError(
            f"the store {folder} was begun with other settings ({'; '.join(told)}); "
            "give the same settings, or another store folder"
        )


def _differences(found: Any, wanted: Any, key: str = "") -> Iterable[tuple[str, Any, Any]]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in sorted({*found, *wanted}):
            inner = f"{key}.{name}" if key else str(name)
            yield from _differences(found.get(name), wanted.get(name), inner)
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(ours, theirs, f"{key}[{number}]")
    elif found != wanted:
        yield key, found, wanted


def replace_file(path: Path, content: bytes) -> None:
    """Write ``path`` so that a kill at any moment leaves the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
