"""scikit-learn's handwritten digits: 1,797 images that come with the library, so that nothing is downloaded."""

import functools

import numpy as np
import torch

from research.data.base import AbstractClassData
from research.data.selection import stratified_ranking
from research.data.splits import SplitTensors

NUM_TEST = 360
TEST_SPLIT_SEED = 0  # part of the data set's definition, not an option: every run has the same test images


class Digits(AbstractClassData):
    """8 x 8 images of the ten digits (UCI optical recognition, test part), float32 [N, 64] in 0..1 (source 0..16 / 16).

    The source has no official split; here 360 images, stratified by class and fixed for good, are the test split and
    1,437 the train split, of which 180 are held out for validation unless ``holdout`` says otherwise. Both splits
    number their rows in the order of the source.
    """

    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))
    default_holdout = 180
    image_shape = (8, 8)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (64,)

    def load(self) -> dict[str, SplitTensors]:
        pixels, labels = _read()
        inputs = torch.from_numpy(pixels.astype(np.float32)) / 16.0
        label_N = torch.from_numpy(labels.astype(np.int64))
        test = torch.zeros(len(label_N), dtype=torch.bool)
        test[stratified_ranking(label_N, torch.ones_like(test), TEST_SPLIT_SEED, self.num_classes)[:NUM_TEST]] = True
        return {
            "train": SplitTensors(inputs[~test], label_N[~test]),
            "test": SplitTensors(inputs[test], label_N[test]),
        }


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Read once by a process, for all of its runs: pixels 0..16 [N, 64] and labels [N], of which runs take copies."""
    from sklearn.datasets import load_digits  # seconds to import; only this data set needs it

    source = load_digits()
    return source.data, source.target
