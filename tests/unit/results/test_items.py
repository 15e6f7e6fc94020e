"""Per-item files: round trip, refusals, size, and that they join by index."""

from pathlib import Path

import numpy as np
import pytest

from research.results.items import (
    Beyond,
    StudyItems,
    beyond,
    pack_items,
    read_items,
    read_study_items,
    write_items,
    write_study_items,
)


def _columns(n: int = 20, shift: int = 0) -> dict[str, np.ndarray]:
    index = np.arange(n)[::-1].copy()
    return {
        "index": index,
        "label": index % 10,
        "prediction": (index + shift) % 10,
        "teacher_prediction": index % 9,
        "nll": np.linspace(0, 1, n).astype(np.float32),
    }


def test_items_survive_the_round_trip_and_equal_columns_give_equal_bytes(tmp_path: Path) -> None:
    columns = _columns()
    first = write_items(tmp_path / "a" / "items.parquet", columns)
    back = read_items(first)
    assert list(back) == list(columns)
    for name, column in columns.items():
        assert back[name].dtype == column.dtype and np.array_equal(back[name], column)
    assert write_items(tmp_path / "b.parquet", columns).read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "columns \\['label'\\] are missing"),
        ({"nll": np.zeros(3)}, "one value per item"),
        ({"index": np.zeros(20, int)}, "given twice"),
    ],
)
def test_items_that_make_no_sense_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    columns = {name: column for name, column in {**_columns(), **change}.items() if column is not None}
    with pytest.raises(ValueError, match=message):
        write_items(tmp_path / "items.parquet", columns)
    assert not list(tmp_path.iterdir())


def test_packing_joins_by_index_and_not_by_row(tmp_path: Path) -> None:
    falling, rising = _columns(shift=1), {name: column[::-1] for name, column in _columns(shift=2).items()}
    items = pack_items("test", {"soft/seed=0": falling, "hard/seed=0": rising})
    assert items.index_I.tolist() == list(range(20))
    assert items.predictions["soft/seed=0"].tolist() == [(i + 1) % 10 for i in range(20)]
    assert items.predictions["hard/seed=0"].tolist() == [(i + 2) % 10 for i in range(20)]
    back = read_study_items(write_study_items(tmp_path / "items.parquet", items))
    assert back.split == "test" and back.predictions["hard/seed=0"].dtype == np.uint8
    assert list(back.predictions) == ["hard/seed=0", "soft/seed=0"]
    assert np.array_equal(back.wrong("soft/seed=0"), np.ones(20, bool))


def test_packing_refuses_runs_on_other_items_or_labels() -> None:
    other_items, other_labels = _columns(), _columns()
    other_items["index"] = other_items["index"] + 1
    other_labels["label"] = (other_labels["label"] + 1) % 10
    with pytest.raises(ValueError, match="same items"):
        pack_items("test", {"a": _columns(), "b": other_items})
    with pytest.raises(ValueError, match="b: its labels"):
        pack_items("test", {"a": _columns(), "b": other_labels})
    with pytest.raises(ValueError, match="nothing to pack"):
        pack_items("test", {})


def test_a_whole_study_stays_below_a_megabyte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, 10_000)
    predictions = {}
    for cell in range(60):
        wrong = rng.random(10_000) < 0.03
        predictions[f"cell/seed={cell}"] = np.where(wrong, rng.integers(0, 10, 10_000), label)
    path = write_study_items(tmp_path / "items.parquet", StudyItems("test", np.arange(10_000), label, predictions))
    assert path.stat().st_size < 1_000_000


def test_files_that_are_no_items_are_named(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"items\.parquet"):
        read_items(path)
    with pytest.raises(ValueError, match="packed study file"):
        read_study_items(write_items(path, _columns()))
    with pytest.raises(ValueError, match="whole numbers"):
        write_study_items(path, StudyItems("test", np.arange(2), np.zeros(2, int), {"a": np.array([0.5, 1.0])}))


