"""Search spaces: Hydra's grammar read as parameters, and every value written so that Hydra reads the same again."""

from collections.abc import Mapping
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from research.errors import ConfigError
from research.sweeps.grammar import written
from research.sweeps.search_space import Parameter, SearchSpace
from research.sweeps.space_parser import parse_space

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
NUMBERS = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS.filter(lambda text: "$" not in text)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,4}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


def read(override: str) -> Any:
    return OverridesParser.create().parse_override(override).value()


def space_of(params: Mapping[str, Any] | None = None, *arguments: str, **more: Any) -> SearchSpace:
    return parse_space(params or {}, list(arguments), **more)[0]


def only(params: Mapping[str, Any]) -> Parameter:
    (parameter,) = space_of(params).parameters
    return parameter


@given(VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    found = read(f"key={written(value)}")
    assert found == value and type(found) is type(value)


@given(st.lists(VALUES, min_size=2, max_size=4, unique_by=repr))
def test_every_value_of_a_choice_comes_back_from_its_override(values: list[Any]) -> None:
    try:
        parameter = only({"key": values})
    except ConfigError as error:
        assert "twice" in str(error)  # 0.0 and -0.0, for one
        return
    for value, choice in zip(values, parameter.choices, strict=True):
        found = read(choice.overrides[0])
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("choice(a,b)", ["a", "b"]),
        ("a,b", ["a", "b"]),
        ("choice(null,1)", [None, 1]),
        ("choice('null',1)", ["null", 1]),
        ("'c,d','e=f'", ["c,d", "e=f"]),
        ("choice('c,d',\"e=f\")", ["c,d", "e=f"]),
        ("choice([1,2],[3])", [[1, 2], [3]]),
        ("choice({x:1},{x:2})", [{"x": 1}, {"x": 2}]),
        ("shuffle(1,2,3)", [1, 2, 3]),
        ("choice(true,false)", [True, False]),
        ("choice(1,true)", [1, True]),
        ("choice('1',1)", ["1", 1]),
        ("sort(3,1,2)", [1, 2, 3]),
        ("int(choice(1.2,3))", [1, 3]),
    ],
)
def test_choices_of_the_grammar(text: str, values: list[Any]) -> None:
    found = [read(choice.overrides[0]) for choice in only({"key": text}).choices]
    assert found == values
    assert [type(one) for one in found] == [type(one) for one in values]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0.5,2)", {"low": 0.5, "high": 2.0, "log": False, "is_int": False, "step": None}),
        ("tag(log,interval(1e-4,1))", {"low": 1e-4, "high": 1.0, "log": True, "is_int": False}),
        ("int(interval(1,8))", {"low": 1, "high": 8, "is_int": True, "log": False}),
        ("tag(log,int(interval(1,100)))", {"low": 1, "high": 100, "is_int": True, "log": True}),
        ("tag(int,interval(1,8))", {"low": 1, "high": 8, "is_int": True}),
        ("range(1,4)", {"low": 1, "high": 3, "step": 1, "is_int": True}),
        ("range(0,10,3)", {"low": 0, "high": 9, "step": 3, "is_int": True}),
        ("shuffle(range(1,5))", {"low": 1, "high": 4, "is_int": True}),
        ("float(range(1,4))", {"low": 1.0, "high": 3.0, "step": 1.0, "is_int": False}),
        ("range(0,1,0.25)", {"low": 0.0, "high": 0.75, "step": 0.25, "is_int": False}),
    ],
)
def test_ranges_of_the_grammar(text: str, expected: dict[str, Any]) -> None:
    parameter = only({"key": text})
    assert {name: getattr(parameter, name) for name in expected} == expected


