"""What a study declares about one comparison, parsed and checked; the arithmetic is in ``comparison.py``.

| kind | operands | claim (HOLDS when) |
|---|---|---|
| difference | baseline, treatment | treatment is better by more than ``threshold`` (0) |
| share | worst, treated, best | (worst - treated) / (worst - best) > ``threshold`` (0) |
| gain_ratio | start, baseline, treatment | (treatment - start) / (baseline - start) > ``threshold`` (1) |
| ratio | before, after | before / after > ``threshold`` (1) |
| equivalence | baseline, treatment | the difference lies inside +- ``margin`` |
| best_level | arm | best level of ``factor`` at ``group`` = ``low_group`` is below that at ``high_group`` |
| interaction | baseline, treatment | the difference at ``high_group`` of ``group`` exceeds that at ``low_group`` |
| trend | arm | the metric ``rises`` or ``falls`` (``expected``) over the levels of ``factor`` |

An operand is an arm name, a requirement's name, a number, or {arm | requires, metric, where}. Factors of the arm that
``where`` leaves open are averaged, seed by seed; a ``where`` on a factor the arm does not have is ignored for it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from research.results.fields import Fields, StudyError, label_of, nearest

OPERANDS: dict[str, tuple[str, ...]] = {
    "difference": ("baseline", "treatment"),
    "share": ("worst", "treated", "best"),
    "gain_ratio": ("start", "baseline", "treatment"),
    "ratio": ("before", "after"),
    "equivalence": ("baseline", "treatment"),
    "interaction": ("baseline", "treatment"),
    "best_level": ("arm",),
    "trend": ("arm",),
}
_OPTIONS: dict[str, tuple[str, ...]] = {
    "difference": ("threshold",),
    "share": ("threshold",),
    "gain_ratio": ("threshold",),
    "ratio": ("threshold",),
    "equivalence": ("margin",),
    "interaction": ("threshold", "group", "low_group", "high_group"),
    "best_level": ("factor", "group", "low_group", "high_group"),
    "trend": ("factor", "expected", "scale"),
}
_GROUPED = ("best_level", "interaction")
_COMMON = ("kind", "metric", "lower_is_better", "where", "note", "only_if")


@dataclass(frozen=True)
class OperandSpec:
    """One side of a comparison: exactly one of ``arm``, ``requirement``, ``value`` is set."""

    arm: str | None = None
    requirement: str | None = None
    value: float | None = None
    metric: str | None = None
    where: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.arm or self.requirement or f"{self.value:g}"


@dataclass(frozen=True)
class ComparisonSpec:
    """One declared comparison; ``operands`` pairs each role of ``OPERANDS[kind]`` with its operand.

    only_if  name of a secondary comparison that must hold for this one to count at all, such as that a baseline learns;
             "": none
    """

    kind: str
    metric: str
    lower_is_better: bool
    operands: tuple[tuple[str, OperandSpec], ...]
    threshold: float = 0.0
    margin: float | None = None
    factor: str = ""
    group: str = ""
    low_group: str = ""
    high_group: str = ""
    expected: str = "rises"
    scale: str = "linear"
    note: str = ""
    only_if: str = ""

    def operand(self, role: str) -> OperandSpec:
        return dict(self.operands)[role]


@dataclass(frozen=True)
class Declared:
    """The names a comparison may use: arms, requirements, each factor's level labels, and secondary comparisons."""

    arms: Collection[str]
    requires: Collection[str]
    factors: Mapping[str, Collection[str]]
    metric: str
    lower_is_better: bool
    conditions: Collection[str] = ()


def parse_comparison(fields: Fields, declared: Declared) -> ComparisonSpec:
    """The comparison under ``fields``; raises StudyError naming the offending key."""
    kind = fields.choice("kind", OPERANDS)
    fields.only({*_COMMON, *OPERANDS[kind], *_OPTIONS[kind]})
    where = _where(fields, declared)
    operands = tuple((role, _operand(fields, role, where, declared)) for role in OPERANDS[kind])
    spec = ComparisonSpec(
        kind=kind,
        metric=fields.text("metric", declared.metric),
        lower_is_better=fields.boolean("lower_is_better", declared.lower_is_better),
        operands=operands,
        threshold=fields.number("threshold", 1.0 if kind in ("ratio", "gain_ratio") else 0.0),
        margin=fields.number("margin") if kind == "equivalence" else None,
        factor=fields.choice("factor", declared.factors) if "factor" in _OPTIONS[kind] else "",
        group=fields.choice("group", declared.factors) if kind in _GROUPED else "",
        low_group=fields.label("low_group") if kind in _GROUPED else "",
        high_group=fields.label("high_group") if kind in _GROUPED else "",
        expected=fields.choice("expected", ("rises", "falls"), "rises"),
        scale=fields.choice("scale", ("linear", "log2"), "linear"),
        note=fields.text("note", ""),
        only_if=fields.text("only_if", ""),
    )
    if spec.only_if:
        fields.choice("only_if", [name for name in declared.conditions if name != fields.where.rpartition(".")[2]])
    _check(spec, fields, declared)
    return spec


