import torch
from sklearn.datasets import load_digits

from research.data.digits import Digits


def test_splits_are_the_source_cut_in_two() -> None:
    source = load_digits()
    official = Digits().load()
    sizes = {split: len(official[split].label_N) for split in official}
    assert sizes == {"train": 1437, "test": 360}
    rows = {(*image, label) for image, label in zip(source.data.tolist(), source.target.tolist(), strict=True)}
    assert len(rows) == 1797  # no two images are equal, so that sets compare the splits
    found = set()
    for split in official.values():
        values = (split.inputs * 16).tolist()
        found |= {(*image, label) for image, label in zip(values, split.label_N.tolist(), strict=True)}
    assert found == rows


def test_test_split_is_stratified() -> None:
    official = Digits().load()
    counts = official["test"].label_N.bincount()
    share = load_digits().target
    expected = torch.tensor(share).bincount() * 360 / 1797
    assert bool(((counts - expected).abs() <= 1).all())


def test_default_split_sizes_are_served() -> None:
    assert Digits().summary()["rows"] == {"train": 1257, "val": 180, "test": 360}
