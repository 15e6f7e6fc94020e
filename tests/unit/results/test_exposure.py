"""A study's exposure by place: means over seeds by hand, and what is left out."""

from pathlib import Path

import numpy as np
import pytest

from research.results.collect import collect
from research.results.exposure import EXPOSURE_FILE, exposure_by_place, write_study_exposure
from research.results.fields import StudyError
from research.results.items import _write
from research.results.study import cells


def columns(tokens: tuple[int, ...], forward: tuple[float, ...], writer: str = "student") -> dict[str, np.ndarray]:
    return {
        "writer": np.array([writer] * len(tokens)),
        "place": np.arange(len(tokens)),
        "tokens": np.array(tokens),
        "forward_kl": np.array(forward),
        "reverse_kl": 2 * np.array(forward),
    }


def test_means_over_seeds_at_each_place(workshop, tmp_path: Path) -> None:
    """Place 2 is reached by 5 of 100 completions of seed 1, less than a tenth."""
    study = workshop.study()
    soft = [cell for cell in cells(study) if cell.arm == "soft"][:2]
    runs = [(soft[0], columns((100, 80, 50), (0.1, 0.3, 0.5))), (soft[1], columns((100, 90, 5), (0.2, 0.5, 9.0)))]
    write_study_exposure(tmp_path / EXPOSURE_FILE, study, runs)
    found = exposure_by_place(tmp_path / EXPOSURE_FILE, study)
    assert list(found) == ["soft"] and list(found["soft"]) == ["student"]
    points = found["soft"]["student"]
    assert [point["place"] for point in points] == [0, 1]
    assert [point["mean"] for point in points] == pytest.approx([0.15, 0.4])
    half = 12.7062047 * 0.1 / 2  # t(1), SD / sqrt(2) of two values is half their distance
    assert points[0]["high"] - points[0]["mean"] == pytest.approx(half)
    reverse = exposure_by_place(tmp_path / EXPOSURE_FILE, study, "reverse_kl", least_share=0.05)["soft"]["student"]
    assert [point["mean"] for point in reverse] == pytest.approx([0.3, 0.8, 9.5])
    with pytest.raises(ValueError, match="distance='kl'"):
        exposure_by_place(tmp_path / EXPOSURE_FILE, study, "kl")


def test_a_study_keeps_what_its_runs_measured_and_only_that(workshop) -> None:
    study = workshop.study(workshop.study().path.read_text() + "\nfactors: {share: {'0': [], '1': []}}\n")
    for cell in cells(study):
        value = 0.25 if cell.factors["share"] == "1" else 0.5
        folder = workshop.run(cell.key, cell.seed, 20, artifacts={"exposure/test": "exposure_test.parquet"})
        both = [columns((9, 8), (value, value)), columns((9, 9), (0.125, 0.125), "teacher")]
        _write(
            folder / "exposure_test.parquet", {name: np.concatenate([b[name] for b in both]) for name in both[0]}, {}
        )
    collect(study, workshop.runs)
    path = study.path.parent / EXPOSURE_FILE
    found = exposure_by_place(path, study)
    assert list(found) == ["hard, share 0", "hard, share 1", "soft, share 0", "soft, share 1"]
    one = {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert found["soft, share 1"]["student"] == [{"place": 0, **one}, {"place": 1, **one}]
    assert found["soft, share 0"]["teacher"][1]["mean"] == 0.125
    for cell in cells(study):
        workshop.run(cell.key, cell.seed, 20)
    collect(study, workshop.runs)
    assert not path.exists(), "runs that measured nothing leave nothing"
    with pytest.raises(StudyError, match=r"evaluation\.exposure=true"):
        exposure_by_place(path, study)