def _check(spec: ComparisonSpec, fields: Fields, declared: Declared) -> None:
    if spec.margin is not None and spec.margin <= 0:
        raise fields.error("margin", "a margin above 0, in units of the metric, fixed before the runs")
    if spec.kind in ("best_level", "trend") and spec.operand("arm").arm is None:
        raise fields.error("arm", f"an arm with levels of {spec.factor!r}; {nearest('', declared.arms)}")
    if spec.kind in _GROUPED:
        for key, label in (("low_group", spec.low_group), ("high_group", spec.high_group)):
            if label not in declared.factors[spec.group]:
                raise fields.error(key, nearest(label, declared.factors[spec.group]))
        if spec.group == spec.factor:
            raise fields.error("group", f"a factor other than {spec.factor!r}")
    if spec.kind == "interaction":
        _check_interaction(spec, fields, declared)
    if spec.kind == "trend":
        levels = [number_of(label) for label in declared.factors[spec.factor]]
        if None in levels or len(levels) < 2 or (spec.scale == "log2" and min(levels) <= 0):  # type: ignore[type-var,operator]
            raise fields.error("factor", "a factor with two or more numeric levels (above 0 where scale is log2)")


def _check_interaction(spec: ComparisonSpec, fields: Fields, declared: Declared) -> None:
    if spec.low_group == spec.high_group:
        raise fields.error("high_group", f"a level of {spec.group!r} other than low_group")
    for role, operand in spec.operands:
        if operand.arm is None or spec.group in dict(operand.where):
            raise fields.error(role, f"an arm whose {spec.group!r} is left open; {nearest('', declared.arms)}")


def number_of(label: str) -> float | None:
    """The number a level label spells, or None."""
    try:
        return float(label)
    except ValueError:
        return None


def _where(fields: Fields, declared: Declared) -> tuple[tuple[str, str], ...]:
    inner = fields.child("where")
    inner.only(declared.factors)
    pairs = []
    for factor, given in sorted(inner.content.items()):
        label = label_of(given)
        if label not in declared.factors[factor]:
            raise inner.error(factor, f"a level of {factor!r}; {nearest(str(given), declared.factors[factor])}")
        pairs.append((factor, str(label)))
    return tuple(pairs)


def _operand(fields: Fields, role: str, where: tuple[tuple[str, str], ...], declared: Declared) -> OperandSpec:
    given = fields.content.get(role)
    if given is None and role == "arm" and len(declared.arms) == 1:
        given = next(iter(declared.arms))
    if isinstance(given, int | float) and not isinstance(given, bool):
        return OperandSpec(value=float(given))
    if isinstance(given, str):
        return _named(given, fields, role, None, where, declared)
    if not isinstance(given, Mapping):
        raise fields.error(
            role, f"an arm, a requirement or a number; {nearest('', [*declared.arms, *declared.requires])}"
        )
    inner = fields.child(role)
    inner.only(("arm", "requires", "metric", "where"))
    if inner.has("arm") == inner.has("requires"):
        raise fields.error(role, "exactly one of the keys 'arm' and 'requires'")
    name = inner.text("arm" if inner.has("arm") else "requires")
    metric = inner.text("metric") if inner.has("metric") else None
    own_where = dict(where) | dict(_where(inner, declared))
    return _named(name, fields, role, metric, tuple(sorted(own_where.items())), declared)


def _named(
    name: str, fields: Fields, role: str, metric: str | None, where: tuple[tuple[str, str], ...], declared: Declared
) -> OperandSpec:
    if name in declared.arms:
        return OperandSpec(arm=name, metric=metric, where=where)
    if name in declared.requires:
        return OperandSpec(requirement=name, metric=metric)
    names = [*declared.arms, *declared.requires]
    raise StudyError(
        f"{fields.file}: {fields.path(role)} names {name!r}, which is no arm or requirement of this study; "
        f"{nearest(name, names)}"
    )
