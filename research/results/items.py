"""Per-item files: one per run (every column), and one per study (predictions only, small enough to commit)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from research.results.record import write_atomic

REQUIRED_COLUMNS = ("index", "label", "prediction")
_KEPT = ("index", "label")
SAMPLED = ("num_samples", "num_right")  # beside a greedy answer: samples of the item, and how many of them are right


def write_items(path: str | Path, columns: Mapping[str, np.ndarray]) -> Path:
    """Writes one row per item as zstd parquet; the same columns give the same bytes.

    Needs ``index``, ``label``, ``prediction`` and equal lengths; further columns (teacher_prediction, nll in nats, ...)
    are kept as given. Raises ValueError otherwise, and where an index is given twice.
    """
    path = Path(path)
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    lengths = {name: np.shape(column) for name, column in columns.items()}
    if missing:
        raise ValueError(f"{path.name}: the columns {missing} are missing; given {sorted(columns)}")
    if len(set(lengths.values())) != 1 or len(lengths["index"]) != 1:
        raise ValueError(f"{path.name}: every column is one value per item; given shapes {lengths}")
    if len(np.unique(columns["index"])) != len(columns["index"]):
        raise ValueError(f"{path.name}: an index stands for one item; some index is given twice")
    _write(path, {name: np.asarray(column) for name, column in columns.items()}, {})
    return path


def read_items(path: str | Path) -> dict[str, np.ndarray]:
    """Every column of a per-item file, in file order."""
    return _read(Path(path))[0]


@dataclass(frozen=True)
class StudyItems:
    """The predictions of all runs of a study on one split.

    index_I, label_I   stable ids in rising order, and their true classes
    predictions        cell or requirement key -> predicted classes, one per item of ``index_I``
    sampled            key -> SAMPLED counts of runs that were sampled too: pass@k follows from them
    """

    split: str
    index_I: np.ndarray
    label_I: np.ndarray
    predictions: Mapping[str, np.ndarray]
    sampled: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def wrong(self, key: str) -> np.ndarray:
        """Boolean, one per item: the prediction differs from the label."""
        return np.asarray(self.predictions[key] != self.label_I)


@dataclass(frozen=True)
class Beyond:
    """What a run does on the problems that another one failed in every try.

    problems    how many those are; without any the shares are None
    tries       samples of each by the run that failed them
    pass_at_1   mean share of right samples of them
    solved      share of them with a right sample among the run's own
    """

    problems: int
    tries: int
    pass_at_1: float | None
    solved: float | None


def beyond(items: StudyItems, key: str, failed_by: str) -> Beyond:
    """How the run ``key`` does where ``failed_by`` (a start, a teacher) has no right sample at all (claims C27, C33).

    Those problems were picked by the failures of one run: of another draw of the same run some would be solved, so the
    run itself belongs beside, with new samples, where the gain is to be a number. Raises ValueError where a run was not
    sampled, and names those that were.
    """
    for name in (key, failed_by):
        if name not in items.sampled:
            raise ValueError(f"{name!r} was not sampled; the sampled runs are {', '.join(items.sampled) or 'none'}")
    where_I = items.sampled[failed_by]["num_right"] == 0
    tries = int(items.sampled[failed_by]["num_samples"].min())
    if not where_I.any():
        return Beyond(0, tries, None, None)
    counts = {name: items.sampled[key][name][where_I].astype(np.int64) for name in SAMPLED}
    share_I = counts["num_right"] / counts["num_samples"]
    return Beyond(int(where_I.sum()), tries, float(share_I.mean()), float((share_I > 0).mean()))


def pack_items(split: str, runs: Mapping[str, Mapping[str, np.ndarray]]) -> StudyItems:
    """Joins the runs' item columns by ``index``; raises ValueError where runs differ in items or labels."""
    if not runs:
        raise ValueError("no run has items; nothing to pack")
    index, labels = np.zeros(0, np.int64), np.zeros(0, np.int64)
    predictions: dict[str, np.ndarray] = {}
    sampled: dict[str, dict[str, np.ndarray]] = {}
    for key in sorted(runs):
        order = np.argsort(runs[key]["index"], kind="stable")
        own_index, own_labels = runs[key]["index"][order], runs[key]["label"][order]
        if not predictions:
            index, labels = own_index, own_labels
        elif not np.array_equal(own_index, index):
            raise ValueError(
                f"{key}: its items of split {split!r} are not those of {next(iter(predictions))}; "
                "runs of one study are scored on the same items"
            )
        elif not np.array_equal(own_labels, labels):
            raise ValueError(f"{key}: its labels of split {split!r} differ from those of {next(iter(predictions))}")
        predictions[key] = runs[key]["prediction"][order]
        if all(name in runs[key] for name in SAMPLED):
            sampled[key] = {name: runs[key][name][order] for name in SAMPLED}
    return StudyItems(split, index, labels, predictions, sampled)


def write_study_items(path: str | Path, items: StudyItems) -> Path:
    """Writes ``items.parquet``: index, label and one prediction column per key, in the narrowest unsigned type.

    A run that was sampled has two more, ``<key>:num_samples`` and ``<key>:num_right``.
    """
    path = Path(path)
    columns = {"index": _narrow(items.index_I), "label": _narrow(items.label_I)}
    columns |= {key: _narrow(items.predictions[key]) for key in sorted(items.predictions)}
    columns |= {f"{key}:{name}": _narrow(items.sampled[key][name]) for key in sorted(items.sampled) for name in SAMPLED}
    _write(path, columns, {"split": items.split})
    return path


def read_study_items(path: str | Path) -> StudyItems:
    """The packed file of a study; raises ValueError where it is not one."""
    path = Path(path)
    columns, metadata = _read(path)
    if "split" not in metadata or any(name not in columns for name in _KEPT):
        raise ValueError(
            f"{path}: not a packed study file; expected the columns index, label and a split in its metadata"
        )
    predictions = {name: column for name, column in columns.items() if name not in _KEPT and ":" not in name}
    sampled = {
        key: {name: columns[f"{key}:{name}"] for name in SAMPLED}
        for key in predictions
        if f"{key}:{SAMPLED[0]}" in columns
    }
    return StudyItems(metadata["split"], columns["index"], columns["label"], predictions, sampled)


def _narrow(column: np.ndarray) -> np.ndarray:
    """The same whole numbers as the smallest unsigned type that holds them."""
    if column.dtype.kind not in "iub" or (column.size and column.min() < 0):
        raise ValueError(f"expected whole numbers >= 0; given dtype {column.dtype}")
    return column.astype(np.min_scalar_type(int(column.max()) if column.size else 0))


def _write(path: Path, columns: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()})
    sink = pyarrow.BufferOutputStream()
    # row statistics would cost more than the rows here: a 10,000-item column of classes packs to some kilobytes
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "write_statistics": False}
    parquet.write_table(table.replace_schema_metadata(dict(metadata)), sink, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sink.getvalue().to_pybytes())


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path, pre_buffer=False).read(use_threads=False)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return {name: table.column(name).to_numpy() for name in table.column_names}, metadata