def test_counts_of_samples_are_kept_beside_the_predictions(tmp_path) -> None:
    """pass@k of a run from the committed file alone; a run that was not sampled has no counts."""
    index = np.array([2, 0, 1])
    plain = {"index": index, "label": np.ones(3, int), "prediction": np.array([1, 0, 1])}
    sampled = {**plain, "num_samples": np.array([4, 4, 4]), "num_right": np.array([4, 0, 2])}
    items = pack_items("test", {"b/seed=0": sampled, "a/seed=0": plain})
    read = read_study_items(write_study_items(tmp_path / "items.parquet", items))
    assert set(read.predictions) == {"a/seed=0", "b/seed=0"} and set(read.sampled) == {"b/seed=0"}
    assert read.sampled["b/seed=0"]["num_right"].tolist() == [0, 2, 4], "by rising index"
    wrong = 4 - read.sampled["b/seed=0"]["num_right"].astype(int)
    assert np.mean(1 - wrong * (wrong - 1) / (4 * 3)) == pytest.approx((0 + (1 - 2 / 12) + 1) / 3), "pass@2"


def _sampled(num_right: list[int], num_samples: int) -> dict[str, np.ndarray]:
    return {
        "num_samples": np.full(len(num_right), num_samples, np.uint8),
        "num_right": np.array(num_right, np.uint8),
    }


def test_c33_what_a_run_does_where_another_failed_in_every_try() -> None:
    """By hand: problems 0, 2 and 4 were never right; the arm has 4, 0 and 1 of 4 there, and its others do not count."""
    sampled = {
        "start/seed=0": _sampled([0, 3, 0, 1, 0], 16), "sft/seed=0": _sampled([4, 0, 0, 4, 1], 4),
        "teacher": _sampled([1, 2, 3, 4, 5], 16),
    }  # fmt: skip
    index, plain = np.arange(5), np.zeros(5, np.uint8)
    items = StudyItems("test", index, plain, {key: plain for key in (*sampled, "greedy")}, sampled)
    found = beyond(items, "sft/seed=0", "start/seed=0")
    assert found == Beyond(3, 16, pytest.approx((4 + 0 + 1) / 12), pytest.approx(2 / 3))
    assert beyond(items, "start/seed=0", "start/seed=0") == Beyond(3, 16, 0.0, 0.0)
    assert beyond(items, "sft/seed=0", "teacher") == Beyond(0, 16, None, None)
    for key, failed_by in (("greedy", "teacher"), ("teacher", "greedy")):
        with pytest.raises(ValueError, match="'greedy' was not sampled; the sampled runs are start/seed=0, sft/seed=0"):
            beyond(items, key, failed_by)


def test_c33_the_committed_pass_at_k_says_what_its_reading_says() -> None:
    items = read_study_items(Path(__file__).parents[3] / "experiments" / "pass_at_k" / "items.parquet")
    arms: dict[str, list[Beyond]] = {
        arm: [beyond(items, f"{arm}/seed={seed}", f"start/seed={seed}") for seed in range(8)]
        for arm in ("sft", "on_policy", "grpo")
    }
    assert sum(one.problems for one in arms["sft"]) == 383 and {one.tries for one in arms["sft"]} == {64}
    told = {
        arm: tuple(
            round(sum(one.problems * getattr(one, name) for one in found) / 383, 3) for name in ("pass_at_1", "solved")
        )
        for arm, found in arms.items()
    }
    assert told == {"sft": (1.0, 1.0), "on_policy": (0.997, 0.997), "grpo": (0.473, 0.854)}


def test_c27_the_committed_weak_teacher_says_what_its_reading_says() -> None:
    """Where the teacher has no right sample: what a start, its correction, an answer key, and both make of it."""
    items = read_study_items(Path(__file__).parents[3] / "experiments" / "weak_teacher" / "items.parquet")
    told = {"start": (0.20, 0.75), "on_policy": (0.07, 0.42), "on_policy_key": (0.37, 0.79), "grpo": (0.61, 0.89)}
    for arm, expected in told.items():
        found = [beyond(items, f"{arm}/seed={seed}", f"teacher/seed={seed}") for seed in range(8)]
        assert {one.tries for one in found} == {16} and len(items.index_I) == 1016
        assert (min(one.problems for one in found), max(one.problems for one in found)) == (26, 128)
        means = [np.mean([getattr(one, name) for one in found]) for name in ("pass_at_1", "solved")]
        assert [round(float(mean), 2) for mean in means] == list(expected)
