"""What a cache gives back, what it says of itself, and everything it refuses."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import rel_entr, softmax
from torch import Tensor

from research.data.digits import Digits
from research.errors import CacheError, CheckpointError, ConfigError
from research.losses.soft_target import soft_target
from research.records import ClassBatch, DenseLogits, TopKLogprobs
from research.teachers.base import AbstractTeacher
from research.teachers.cache import CachedTeacher, CacheWriter
from research.teachers.frozen import FrozenTeacher
from research.teachers.load import cached
from research.teachers.manifest import CacheFingerprint, read_manifest, refuse_difference
from research.teachers.top_k import keep_top_k, spread_tail

ROWS = 1437


def fingerprint(teacher: AbstractTeacher, digits: Digits, **changes: Any) -> CacheFingerprint:
    plain: dict[str, Any] = {
        "teacher_sha256": teacher.identity.sha256,
        "teacher_details": teacher.identity.details,
        "data_sha256": digits.source_fingerprint("train"),
        "view": "identity",
        "num_classes": 10,
        "top_k": None,
        "dtype": "float32",
    }
    return CacheFingerprint(**{**plain, **changes})


def write(
    folder: Path, teacher: AbstractTeacher, digits: Digits, shard_rows: int = 500, **changes: Any
) -> CachedTeacher:
    writer = CacheWriter(folder, fingerprint(teacher, digits, **changes), rows=ROWS, shard_rows=shard_rows)
    assert list(writer.write(teacher, digits, "train")) == [*range(shard_rows, ROWS, shard_rows), ROWS]
    return CachedTeacher(folder)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Fixed(AbstractTeacher):
    """Says the same of every row."""

    def __init__(self, signal_of_one_row: Tensor | TopKLogprobs) -> None:
        self.row, self.num_classes = signal_of_one_row, 10

    def signal(self, batch: ClassBatch) -> DenseLogits | TopKLogprobs:
        return DenseLogits(self.row.repeat(len(batch), 1)) if isinstance(self.row, Tensor) else self.row


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_p26_shuffled_rows_get_their_own_signal(
    folder: Path, live: FrozenTeacher, digits: Digits, dtype: str, error: float
) -> None:
    teacher = write(folder, live, digits, dtype=dtype)
    seen = 0
    for batch in Digits(batch_size=64, holdout=0, seed=11).train_dataloader():
        stored = teacher.signal(batch)
        assert isinstance(stored, DenseLogits) and stored.logits_NV.dtype == torch.float32
        torch.testing.assert_close(stored.logits_NV, live.signal(batch).logits_NV, atol=1e-6, rtol=error)
        seen += len(batch)
    assert seen == ROWS


def test_p24_top_k_rows_are_the_live_ones_cut(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    teacher = write(folder, live, digits, top_k=3)
    for batch in Digits(batch_size=500, holdout=0, seed=11).train_dataloader():
        signal = teacher.signal(batch)
        assert isinstance(signal, TopKLogprobs)
        probs_NV = live.signal(batch).logits_NV.double().softmax(-1)
        kept_NK, ids_NK = probs_NV.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(signal.ids_NK, ids_NK[:, :3])
        torch.testing.assert_close(signal.logprobs_NK.double().exp(), kept_NK[:, :3], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(signal.tail_logprob_N.double().exp(), kept_NK[:, 3:].sum(-1), atol=1e-9, rtol=1e-5)


def test_a_tiny_tail_is_kept_in_log_space() -> None:
    signal = keep_top_k(DenseLogits(torch.tensor([[0.0, -80.0, -90.0]])), 1)
    assert float(signal.tail_logprob_N) == pytest.approx(math.log(math.exp(-80) + math.exp(-90)), abs=1e-5)
    whole = keep_top_k(DenseLogits(torch.tensor([[0.0, -80.0, -90.0]])), 3)
    assert whole.tail_logprob_N.tolist() == [-math.inf] and whole.ids_NK.tolist() == [[0, 1, 2]]


def test_spreading_the_tail_gives_back_a_distribution() -> None:
    logits_NV = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    for top_k in (1, 3, 7):
        probs_NV = spread_tail(keep_top_k(DenseLogits(logits_NV), top_k)).double().exp()
        ordered_NV = logits_NV.softmax(-1).sort(dim=-1, descending=True)
        expected_NV = ordered_NV.values.clone()
        expected_NV[:, top_k:] = ordered_NV.values[:, top_k:].mean(dim=-1, keepdim=True)
        torch.testing.assert_close(probs_NV.gather(1, ordered_NV.indices), expected_NV, atol=1e-6, rtol=0)


def stored_probs(folder: Path, temperature: float) -> np.ndarray:
    """The cache's distribution of every row, softened, read from the files without the package."""
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    columns = {name: torch.cat([shard[name].float() for shard in shards]).double().numpy() for name in shards[0]}
    if "logits" in columns:
        return softmax(columns["logits"] / temperature, axis=-1)
    top_k = columns["ids"].shape[1]
    share = np.exp(columns["tail_logprob"]) / max(10 - top_k, 1)
    probs = np.repeat(share[:, None], 10, axis=1)
    np.put_along_axis(probs, columns["ids"].astype(int), np.exp(columns["logprobs"]), axis=1)
    softened = probs ** (1 / temperature)
    return softened / softened.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("dtype", "top_k"), [("float32", None), ("bfloat16", None), ("float32", 3), ("float16", 1)])
