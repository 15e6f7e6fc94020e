"""What every datamodule promises, tested on each of them.

Digits is embedded; ``clips`` and ``points`` are made here (with and without groups); MNIST and the recorded speech
need RESEARCH_DATA_DIR and are skipped without it, except under CI.
"""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from research.data.base import SPLITS, AbstractClassData, DataError, Split
from research.data.digits import Digits
from research.data.loader import TensorLoader
from research.data.mnist import Mnist
from research.data.splits import SplitTensors
from research.data.spoken_digits import SpokenDigits
from research.records import ClassBatch
from research.seeding import rng_for


class Points(AbstractClassData):
    """300 + 60 random 4 x 4 images in three classes."""

    num_classes = 3
    class_names = ("a", "b", "c")
    default_holdout = 40
    image_shape = (4, 4)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (16,)

    def load(self) -> Mapping[str, SplitTensors]:
        return {
            split: SplitTensors(torch.rand(rows, 16, generator=rng_for(7, split)), torch.arange(rows) % 3)
            for split, rows in (("train", 300), ("test", 60))
        }


class Clips(AbstractClassData):
    """90 + 20 groups of one to five rows, three classes."""

    num_classes = 3
    class_names = ("a", "b", "c")
    default_holdout = 12

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (2, 3)

    def load(self) -> Mapping[str, SplitTensors]:
        splits = {}
        for split, groups in (("train", 90), ("test", 20)):
            group_N = torch.arange(groups).repeat_interleave(torch.arange(groups) % 5 + 1)
            inputs = torch.rand(len(group_N), 2, 3, generator=rng_for(8, split))
            splits[split] = SplitTensors(inputs, group_N % 3, group_N)
        return splits


KINDS: dict[str, type[AbstractClassData]] = {
    "points": Points,
    "clips": Clips,
    "digits": Digits,
    "mnist": Mnist,
    "spoken_digits": SpokenDigits,
}
IN_A_FOLDER = {"mnist", "spoken_digits"}
Make = Any  # one of the classes above, with its own options


@lru_cache
def official(kind: str) -> Mapping[str, SplitTensors]:
    """What ``load()`` reads; of the large data sets every fifth row or clip: enough for what is tested here."""
    read = KINDS[kind]().load()
    return {split: _every_fifth(tensors) for split, tensors in read.items()} if kind in IN_A_FOLDER else read


def _every_fifth(read: SplitTensors) -> SplitTensors:
    number_N = torch.arange(len(read.label_N)) if read.group_N is None else read.group_N
    kept = number_N % 5 == 0
    return SplitTensors(read.inputs[kept], read.label_N[kept], None if read.group_N is None else read.group_N[kept])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param in IN_A_FOLDER and not os.environ.get("RESEARCH_DATA_DIR") and not os.environ.get("CI"):
        pytest.skip(f"RESEARCH_DATA_DIR is not set: no files of {request.param}")
    return str(request.param)


