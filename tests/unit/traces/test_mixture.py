"""Mixtures: exact counts, no repeats unless allowed, the same order every time, and memory for the plan alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research.errors import ConfigError, StoreError
from research.traces.manifest import Tally
from research.traces.mixture import Mixture
from research.traces.store import StoreWriter

Stores = Callable[..., list[Path]]


@pytest.fixture
def stores(make_rows: Callable[..., Any], make_store: Callable[..., Path], tmp_path: Path) -> Stores:
    """`stores(40, 20)`: stores "a" and "b" with so many kept traces, and every fifth row dropped besides."""

    def make(*sizes: int) -> list[Path]:
        folders = []
        for name, size in zip("abcd", sizes, strict=False):
            number = size + size // 4
            dropped = {n: "length" for n in range(4, number, 5)}
            rows = make_rows([f"{name}{n}" for n in range(number)], dropped)
            assert sum(row.kept for row in rows) == size
            folders.append(make_store(tmp_path / name, rows, block=max(7, size // 3)))
        return folders

    return make


def texts(mixture: Mixture) -> list[str]:
    return [trace.chain for trace in mixture]


def test_counts_are_met_without_repeating_and_without_dropped_rows(stores: Stores) -> None:
    a, b = stores(40, 20)
    mixture = Mixture([{"store": a, "count": 30}, {"store": b, "count": 10}])
    traces = list(mixture)
    assert len(mixture) == len(traces) == 40 and mixture.summary() == {"a": 30, "b": 10}
    assert Counter(trace.details["source"] for trace in traces) == {"a": 30, "b": 10}
    assert len({trace.chain for trace in traces}) == 40
    assert all(trace.details["n"] % 5 != 4 for trace in traces), "rows that a filter dropped stay dropped"


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ((3, 1), 24, (18, 6)),
        ((0.75, 0.25), 24, (18, 6)),
        ((2, 1), 10, (7, 3)),  # 6.67 and 3.33: the larger remainder gets the row that is left
        ((1, 1), 5, (3, 2)),
        ((3, 1), None, (40, 13)),  # floor(min(40 / 0.75, 20 / 0.25)) = 53: nothing is repeated
        ((1, 1), None, (20, 20)),
    ],
)
def test_weights_become_counts(weights: tuple, total: int | None, expected: tuple, stores: Stores) -> None:
    parts = [{"store": store, "weight": weight} for store, weight in zip(stores(40, 20), weights, strict=True)]
    assert tuple(Mixture(parts, total=total).summary().values()) == expected


def test_the_six_to_two_mix(stores: Stores) -> None:
    """600 of reasoning and 200 of other text, scaled down; the shares hold along the stream, not only at its end."""
    a, b = stores(600, 200)
    mixture = Mixture([{"store": a, "weight": 600, "name": "reasoning"}, {"store": b, "weight": 200, "name": "other"}])
    assert mixture.summary() == {"reasoning": 600, "other": 200}
    sources = [trace.details["source"] for trace in mixture]
    for start in range(0, 800, 200):  # hypergeometric: four standard deviations are 0.11
        assert abs(sources[start : start + 200].count("other") / 200 - 0.25) < 0.11


def test_the_same_seed_gives_the_same_stream(stores: Stores) -> None:
    parts = [{"store": store, "count": 15} for store in stores(40, 20)]
    first = Mixture(parts, seed=1)
    assert texts(first) == texts(first) == texts(Mixture(parts, seed=1))
    other = texts(Mixture(parts, seed=2))
    assert set(other) != set(texts(first)), "another seed takes others"


def test_every_trace_is_as_likely_as_every_other(stores: Stores) -> None:
    (a,) = stores(20)
    taken = Counter(text for seed in range(100) for text in texts(Mixture([{"store": a, "count": 5}], seed=seed)))
    assert len(taken) == 20
    assert all(abs(number - 25) < 5 * (100 * 0.25 * 0.75) ** 0.5 for number in taken.values())


def test_repeats_are_even_where_they_are_allowed(stores: Stores) -> None:
    a, b = stores(8, 20)
    mixture = Mixture([{"store": a, "count": 19}, {"store": b, "count": 20}], repeat=True)
    taken = Counter(texts(mixture))
    assert sorted(number for text, number in taken.items() if text.startswith("a")) == [2] * 5 + [3] * 3
    assert sorted(number for text, number in taken.items() if text.startswith("b")) == [1] * 20


@pytest.mark.parametrize(
    ("parts", "options", "told"),
    [
        ([{"count": 41}, {"count": 5}], {}, "takes 41 traces of a, which holds 40"),
        ([{"weight": 1}, {"weight": 1}], {"total": 60}, "takes 30 traces of b, which holds 20"),
        ([{"count": 5}, {"weight": 1}], {}, "gives every store a count, or every store a weight"),
        ([{"count": 5, "weight": 1}, {"count": 5}], {}, "a count, or every store a weight"),
        ([{}, {}], {}, "a count, or every store a weight"),
        ([{"count": 5}, {"count": 5}], {"total": 10}, "gives counts and total=10"),
        ([{"count": 0}, {"count": 5}], {}, r"mixture\[0\]\.count is 0; expected a whole number above 0"),
        ([{"count": 2.5}, {"count": 5}], {}, r"mixture\[0\]\.count is 2\.5"),
        ([{"weight": -1}, {"weight": 1}], {}, r"mixture\[0\]\.weight is -1"),
        ([{"weight": float("nan")}, {"weight": 1}], {}, r"weight is nan"),
        ([{"weight": True}, {"weight": 1}], {}, r"weight is True"),
        ([{"wieght": 1}, {"weight": 1}], {}, r"unknown key mixture\[0\]\.wieght; nearest valid: weight"),
        ([{"weight": 1}, {"weight": 1}], {"repeat": True}, "repeats has no end; give total"),
        ([{"count": 1, "name": "x"}, {"count": 1, "name": "x"}], {}, "two stores of the mixture are called 'x'"),
    ],
)
def test_specs_that_do_not_say_one_thing_are_refused(
    parts: list[dict[str, Any]], options: dict[str, Any], told: str, stores: Stores
) -> None:
    given = [{"store": store, **part} for store, part in zip(stores(40, 20), parts, strict=True)]
    with pytest.raises(ConfigError, match=told):
        Mixture(given, **options)


def test_a_mixture_needs_stores(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one store"):
        Mixture([])
    with pytest.raises(ConfigError, match=r"mixture\[0\]\.store is not set"):
        Mixture([{"count": 1}])
    with StoreWriter(tmp_path, {}) as writer:
        writer.write([], Tally())
    with pytest.raises(StoreError, match="is not finished"):
        Mixture([{"store": tmp_path, "count": 1}])
    with StoreWriter(tmp_path, {}) as writer:
        writer.seal()
    for repeat in (False, True):
        with pytest.raises(ConfigError, match="which holds 0"):
            Mixture([{"store": tmp_path, "count": 1}], repeat=repeat)