def test_p23_the_gap_in_the_manifest_is_the_kl_to_what_is_stored(
    folder: Path, live: FrozenTeacher, digits: Digits, dtype: str, top_k: int | None
) -> None:
    manifest = write(folder, live, digits, dtype=dtype, top_k=top_k).manifest
    dense = torch.cat([live.signal(batch).logits_NV for batch in digits.loader("train")]).double().numpy()
    assert set(manifest.kl_gap) == {"1", "2", "4", "8", "20"}
    for temperature, gap in manifest.kl_gap.items():
        kept = stored_probs(folder, float(temperature))
        expected = rel_entr(softmax(dense / float(temperature), axis=-1), kept).sum(axis=-1).mean()
        assert gap == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert gap < 1e-9 if dtype == "float32" and top_k is None else gap > 1e-9


def test_p23_keeping_every_class_loses_nothing_at_any_temperature(
    folder: Path, live: FrozenTeacher, digits: Digits, batch: ClassBatch
) -> None:
    teacher = write(folder, live, digits, top_k=10)
    assert all(0 <= gap < 1e-6 for gap in teacher.manifest.kl_gap.values())
    student_NV = torch.randn(len(batch), 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for temperature in (1.0, 4.0):
        values = [
            soft_target(student_NV, source.signal(batch), temperature=temperature).mean() for source in (live, teacher)
        ]
        torch.testing.assert_close(values[0], values[1], atol=1e-6, rtol=0)


def test_p23_a_uniform_tail_loses_nothing_at_any_temperature(folder: Path, digits: Digits, live: FrozenTeacher) -> None:
    teacher = Fixed(torch.tensor([[5.0, 4.0, *[1.0] * 8]]))
    teacher.identity = live.identity
    gaps = write(folder, teacher, digits, top_k=2).manifest.kl_gap
    assert all(0 <= gap < 1e-9 for gap in gaps.values())
    slope = Fixed(torch.tensor([[5.0, 4.0, *range(-7, 1)]], dtype=torch.float32))
    slope.identity = live.identity
    assert write(folder.with_name("slope"), slope, digits, top_k=2).manifest.kl_gap["4"] > 0.01


# -- fingerprints -----------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "teacher_sha256": "0" * 64,
    "teacher_details": {"mean": "geometric"},
    "data_sha256": "1" * 64,
    "view": "pixel_shift(2)",
    "num_classes": 11,
    "top_k": 4,
    "dtype": "float16",
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CacheFingerprint)])
def test_p25_each_field_of_the_fingerprint_is_refused_by_name(
    folder: Path, live: FrozenTeacher, digits: Digits, field: str
) -> None:
    write(folder, live, digits)
    own, other = fingerprint(live, digits), fingerprint(live, digits, **{field: OTHER[field]})
    with pytest.raises(CacheError, match=f"[(]{field}: cache has") as told:
        CacheWriter(folder, other, rows=ROWS)
    assert all(f"{name}: cache has" not in str(told.value) for name in OTHER if name != field)
    with pytest.raises(CacheError, match=f"[(]{field}: cache has"):
        refuse_difference(own, other, folder)
    refuse_difference(own, fingerprint(live, digits), folder)