def test_a_range_excludes_its_stop_as_hydra_does() -> None:
    assert only({"n": "range(1,4)"}).values() == [1, 2, 3]
    assert only({"n": "range(0,0.5,0.1)"}).values() == [0.0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("choice(5)", "one value"),
        ("5", "one value"),
        ([3], "one value"),
        (7, "one value"),
        ("interval(3,1)", "below"),
        ("interval(1,1)", "below"),
        ("tag(log,interval(0,1))", "log scale"),
        ("tag(log,interval(-1,1))", "log scale"),
        ("range(4,1)", "0 values"),
        ("a,b,a", "twice"),
        ("choice()", "empty"),
        ("tag(sqrt,interval(1,2))", "sqrt"),
        ("choice(", "parse"),
        ("tag(log,range(1,9,2))", "log"),
        ("tag(log,range(1.0,9.0))", r"give tag\(log, interval\(1.0, 8.0\)\)"),
        ("tag(log,float(range(1,5)))", r"give tag\(log, interval\(1.0, 4.0\)\)"),
    ],
)
def test_a_search_that_is_none_is_refused_with_its_reason(text: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        only({"key": text})


def test_the_command_line_replaces_the_file_and_the_rest_is_fixed() -> None:
    space, fixed = parse_space({"lr": "interval(0,1)"}, ["lr=interval(2,3)", "seed=4", "~logger", "+extra=1,2"])
    assert fixed == ["seed=4", "~logger"]
    lr, extra = space.parameters
    assert (lr.low, lr.high) == (2.0, 3.0)
    assert (extra.name, extra.overrides(2)) == ("extra", ("+extra=2",))


def test_a_fixed_override_of_a_searched_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr=3 fixes what is searched"):
        space_of({"lr": "interval(0,1)"}, "lr=3")
    with pytest.raises(ConfigError, match="b=3 fixes"):
        space_of({}, "b=3", zipped={"pair": {"a": [1, 2], "b": [3, 4]}})


def test_a_group_with_its_package_is_a_key() -> None:
    (model,) = space_of({}, "model@student=llama_100k,llama_300k").parameters
    assert model.name == "model@student"
    assert model.overrides("llama_300k") == ("model@student=llama_300k",)


def test_zipped_values_go_together() -> None:
    space = space_of({"x": [1, 2]}, zipped={"size": {"width": [10, 20, 30], "model": ["a", "b,c", None]}})
    found = [space.overrides(point) for point in space.points()]
    assert len(found) == 6
    assert found[1] == ["x=1", "width=20", "model='b,c'"]
    assert found[5] == ["x=2", "width=30", "model=null"]


@pytest.mark.parametrize("keys", [{"a": [1, 2]}, {"a": [1, 2], "b": [1]}, {"a": [1], "b": [2]}, [1, 2]])
def test_zipped_lists_that_do_not_pair_are_refused(keys: Any) -> None:
    with pytest.raises(ConfigError, match="zipped"):
        space_of({}, zipped={"pair": keys})


BLOCKS = [
    {"when": {"method": ["soft", "both"]}, "params": {"temperature": "choice(1,4)"}},
    {"when": {"method": "both", "temperature": 4}, "params": {"weight": [0.1, 0.9]}},
]


def test_conditional_parameters_exist_beside_their_condition_alone() -> None:
    space = space_of({"method": ["hard", "soft", "both"]}, conditional=BLOCKS)
    assert list(space.points()) == [
        {"method": "hard"},
        {"method": "soft", "temperature": 1},
        {"method": "soft", "temperature": 4},
        {"method": "both", "temperature": 1},
        {"method": "both", "temperature": 4, "weight": 0.1},
        {"method": "both", "temperature": 4, "weight": 0.9},
    ]
    assert space.is_conditional and space.size() == 6


def test_a_condition_that_is_never_met_or_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="never takes"):
        space_of({"m": ["a", "b"]}, conditional=[{"when": {"m": "c"}, "params": {"t": "1,2"}}])
    with pytest.raises(ConfigError, match="nearest valid: method"):
        space_of({"method": ["a", "b"]}, conditional=[{"when": {"metod": "a"}, "params": {"t": "1,2"}}])
    with pytest.raises(ConfigError, match="expected when"):
        space_of({"m": ["a", "b"]}, conditional=[{"params": {"t": "1,2"}}])


def test_a_continuous_space_has_no_end_and_no_grid() -> None:
    space = space_of({"lr": "interval(0,1)", "n": [1, 2]})
    assert space.size() is None
    with pytest.raises(ConfigError, match="continuous"):
        list(space.points())


def test_a_point_given_by_hand_is_checked() -> None:
    space = space_of({"lr": "interval(0,1)", "kind": [None, "a", [1, 2]]})
    assert space.check_point({"+lr": 0.5, "kind": [1, 2]}, "enqueue[0]") == {"lr": 0.5, "kind": "[1,2]"}
    with pytest.raises(ConfigError, match="outside"):
        space.check_point({"lr": 2}, "enqueue[0]")
    with pytest.raises(ConfigError, match="not searched"):
        space.check_point({"rl": 0.5}, "enqueue[0]")


def test_a_parameter_that_is_searched_twice_is_refused() -> None:
    block = {"when": {"m": "a"}, "params": {"t": "1,2"}}
    with pytest.raises(ConfigError, match="t is searched twice"):
        space_of({"m": ["a", "b"], "t": [1, 2]}, conditional=[block])


def test_a_key_that_a_zipped_group_writes_is_searched_once() -> None:
    with pytest.raises(ConfigError, match="x is searched twice"):
        space_of({}, "x=1,2", zipped={"pair": {"x": [3, 4], "kind": ["a", "b"]}})


def test_a_held_parameter_has_one_value_in_every_point() -> None:
    space = space_of({"method": ["hard", "soft", "both"], "lr": "interval(0,1)"}, conditional=BLOCKS)
    found = list(space.points({"lr": 0.5, "method": "both", "temperature": 4}))
    assert [point["weight"] for point in found] == [0.1, 0.9]
    assert all(point["lr"] == 0.5 and point["temperature"] == 4 for point in found)


def test_a_point_of_a_zipped_group_is_given_by_its_keys() -> None:
    space = space_of({}, zipped={"size": {"width": [10, 10, 30], "model": ["a", "b", "c"]}})
    (size,) = space.parameters
    for named in ({"width": 10, "model": "b"}, {"model": "b", "width": 10}, size.values()[1]):
        assert space.check_point({"size": named}, "enqueue[0]") == {"size": size.values()[1]}
    assert space.check_point({"size": 30}, "enqueue[0]") == {"size": size.values()[2]}
    with pytest.raises(ConfigError, match="outside"):  # which of the two?
        space.check_point({"size": 10}, "enqueue[0]")
