"""The datamodule contract: what every classification data set of the project promises."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import lightning as L
import torch
from torch import Tensor

from research.data.loader import TensorLoader
from research.data.schedule import share_of_rank, training_schedule
from research.data.selection import Example, Selection, kept_classes, select_examples
from research.data.splits import (
    DataError,
    ServedRows,
    SplitTensors,
    check_official,
    duplicates_of_train,
    refuse_overlap,
    take,
)
from research.data.views import PixelShift, View

__all__ = ["SPLITS", "AbstractClassData", "CommonOptions", "DataError", "Split", "SplitTensors"]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class CommonOptions(TypedDict, total=False):
    """The arguments that every datamodule takes; see :class:`AbstractClassData`."""

    batch_size: int
    holdout: int | None
    data_dir: str | os.PathLike[str] | None
    seed: int
    split_seed: int
    keep_classes: Sequence[int] | None
    drop_classes: Sequence[int] | None
    fraction: float
    num_train: int | None
    subset_seed: int
    shift_pixels: int
    device: Literal["auto", "cpu"]


class AbstractClassData(L.LightningDataModule, ABC):
    """Splits of a classification data set, held in memory and served in an order that can be resumed.

    An *example* below is a row or, where rows come in groups (the frames of a clip), a whole group.

    batch_size    rows per optimizer step, over all ranks and accumulated micro-batches
    holdout       examples taken out of the official train split for validation; None: the data set's own default;
                  0: train on all of it, no validation split
    data_dir      folder with the data files; None: the environment variable RESEARCH_DATA_DIR
    seed          order of the rows and randomness of the view
    split_seed    which examples are held out: apart from ``seed``, so that runs of all seeds are compared on one split
    keep_classes  classes that stay in train (validation and test keep all); None: all
    drop_classes  the same told by the classes that leave; give one of the two
    fraction      share of what is then left of train, in (0, 1]; num_train: the same as a number of examples. Drawn
                  with ``subset_seed``, stratified by class; a smaller subset lies inside every larger one
    shift_pixels  random image shifts of up to so many pixels in train, fresh in each epoch; 0: none (image data only)
    device        "auto": tensors lie on the trainer's device (CPU without a trainer); "cpu": they stay on the CPU

    ``index`` is the row number in the *official* split: train and val share the numbering of the official train split,
    test has its own. It does not move with any of the options above.

    Subclasses give ``num_classes``, ``input_shape``, ``class_names`` and :meth:`load`.

    Raises ValueError for options that fit no data (at construction) or not this data (at ``setup``), naming the option.
    """

    num_classes: int
    class_names: tuple[str, ...]
    default_holdout: int = 0
    image_shape: tuple[int, int] | None = None  # (height, width) where a row is an image, else None

    def __init__(
        self,
        *,
        batch_size: int = 128,
        holdout: int | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        split_seed: int = 0,
        keep_classes: Sequence[int] | None = None,
        drop_classes: Sequence[int] | None = None,
        fraction: float = 1.0,
        num_train: int | None = None,
        subset_seed: int = 0,
        shift_pixels: int = 0,
        device: Literal["auto", "cpu"] = "auto",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: give at least 1 (rows per optimizer step)")
        if device not in ("auto", "cpu"):
            raise ValueError(f"device={device!r}: give 'auto' (the trainer's device) or 'cpu'")
        self.batch_size, self.seed, self.device_option = batch_size, seed, device
        self.selection = Selection(
            holdout=self.default_holdout if holdout is None else holdout,
            split_seed=split_seed,
            keep_classes=kept_classes(keep_classes, drop_classes, self.num_classes),
            fraction=fraction,
            num_train=num_train,
            subset_seed=subset_seed,
        )
        self.selection.check(self.num_classes)
        chosen = data_dir if data_dir is not None else os.environ.get("RESEARCH_DATA_DIR")
        self.data_dir = None if chosen is None else Path(chosen)
        self.view = self._view_of(shift_pixels)
        self._rows: dict[Split, ServedRows] = {}
        self._dropped: dict[str, int] = {}
        self._fingerprints: dict[Split, str] = {}

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row's input."""

    @property
    def has_val(self) -> bool:
        """Whether anything is held out for validation."""
        return self.selection.holdout > 0

    def facts(self) -> dict[str, Any]:
        """What a network must fit: the shape of an input and the number of classes."""
        return {"input_shape": tuple(self.input_shape), "num_classes": self.num_classes}

    @abstractmethod
    def load(self) -> Mapping[str, SplitTensors]:
        """The official splits ``{"train": ..., "test": ...}``, the same on every call. Raises :class:`DataError`."""

    # -- splits -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read the data, hold out, drop, and place the rows on the device; once, whatever the stage."""
        if not self._rows:
            self._split(self.load())
        device = self._device()
        self._rows = {split: rows.to(device) for split, rows in self._rows.items()}

    def split_tensors(self, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """``(inputs [N, ...], label_N, index_N)`` of a split, unaugmented, by rising index."""
        rows = self._get(split)
        return rows.inputs, rows.label_N, rows.index_N

    def groups(self, split: Split) -> Tensor | None:
        """The group [N] of each row of a split, or None where every row stands alone."""
        return self._get(split).group_N

    def loader(self, split: Split, *, batch_size: int | None = None, view: bool = False) -> TensorLoader:
        """The whole split in row order on this rank, once per epoch, for evaluators and writers of caches.

        ``view=True`` gives the augmented rows of training instead of the rows as they are (train only).
        """
        if view and split != "train":
            raise ValueError(f"view=True with split={split!r}: only train has a view")
        rows = self._get(split)
        return TensorLoader(
            rows.inputs,
            rows.label_N,
            rows.index_N,
            batch_size=self.batch_size if batch_size is None else batch_size,
            seed=self.seed,
            view=self.view if view else None,
        )

    # -- Lightning's loaders ------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TensorLoader:
        """Train rows, shuffled and augmented, cut for the trainer's ranks and accumulation.

        Under ``overfit_batches`` the order is fixed, so that the same first batches come in every epoch.
        """
        rows = self._get("train")
        return TensorLoader(
            rows.inputs,
            rows.label_N,
            rows.index_N,
            batch_size=self.batch_size,
            view=self.view,
            **training_schedule(self.trainer, self.seed),
        )

    def val_dataloader(self) -> TensorLoader | list[TensorLoader]:
        """The held-out rows, this rank's share; an empty list where nothing is held out."""
        return self._evaluation_loader("val") if "val" in self._rows_ready() else []

    def test_dataloader(self) -> TensorLoader:
        """The official test rows, this rank's share."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> TensorLoader:
        """The official test rows, this rank's share."""
        return self._evaluation_loader("test")

    # -- identity -----------------------------------------------------------------------------------------------------

    @property
    def transform_name(self) -> str:
        """The view of train by name; "identity" where rows are served as they are."""
        return "identity" if self.view is None else self.view.name

    def fingerprint(self, split: Split) -> str:
        """sha256 of a split as it is served: inputs, labels, indices and, for train, the name of the view.

        Two datamodules serve the same rows in the same view exactly where it is equal, whatever the order.
        """
        if split not in self._fingerprints:
            digest = hashlib.sha256((self.transform_name if split == "train" else "identity").encode())
            for tensor in self.split_tensors(split):
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().numpy().data)
            self._fingerprints[split] = digest.hexdigest()
        return self._fingerprints[split]

    def source_fingerprint(self, split: Split) -> str:
        """sha256 of the *official* split (val is part of the official train): the same for every selection from it.

        Equal where `index` names the same rows; a cache of signals is joined to any subset of the split it scored.
        """
        official = self._official_split(split)
        digest = hashlib.sha256()
        for tensor in (official.inputs, official.label_N):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def num_official_rows(self, split: Split) -> int:
        """Rows of the official split, before anything was held out or dropped: `index` lies below it."""
        return len(self._official_split(split).label_N)

    def _official_split(self, split: Split) -> SplitTensors:
        self._rows_ready()
        return self._official["test" if split == "test" else "train"]

    def summary(self) -> dict[str, Any]:
        """What is served and what is not, in rows: ``rows`` per split, ``dropped`` from train by reason, ``groups`` per
        split (None without groups), and ``duplicates``: rows of val and test whose input equals some train row's."""
        served = self._rows_ready()
        return {
            "rows": {split: len(served[split].label_N) if split in served else 0 for split in SPLITS},
            "groups": {split: rows.num_groups for split, rows in served.items()},
            "dropped": dict(self._dropped),
            "duplicates": duplicates_of_train({split: rows.inputs for split, rows in served.items()}),
            "view": self.transform_name,
        }

    def _view_of(self, shift_pixels: int) -> View | None:
        if shift_pixels == 0:
            return None
        if self.image_shape is None:
            raise ValueError(f"shift_pixels={shift_pixels!r}: {type(self).__name__} holds no images; give 0")
        if not 0 < shift_pixels < min(self.image_shape):
            raise ValueError(f"shift_pixels={shift_pixels!r}: give 0 (no shift) to {min(self.image_shape) - 1}")
        return PixelShift(shift_pixels, *self.image_shape)

    def _split(self, official: Mapping[str, SplitTensors]) -> None:
        train, test = official["train"], official["test"]
        for name, split in (("train", train), ("test", test)):
            check_official(f"{type(self).__name__}.load()[{name!r}]", split, self.input_shape, self.num_classes)
        chosen = select_examples(Example.of(train.label_N, train.group_N), self.selection, self.num_classes)
        rows: dict[Split, ServedRows] = {"train": take(train, chosen.train_N)}
        if len(chosen.val_N):
            rows["val"] = take(train, chosen.val_N)
            refuse_overlap(rows["train"], rows["val"])
        rows["test"] = take(test, torch.arange(len(test.label_N)))
        self._dropped = chosen.dropped
        self._official = dict(official)
        self._rows = rows

    def _device(self) -> torch.device:
        if self.device_option == "cpu" or self.trainer is None:
            return torch.device("cpu")
        return self.trainer.strategy.root_device

    def _rows_ready(self) -> dict[Split, ServedRows]:
        if not self._rows:
            self.setup()
        return self._rows

    def _get(self, split: Split) -> ServedRows:
        served = self._rows_ready()
        if split in served:
            return served[split]
        if split == "val":
            raise ValueError(f"split='val': nothing is held out (holdout={self.selection.holdout}); give a holdout > 0")
        raise ValueError(f"split={split!r}: give one of {', '.join(SPLITS)}")

    def _evaluation_loader(self, split: Split) -> TensorLoader:
        rows, share = self._get(split), share_of_rank(self.trainer)
        size = max(self.batch_size, share["world_size"])
        return TensorLoader(rows.inputs, rows.label_N, rows.index_N, batch_size=size, **share)