def test_p25_another_teacher_and_other_data_are_refused_when_reading(
    folder: Path, live: FrozenTeacher, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, live, digits)
    facts: dict[str, Any] = {"input_shape": (64,), "num_classes": 10}
    cached(str(folder), **facts, teacher_sha256=live.identity.sha256).connect(digits)
    with pytest.raises(CacheError, match=r"holds teacher .* the run expects 000000000000"):
        cached(str(folder), **facts, teacher_sha256="0" * 64)
    with pytest.raises(CheckpointError, match="holds 10 classes, the data have 3"):
        cached(str(folder), input_shape=(64,), num_classes=3)
    with pytest.raises(ConfigError, match=r"teacher\.path is not set"):
        cached("", **facts)
    changed = Digits(holdout=0)
    read = {split: dataclasses.replace(tensors) for split, tensors in changed.load().items()}
    read["train"].inputs[7, 3] += 0.25
    monkeypatch.setattr(Digits, "load", lambda self: read)
    with pytest.raises(CacheError, match=r"\(data_sha256: cache has"):
        CachedTeacher(folder).connect(changed)


def test_p26_augmented_inputs_refuse_a_cache_and_any_selection_of_the_rows_takes_it(
    folder: Path, live: FrozenTeacher, digits: Digits
) -> None:
    teacher = write(folder, live, digits)
    with pytest.raises(CacheError, match=r"view: cache has 'identity', needed 'pixel_shift\(2\)'"):
        teacher.connect(Digits(shift_pixels=2))
    for options in ({"holdout": 100}, {"fraction": 0.1}, {"keep_classes": [1, 2]}, {"seed": 5}):
        data = Digits(**options)
        teacher.connect(data)
        taken = next(iter(data.train_dataloader()))
        assert torch.equal(teacher.signal(taken).logits_NV, teacher.signal(taken).logits_NV)
        torch.testing.assert_close(teacher.signal(taken).logits_NV, live.signal(taken).logits_NV, atol=1e-6, rtol=0)


