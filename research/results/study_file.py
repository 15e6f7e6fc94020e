"""Reading ``study.yaml``: unknown keys, levels, seeds, names and placeholders are refused before anything runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.results.comparison_spec import Declared, parse_comparison
from research.results.fields import Fields, StudyError, label_of, nearest, read_yaml
from research.results.study import Arm, Cell, CurveSpec, Preset, Requirement, Study, cells, fill_placeholders

STUDY_KEYS = (
    "study", "claim", "question", "base", "requires", "arms", "factors", "seeds", "metric", "lower_is_better",
    "comparison", "secondary", "published", "budget", "presets", "curves", "command",
)  # fmt: skip
CELL_COMMANDS = ("train", "sweep")
CURVE_COSTS = ("flops", "tokens", "seconds", "steps")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def read_study(folder: str | Path) -> Study:
    """The study in ``folder`` (or in the file given); raises StudyError naming the file and the key."""
    path = Path(folder)
    path = path if path.suffix in (".yaml", ".yml") else path / "study.yaml"
    fields = Fields(read_yaml(path), path)
    fields.only(STUDY_KEYS)
    if fields.text("study") != path.resolve().parent.name:
        raise fields.error("study", f"the folder's name, {path.resolve().parent.name!r}")
    factors = _factors(fields)
    arms = {name: _arm(name, fields, factors) for name in _names(fields.child("arms"))}
    if not arms:
        raise fields.error("arms", "a mapping of at least one arm to its overrides")
    requires = _requires(fields)
    metric, lower = _metric(fields, "metric"), fields.boolean("lower_is_better")
    secondary = fields.child("secondary")
    declared = Declared(arms, requires, factors, metric, lower, _names(secondary))
    clash = sorted(set(arms) & set(requires))
    if clash:
        raise StudyError(f"{path}: {clash[0]!r} is both an arm and a requirement; give them different names")
    study = Study(
        name=fields.text("study"),
        claim=fields.text("claim"),
        question=fields.text("question"),
        base=fields.texts("base", ()),
        requires=requires,
        arms=arms,
        factors=factors,
        seeds=fields.seeds("seeds"),
        metric=metric,
        lower_is_better=lower,
        comparison=parse_comparison(fields.child("comparison"), declared),
        secondary={name: parse_comparison(secondary.child(name), declared) for name in _names(secondary)},
        published=fields.child("published").content,
        budget=fields.child("budget").content,
        presets={name: _preset(name, fields, declared) for name in _names(fields.child("presets"))},
        path=path,
        curves=_curves(fields),
        command=fields.choice("command", CELL_COMMANDS, "train"),
    )
    _check_placeholders(study)
    return study


def _curves(fields: Fields) -> tuple[CurveSpec, ...]:
    given = fields.content.get("curves") or []
    if not isinstance(given, list):
        raise fields.error("curves", "a list of curves, such as [{metric: val/accuracy, against: flops}]")
    found = []
    for number, entry in enumerate(given):
        item = Fields(entry, fields.file, f"curves[{number}]")
        item.only(("metric", "against"))
        found.append(CurveSpec(_metric(item, "metric"), item.choice("against", CURVE_COSTS)))
    if len(set(found)) != len(found):
        raise fields.error("curves", "each curve once")
    return tuple(found)


def _metric(fields: Fields, key: str) -> str:
    name = fields.text(key)
    if not re.fullmatch(r"\w+/[\w.@/-]+", name):
        raise fields.error(key, "split/name, such as test/errors")
    return name


def _names(fields: Fields) -> list[str]:
    """The keys of a mapping of named things; each becomes part of a directory or column name."""
    for key in fields.content:
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise StudyError(
                f"{fields.file}: {fields.path(key)}: the name {key!r} cannot be used; expected a text of letters, "
                "digits and _ . + - (quote words that YAML reads as something else, such as on, no, 1)"
            )
    return list(fields.content)


def _requires(fields: Fields) -> dict[str, Requirement]:
    group = fields.child("requires")
    found = {}
    for name in _names(group):
        entry = group.child(name)
        entry.only(("command", "overrides"))
        found[name] = Requirement(
            name, entry.choice("command", ("train", "cache", "traces")), entry.texts("overrides", ())
        )
    return found


def _arm(name: str, fields: Fields, factors: Mapping[str, Mapping[str, tuple[str, ...]]]) -> Arm:
    group = fields.child("arms")
    if isinstance(group.content[name], list):
        return Arm(name, group.texts(name), factors=tuple(factors))
    entry = group.child(name)
    entry.only(("overrides", "seeds", "factors", "note"))
    chosen = entry.texts("factors", tuple(factors))
    for factor in chosen:
        if factor not in factors:
            raise entry.error("factors", f"names of declared factors; {nearest(factor, factors)}")
    seeds = entry.seeds("seeds") if entry.has("seeds") else None
    return Arm(
        name, entry.texts("overrides", ()), seeds, tuple(f for f in factors if f in chosen), entry.text("note", "")
    )


def _factors(fields: Fields) -> dict[str, dict[str, tuple[str, ...]]]:
    group = fields.child("factors")
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name in _names(group):
        levels = group.child(name)
        if not levels.content:
            raise group.error(name, "a mapping of level labels to overrides, such as {4: [method.temperature=4]}")
        found[name] = {}
        for key in levels.content:
            label = label_of(key)
            if label is None or not _NAME.fullmatch(label):
                raise StudyError(
                    f"{fields.file}: {levels.path(key)}: {key!r} is no level label; expected text or a number"
                )
            found[name][label] = levels.texts(key)
    return found


def _preset(name: str, fields: Fields, declared: Declared) -> Preset:
    entry = fields.child("presets").child(name)
    entry.only(("base", "requires", "seeds", "arms", "levels", "note"))
    arms = entry.texts("arms") if entry.has("arms") else None
    for arm in arms or ():
        if arm not in declared.arms:
            raise entry.error("arms", f"names of declared arms; {nearest(arm, declared.arms)}")
    required, levels = entry.child("requires"), entry.child("levels")
    required.only(declared.requires)
    levels.only(declared.factors)
    kept = {}
    for factor, given in levels.content.items():
        labels = tuple(str(item) for item in given) if isinstance(given, list) else ()
        if not labels or any(label not in declared.factors[factor] for label in labels):
            raise levels.error(factor, f"a list of levels of {factor!r}; {nearest('', declared.factors[factor])}")
        kept[factor] = labels
    seeds = entry.seeds("seeds") if entry.has("seeds") else None
    extra = {key: required.texts(key) for key in required.content}
    return Preset(name, entry.texts("base", ()), extra, seeds, arms, kept, entry.text("note", ""))


def _check_placeholders(study: Study) -> None:
    """Every placeholder of every override has a value: {seed} in cells, {requires.NAME} of what ran earlier."""
    values: dict[str, str] = {}
    try:
        for requirement in study.requires.values():
            extra = [item for preset in study.presets.values() for item in preset.requires.get(requirement.name, ())]
            fill_placeholders([*requirement.overrides, *extra], values)
            values[f"requires.{requirement.name}"] = ""
        for name in (None, *study.presets):
            found = cells(study, name)
            _check_arms_needed(study, found, name)
            for cell in found:
                fill_placeholders(cell.overrides, {"seed": "", **values, **{f"arms.{arm}": "" for arm in cell.needs}})
    except StudyError as error:
        raise StudyError(f"{study.path}: {error}") from None


def _check_arms_needed(study: Study, found: Sequence[Cell], preset: str | None) -> None:
    """A cell goes on from the run of an arm that is declared before it, has no factors and runs with the same seed."""
    seen: set[tuple[str, int]] = set()
    for cell in found:
        for name in sorted(cell.needs):
            if name not in study.arms:
                raise StudyError(f"{{arms.{name}}} in {cell.arm} names no arm; {nearest(name, study.arms)}")
            if study.arms[name].factors:
                raise StudyError(
                    f"{{arms.{name}}} in {cell.arm} names an arm that is crossed with factors, so that it has several "
                    "runs of one seed; give that arm `factors: []`"
                )
            if (name, cell.seed) not in seen:
                where = f" in the preset {preset}" if preset else ""
                raise StudyError(
                    f"{{arms.{name}}} in {cell.arm}: {name} is declared later, or has no run with seed {cell.seed}"
                    f"{where}; declare it first, with the same seeds"
                )
        seen.add((cell.arm, cell.seed))