@pytest.fixture
def make(kind: str, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds the datamodule; its files are read once for the whole suite, as ``load()`` is the same on every call."""
    read = official(kind)
    monkeypatch.setattr(KINDS[kind], "load", lambda self: read)
    return KINDS[kind]


def order(data: AbstractClassData, epochs: int = 1) -> list[int]:
    loader = data.train_dataloader()
    return [int(i) for _ in range(epochs) for batch in loader for i in batch.index_B]


def indices(data: AbstractClassData, split: Split) -> set[int]:
    return set(data.split_tensors(split)[2].tolist())


def test_declares_what_it_serves(make: Make) -> None:
    data = make()
    assert len(data.class_names) == data.num_classes
    for split in SPLITS:
        inputs, label_N, index_N = data.split_tensors(split)
        assert inputs.shape == (len(label_N), *data.input_shape) and len(index_N) == len(label_N) > 0
        assert (inputs.dtype, label_N.dtype, index_N.dtype) == (torch.float32, torch.int64, torch.int64)
        assert set(label_N.tolist()) == set(range(data.num_classes))
        assert torch.equal(index_N, index_N.unique())  # rising, each once


def test_index_is_the_row_of_the_official_split(make: Make, kind: str) -> None:
    data = make(split_seed=3, keep_classes=[0, 1], fraction=0.4)
    for split in SPLITS:
        source = official(kind)["test" if split == "test" else "train"]
        inputs, label_N, index_N = data.split_tensors(split)
        assert torch.equal(inputs, source.inputs[index_N])
        assert torch.equal(label_N, source.label_N[index_N])


def test_p80_splits_are_disjoint_and_test_is_whole(make: Make, kind: str) -> None:
    data = make()
    train, val = indices(data, "train"), indices(data, "val")
    assert not train & val
    assert train | val == set(range(len(official(kind)["train"].label_N)))
    assert indices(data, "test") == set(range(len(official(kind)["test"].label_N)))
    assert data.summary()["duplicates"] == {"val": 0, "test": 0}


def test_every_row_comes_once_per_epoch(make: Make) -> None:
    data = make(batch_size=64)
    expected = sorted(indices(data, "train"))
    for train_loader in (data.train_dataloader(), data.loader("train", batch_size=100)):
        for _ in range(2):
            assert sorted(int(i) for batch in train_loader for i in batch.index_B) == expected
    evaluated: dict[Split, Any] = {"val": data.val_dataloader(), "test": data.test_dataloader()}
    for split, loader in evaluated.items():
        inputs, label_N, index_N = data.split_tensors(split)
        assert torch.equal(torch.cat([batch.index_B for batch in loader]), index_N)
        assert torch.equal(torch.cat([batch.label_B for batch in loader]), label_N)
        assert torch.equal(torch.cat([batch.inputs for batch in loader]), inputs)


def test_p74_order_follows_the_seed_and_neighbouring_seeds_share_nothing(make: Make) -> None:
    first, again, next_seed = order(make(seed=42)), order(make(seed=42)), order(make(seed=43))
    assert first == again
    # two random orders agree at about one place
    assert sum(left == right for left, right in zip(first, next_seed, strict=True)) < 10
    two_epochs = order(make(seed=42), epochs=2)
    assert two_epochs[: len(first)] == first
    assert sum(left == right for left, right in zip(first, two_epochs[len(first) :], strict=True)) < 10


def test_p74_the_held_out_rows_follow_split_seed_alone(make: Make) -> None:
    held = indices(make(seed=0), "val")
    assert held == indices(make(seed=1, batch_size=7, subset_seed=1), "val")
    other = make(split_seed=1)
    share = len(held) / (len(held) + len(indices(other, "train")))
    assert len(held & indices(other, "val")) < 3 * share * len(held)


@pytest.mark.parametrize("shift_pixels", [0, 1])
def test_p44_steps_hold_the_same_rows_on_any_ranks_and_micro_batches(make: Make, shift_pixels: int) -> None:
    if shift_pixels and make.image_shape is None:
        pytest.skip("holds no images: no shifts")
    data = make(num_train=48, holdout=0, shift_pixels=shift_pixels)
    inputs, label_N, index_N = (tensor[:48] for tensor in data.split_tensors("train"))  # three whole steps

    def steps(micro: int, world: int) -> list[dict[int, Tensor]]:
        options: dict[str, Any] = {
            "batch_size": 16,
            "micro_batches": micro,
            "world_size": world,
            "seed": 2,
            "shuffle": True,
        }
        ranks = [list(TensorLoader(inputs, label_N, index_N, rank=r, view=data.view, **options)) for r in range(world)]
        merged = []
        for first in range(0, len(ranks[0]), micro):
            parts = [batch for batches in ranks for batch in batches[first : first + micro]]
            merged.append({int(i): row for part in parts for i, row in zip(part.index_B, part.inputs, strict=True)})
            assert {part.step_rows for part in parts} == {len(merged[-1])}
        return merged

    for one, many in zip(steps(1, 1), steps(4, 2), strict=True):
        assert one.keys() == many.keys() and all(torch.equal(one[i], many[i]) for i in one)


def test_p26_fingerprint_tells_other_data_and_other_views(make: Make) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"keep_classes": [0, 1]},
        {"fraction": 0.5},
        {"split_seed": 1},
        {"holdout": 5},
    ]
    if make.image_shape is not None:
        variants += [{"shift_pixels": 1}, {"shift_pixels": 2}]
    prints = [make(**options).fingerprint("train") for options in variants]
    assert len(set(prints)) == len(variants)
    assert make(seed=5, batch_size=3).fingerprint("train") == prints[0]
    assert len({make(**options).fingerprint("test") for options in variants}) == 1
    assert len({make().fingerprint(split) for split in SPLITS}) == 3


def test_p26_fingerprint_tells_one_changed_value(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make().fingerprint("train")
    row = int(make().split_tensors("train")[2][0])
    read = official(kind)
    for field in ("inputs", "label_N"):
        tensors = {name: getattr(read["train"], name) for name in ("inputs", "label_N", "group_N")}
        tensors[field] = tensors[field].clone()
        if field == "inputs":
            tensors[field][row] += 0.5
        else:
            same = torch.tensor([row]) if tensors["group_N"] is None else tensors["group_N"] == tensors["group_N"][row]
            tensors[field][same] = (tensors[field][row] + 1) % make().num_classes
        changed = {"train": SplitTensors(**tensors), "test": read["test"]}
        monkeypatch.setattr(KINDS[kind], "load", lambda self, changed=changed: changed)
        assert make().fingerprint("train") != before


def test_source_fingerprint_is_that_of_the_official_split(make: Make, kind: str) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"keep_classes": [0, 1]},
        {"fraction": 0.5},
        {"split_seed": 1},
        {"holdout": 0},
    ]
    prints = {make(**options).source_fingerprint("train") for options in variants}
    assert len(prints) == 1 and prints == {make().source_fingerprint("val")}
    assert make().source_fingerprint("test") not in prints
    for split in SPLITS:
        assert make().num_official_rows(split) == len(official(kind)["test" if split == "test" else "train"].label_N)


def test_only_train_has_a_view(make: Make) -> None:
    if make.image_shape is None:
        with pytest.raises(ValueError, match="no images"):
            make(shift_pixels=1)
        assert make().transform_name == "identity"
        return
    data = make(shift_pixels=1, num_train=30)
    plain = data.split_tensors("train")[0]
    assert torch.equal(torch.cat([batch.inputs for batch in data.loader("train")]), plain)
    assert not torch.equal(torch.cat([batch.inputs for batch in data.loader("train", view=True)]), plain)
    assert data.transform_name == "pixel_shift(1)"
    with pytest.raises(ValueError, match="only train has a view"):
        data.loader("test", view=True)


def test_subsets_are_nested_and_stratified(make: Make) -> None:
    smaller, larger, whole = (make(fraction=fraction) for fraction in (0.1, 0.5, 1.0))
    assert indices(smaller, "train") < indices(larger, "train") < indices(whole, "train")
    assert indices(make(fraction=0.1, subset_seed=1), "train") != indices(smaller, "train")
    if smaller.groups("train") is None:
        counts, all_counts = (data.split_tensors("train")[1].bincount() for data in (smaller, whole))
        assert bool(((counts - all_counts * (counts.sum() / all_counts.sum())).abs() <= 1).all())


def test_keep_classes_touches_train_alone(make: Make) -> None:
    data, whole = make(keep_classes=[0, 2]), make()
    assert set(data.split_tensors("train")[1].tolist()) == {0, 2}
    for split in ("val", "test"):
        assert data.fingerprint(split) == whole.fingerprint(split)


def test_groups_never_straddle(make: Make) -> None:
    data = make(fraction=0.3)
    train, val = data.groups("train"), data.groups("val")
    if train is None or val is None:
        assert train is val is data.groups("test") is None
        assert data.summary()["groups"] == {split: None for split in SPLITS}
        return
    assert not set(train.tolist()) & set(val.tolist())
    whole = make(holdout=0).groups("train")
    assert whole is not None
    for part in (train, val):  # each group is served with all its rows
        assert len(part) == int(torch.isin(whole, part).sum())


def test_summary_accounts_for_every_row(make: Make, kind: str) -> None:
    summary = make(keep_classes=[0, 1], fraction=0.5).summary()
    dropped = summary["dropped"]
    assert summary["rows"]["val"] == dropped["holdout"]
    assert summary["rows"]["train"] + sum(dropped.values()) == len(official(kind)["train"].label_N)
    assert min(dropped.values()) > 0


def test_without_holdout_there_is_no_validation(make: Make) -> None:
    data = make(holdout=0)
    assert data.val_dataloader() == [] and data.summary()["rows"]["val"] == 0
    with pytest.raises(ValueError, match="holdout=0"):
        data.split_tensors("val")
    with pytest.raises(ValueError, match="train, val, test"):
        data.split_tensors("dev")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"device": "gpu0"}, "device='gpu0'"),
        ({"holdout": -1}, "holdout=-1"),
        ({"holdout": 10**7}, "holdout=10000000"),
        ({"fraction": 0}, "fraction=0"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"num_train": 10**7}, "num_train=10000000"),
        ({"num_train": 3, "fraction": 0.5}, "give one of them"),
        ({"keep_classes": []}, "keep_classes"),
        ({"keep_classes": [99]}, r"keep_classes=\[99\]"),
        ({"shift_pixels": -1}, "shift_pixels=-1"),
        ({"shift_pixels": 1000}, "shift_pixels=1000"),
    ],
)
def test_bad_options_are_named(make: Make, options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        make(**options).setup()


@pytest.mark.parametrize(
    "damage",
    [
        lambda read: SplitTensors(read.inputs[1:], read.label_N),
        lambda read: SplitTensors(read.inputs.double(), read.label_N),
        lambda read: SplitTensors(read.inputs, read.label_N + 1),
        lambda read: SplitTensors(read.inputs, read.label_N - 1),
        lambda read: SplitTensors(read.inputs, read.label_N.int()),
        lambda read: SplitTensors(read.inputs / 0.0, read.label_N),
        lambda read: SplitTensors(read.inputs, read.label_N, torch.zeros(3, dtype=torch.int64)),
        lambda read: SplitTensors(read.inputs[:0], read.label_N[:0]),
    ],
)
def test_splits_other_than_declared_are_refused(
    damage: Callable[[SplitTensors], SplitTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Points().load()
    for broken in ("train", "test"):
        changed = {split: damage(read[split]) if split == broken else read[split] for split in read}
        monkeypatch.setattr(Points, "load", lambda self, changed=changed: changed)
        with pytest.raises(DataError, match=rf"Points.load\(\)\['{broken}'\]"):
            Points().setup()


def test_content_duplicates_are_counted_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Points().load()
    doubled = SplitTensors(torch.cat([read["test"].inputs[:-2], read["train"].inputs[:2]]), read["test"].label_N)
    monkeypatch.setattr(Points, "load", lambda self: {"train": read["train"], "test": doubled})
    assert Points(holdout=0).summary()["duplicates"] == {"test": 2}


def test_the_contract_alone_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="abstract"):
        AbstractClassData()  # type: ignore[abstract]


class Probe(L.LightningModule):
    """A linear classifier that notes which rows each stage sees."""

    def __init__(self, data: AbstractClassData) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(int(torch.tensor(data.input_shape).prod()), data.num_classes)
        self.seen: dict[str, list[int]] = {"train": [], "val": [], "test": []}

    def _loss(self, stage: str, batch: ClassBatch) -> Tensor:
        assert isinstance(batch, ClassBatch)
        self.seen[stage] += batch.index_B.tolist()
        return torch.nn.functional.cross_entropy(self.layer(batch.inputs.flatten(1)), batch.label_B)

    def training_step(self, batch: ClassBatch, batch_idx: int) -> Tensor:
        return self._loss("train", batch)

    def validation_step(self, batch: ClassBatch, batch_idx: int) -> None:
        self._loss("val", batch)

    def test_step(self, batch: ClassBatch, batch_idx: int) -> None:
        self._loss("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lightning_trainer_sees_every_row_of_every_split(make: Make, precision: Any) -> None:
    data = make(batch_size=512)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(quiet, False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        accumulate_grad_batches=2,
        precision=precision,
        **options,
    )
    probe = Probe(data)
    trainer.fit(probe, datamodule=data)
    trainer.test(probe, datamodule=data, verbose=False)
    for split, seen in probe.seen.items():
        assert sorted(seen) == sorted(indices(data, split))  # type: ignore[arg-type]
    steps = -(-len(probe.seen["train"]) // 512)
    assert trainer.global_step in (steps, steps - 1)  # a last row alone joins the step before