def test_the_cache_s_own_identity_and_cost(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    teacher = write(folder, live, digits, top_k=3)
    assert teacher.identity.kind == "cached" and teacher.identity.sha256 == live.identity.sha256
    assert teacher.identity.details == {"top_k": 3, "dtype": "float32"}
    assert teacher.identity.training_flops == 100.0
    assert teacher.flops_per_row() == 0 and teacher.spent_flops() == ROWS * 2 * 64 * 10


# -- damage -----------------------------------------------------------------------------------------------------------


def test_an_unfinished_cache_is_refused(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    steps = CacheWriter(folder, fingerprint(live, digits), rows=ROWS, shard_rows=500).write(live, digits, "train")
    next(steps)
    with pytest.raises(CacheError, match="is not finished; run the `distill cache` command"):
        CachedTeacher(folder)
    list(steps)
    CachedTeacher(folder)


def test_every_kind_of_damage_to_a_shard_is_seen_and_repaired_by_the_same_command(
    folder: Path, live: FrozenTeacher, digits: Digits
) -> None:
    write(folder, live, digits)
    path = folder / "shard-00001.safetensors"
    whole, manifest = path.read_bytes(), read_manifest(folder)
    flipped = bytearray(whole)
    flipped[-7] ^= 1  # one bit of one logit
    rows_of_another = (folder / "shard-00000.safetensors").read_bytes()
    for damaged in (bytes(flipped), whole[:-1], whole[:20], b"", rows_of_another, None):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(CacheError, match=r"the shard shard-00001\.safetensors of .* is (damaged|missing)"):
            CachedTeacher(folder)
        write(folder, live, digits)
        assert path.read_bytes() == whole and read_manifest(folder) == manifest


def test_a_kill_while_a_damaged_shard_is_repaired_does_not_hide_the_damage(
    folder: Path, live: FrozenTeacher, digits: Digits
) -> None:
    write(folder, live, digits)
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    broken = Fixed(torch.full((1, 10), math.nan))  # stops at the first shard that it has to write
    broken.identity = live.identity
    with pytest.raises(CacheError, match="not finite"):
        list(CacheWriter(folder, fingerprint(live, digits), rows=ROWS).write(broken, digits, "train"))
    with pytest.raises(CacheError, match="not finished"):
        CachedTeacher(folder)
    write(folder, live, digits)
    assert path.read_bytes() == whole


def test_doubled_and_missing_rows_are_refused(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    write(folder, live, digits)
    edit_manifest(folder, shards={})  # as a cache of an earlier version: nothing but the rows can tell
    first, second = (folder / f"shard-0000{number}.safetensors" for number in (0, 1))
    kept = second.read_bytes()
    save_file(load_file(first), second)
    with pytest.raises(CacheError, match=r"holds 1437 rows \(937 distinct\) where its manifest says 1437"):
        CachedTeacher(folder)
    second.unlink()
    with pytest.raises(CacheError, match=r"holds 937 rows .* says 1437"):
        CachedTeacher(folder)
    second.write_bytes(kept)
    CachedTeacher(folder)


def test_a_row_that_was_not_scored_is_named(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    some = Digits(num_train=50, holdout=0)
    scored = some.split_tensors("train")[2]
    list(CacheWriter(folder, fingerprint(live, digits), rows=50).write(live, some, "train"))
    teacher = CachedTeacher(folder)
    teacher.connect(digits)  # the same source: only the row itself can tell
    every = next(iter(digits.loader("train", batch_size=ROWS)))
    missing = sorted(set(range(ROWS)) - set(scored.tolist()))
    inside = [row for row in missing if row < int(scored.max())]
    for row in (inside[0], ROWS - 1):
        one = ClassBatch(every.inputs[row : row + 1], every.label_B[row : row + 1], torch.tensor([row]), 1)
        with pytest.raises(CacheError, match=f"has no row {row}; write it for the whole split"):
            teacher.signal(one)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"fingerprint": {}}', b'{"fingerprint": {"wolf": 1}, "rows": 3}']
)
def test_a_damaged_manifest_is_named(folder: Path, content: bytes) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"manifest\.json is not a cache manifest"):
        CachedTeacher(folder)


def test_a_folder_without_a_cache_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no manifest\.json in .*; write the cache first with `distill cache`"):
        CachedTeacher(tmp_path)


# -- what cannot be written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shard_rows", "named"),
    [
        ({"dtype": "int8"}, 10, "dtype is 'int8'; expected one of float32, float16, bfloat16"),
        ({"top_k": 0}, 10, "top_k is 0"),
        ({"top_k": 11}, 10, "top_k is 11; expected null or 1 to 10 classes"),
        ({}, 0, "shard_rows is 0"),
    ],
)
def test_bad_options_are_named(
    folder: Path, live: FrozenTeacher, digits: Digits, changes: dict, shard_rows: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        CacheWriter(folder, fingerprint(live, digits, **changes), rows=ROWS, shard_rows=shard_rows)


def test_another_selection_of_the_rows_does_not_overwrite_a_cache(
    folder: Path, live: FrozenTeacher, digits: Digits
) -> None:
    write(folder, live, digits)
    with pytest.raises(CacheError, match="is of 1437 rows, the split now has 50"):
        CacheWriter(folder, fingerprint(live, digits), rows=50)
    CachedTeacher(folder)


def test_a_split_of_other_rows_than_announced_is_refused(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    writer = CacheWriter(folder, fingerprint(live, digits), rows=ROWS + 1)
    with pytest.raises(CacheError, match="gave 1437 rows where 1438 were expected"):
        list(writer.write(live, digits, "train"))


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, "float32"), (math.inf, "float32"), (1e6, "float16"), (-1e6, "float16")]
)
def test_signals_that_are_not_finite_in_the_cache_are_refused(
    folder: Path, live: FrozenTeacher, digits: Digits, value: float, dtype: str
) -> None:
    teacher = Fixed(torch.tensor([[value, *[0.0] * 9]]))
    teacher.identity = live.identity
    for top_k in (None, 3):
        writer = CacheWriter(folder / str(top_k), fingerprint(live, digits, dtype=dtype, top_k=top_k), rows=ROWS)
        with pytest.raises(CacheError, match=f"row 0 are not finite in {dtype}"):
            list(writer.write(teacher, digits, "train"))


def test_a_class_that_the_teacher_excludes_is_kept_so(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    teacher = Fixed(torch.tensor([[-math.inf, *[0.0] * 9]]))
    teacher.identity = live.identity
    batch = next(iter(digits.loader("train", batch_size=2)))
    assert write(folder, teacher, digits, dtype="float16").signal(batch).logits_NV[0, 0] == -math.inf


def test_only_a_dense_teacher_can_be_cached(folder: Path, live: FrozenTeacher, digits: Digits) -> None:
    cut = Fixed(keep_top_k(DenseLogits(torch.zeros(1, 10)), 3))
    cut.identity = live.identity
    with pytest.raises(CacheError, match="only a dense teacher can be cached, this one gives TopKLogprobs"):
        list(CacheWriter(folder, fingerprint(live, digits), rows=ROWS).write(cut, digits, "train"))
