"""MNIST, the official 60,000 / 10,000 split, from the four idx files or from Hugging Face; verified by content."""

import functools
import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from research.data.base import AbstractClassData, CommonOptions
from research.data.splits import DataError, SplitTensors
from research.data.views import PixelShift
from research.seeding import rng_for

HUGGING_FACE_ID = "ylecun/mnist"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SHA256 = {  # of the decompressed idx file, header included
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
WHAT_TO_DO = (
    "restore the original file, or remove the folder {folder} to fetch the data set {hub} from Hugging Face instead"
)


class Mnist(AbstractClassData):
    """28 x 28 handwritten digits, float32 [N, 784]: pixel / 255, so 0 is paper and 1 is ink; no mean is subtracted.

    Read from ``data_dir/mnist/*.gz`` where that folder exists, else through Hugging Face ``datasets``. Either way the
    bytes must have the published sha256, so that the test split is the official 10,000 images and nothing else.
    5,000 train images are held out for validation unless ``holdout`` says otherwise.

    test_shift_pixels   moves each test image by a fixed shift of up to so many pixels in each direction, never by zero,
                        drawn with ``split_seed``: the same for every training seed. 0: the test images as they are
    """

    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))
    default_holdout = 5000
    image_shape = (28, 28)

    def __init__(self, *, test_shift_pixels: int = 0, **common: Unpack[CommonOptions]) -> None:
        super().__init__(**common)
        if not 0 <= test_shift_pixels < 28:
            raise ValueError(f"test_shift_pixels={test_shift_pixels!r}: give 0 (test images as they are) to 27")
        self.test_shift_pixels = test_shift_pixels
        self.test_shift_seed = self.selection.split_seed

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (784,)

    def prepare_data(self) -> None:
        """Fetch from Hugging Face where there is no local folder: one process per node, into the hub's own cache."""
        if self._folder() is None:
            _hub_dataset(self.data_dir)

    def load(self) -> dict[str, SplitTensors]:
        folder = self._folder()
        raw = _from_hub(_hub_dataset(self.data_dir)) if folder is None else _from_folder(folder)
        splits = {name: SplitTensors(*_to_tensors(images, labels)) for name, (images, labels) in raw.items()}
        if self.test_shift_pixels:
            shift = PixelShift(self.test_shift_pixels, *self.image_shape)
            test = splits["test"]
            number_N = shift.draw_moved(len(test.label_N), rng_for(self.test_shift_seed, "test_shift"))
            splits["test"] = SplitTensors(shift.apply(test.inputs, number_N), test.label_N)
        return splits

    def _folder(self) -> Path | None:
        folder = None if self.data_dir is None else self.data_dir / "mnist"
        return folder if folder is not None and folder.is_dir() else None


def read_idx(path: Path, sha256: str) -> np.ndarray:
    """The uint8 array of one gzipped idx file whose decompressed bytes have the hash ``sha256``.

    Raises DataError, naming the file, where it is missing, truncated, of another content, or no idx file of bytes.
    """
    advice = WHAT_TO_DO.format(folder=path.parent, hub=HUGGING_FACE_ID)
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing from a folder that should hold {', '.join(SHA256)}: {advice}") from None
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is truncated or damaged ({error}), expected a whole gzip file: {advice}") from error
    given = hashlib.sha256(content).hexdigest()
    if given != sha256:
        raise DataError(f"{path}: the decompressed bytes have sha256 {given}, expected {sha256}: {advice}")
    return _parse_idx(content, path)


def _parse_idx(content: bytes, path: Path) -> np.ndarray:
    """Layout: two zero bytes, type (8 = unsigned byte), number of dimensions, each dimension as big-endian uint32."""
    dimensions = content[3] if len(content) > 3 else 0
    header = 4 + 4 * dimensions
    if content[:3] != b"\x00\x00\x08" or len(content) < header:
        raise DataError(f"{path} begins with {content[:4].hex()}, expected 000008xx: an idx file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise DataError(f"{path} holds {len(content) - header} values, its header promises {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _idx_bytes(array: np.ndarray) -> bytes:
    """The idx file of a uint8 array: what the published hashes are taken of."""
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _from_folder(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = [(folder / name).stat() for name in SHA256 if (folder / name).exists()]
    return _read_folder(folder, tuple((one.st_mtime_ns, one.st_size) for one in found))


@functools.lru_cache(maxsize=1)
def _read_folder(folder: Path, stamps: tuple[tuple[int, int], ...]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read once by a process, for all of its runs, while the files stay as they are; the arrays are read-only."""
    return {
        split: (read_idx(folder / images, SHA256[images]), read_idx(folder / labels, SHA256[labels]))
        for split, (images, labels) in FILES.items()
    }


def _hub_dataset(data_dir: Path | None) -> Any:
    tried = "data.data_dir and RESEARCH_DATA_DIR are not set" if data_dir is None else f"{data_dir / 'mnist'} is absent"
    advice = "set data.data_dir (or RESEARCH_DATA_DIR) to a folder that holds mnist/" + ", mnist/".join(SHA256)
    try:
        from datasets import load_dataset  # an optional extra
    except ImportError as error:
        raise DataError(
            f"MNIST: {tried}, and the package 'datasets' is not installed: {advice}, or"
            " pip install 'research-distillation[hub]' to fetch it from Hugging Face"
        ) from error
    try:
        return load_dataset(HUGGING_FACE_ID)
    except Exception as error:  # the hub's failures share no base class
        raise DataError(
            f"MNIST: {tried}, and fetching {HUGGING_FACE_ID} from Hugging Face failed with"
            f" {type(error).__name__}: {error}: {advice}"
        ) from error


def _from_hub(dataset: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    raw = {}
    for split, names in FILES.items():
        rows = dataset[split].with_format("numpy")
        arrays = (np.asarray(rows["image"], dtype=np.uint8), np.asarray(rows["label"], dtype=np.uint8))
        for name, array in zip(names, arrays, strict=True):
            given = hashlib.sha256(_idx_bytes(array)).hexdigest()
            if given != SHA256[name]:
                raise DataError(
                    f"{HUGGING_FACE_ID}, split {split}: as {name} its content has sha256 {given}, expected"
                    f" {SHA256[name]}: clear the Hugging Face cache of this data set, or set data.data_dir"
                )
        raw[split] = arrays
    return raw


def _to_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    inputs = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255.0)
    return inputs, torch.from_numpy(labels.astype(np.int64))
