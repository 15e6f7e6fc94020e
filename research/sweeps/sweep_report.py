"""What a sweep leaves: its trials as a table, the best one as a file that runs, and figures. From the storage alone."""

import csv
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig

from research.errors import ConfigError
from research.results.record import collect_versions, write_atomic
from research.sweeps.best_experiment import experiment_text
from research.sweeps.sweep_progress import best_line, told
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_constraints import is_feasible, ran_out_of_memory
from research.sweeps.trial_store import TrialStore

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

TRIALS_CSV, TRIALS_PARQUET, BEST, RESULTS = "trials.csv", "trials.parquet", "best.yaml", "optimization_results.yaml"
TERMS_FILE = "sweep.yaml"
FEWEST_FOR_FIGURES = 2
FIGURES = {"history": "plot_optimization_history", "slice": "plot_slice", "importance": "plot_param_importances"}


Compose = Callable[[list[str]], DictConfig]


def build_sweep_report(store: TrialStore, sweep_dir: Path, compose: Compose | None) -> str:
    """Write the report into the sweep's folder; returns a few lines to print. Works while the sweep runs.

    compose  the application's config for a list of overrides; None: it is not at hand, and best.yaml stays as it is
    """
    trials = store.trials()
    rows = [trial_row(trial, store.terms) for trial in trials]
    _write_table(rows, sweep_dir)
    best = store.best_trials()
    _write_results(best, store, sweep_dir)
    if compose is not None:
        _write_best(best, store, sweep_dir, compose)
    written = _write_figures(store, sweep_dir)
    names = [TRIALS_CSV, TRIALS_PARQUET, *([BEST] if best else []), RESULTS, *written]
    lines = [f"{store.terms.name}: {told(store.counts())}", best_line(store), f"{sweep_dir}: {', '.join(names)}"]
    return "\n".join(line for line in lines if line)


def trial_row(trial: "FrozenTrial", terms: SweepTerms) -> dict[str, Any]:
    """One trial as a row: number, state, values, parameters, seed, what it took, why it failed, and where it lies."""
    attrs = trial.user_attrs
    begun = attrs.get("begun", {})
    has_none = trial.values is None or ran_out_of_memory(trial)
    values = dict(zip(value_names(terms), [None] * len(terms.directions) if has_none else trial.values, strict=True))
    spread = dict(zip(value_names(terms), attrs.get("standard_deviation", []), strict=False))
    return {
        "number": trial.number,
        "state": state_of(trial),
        **values,
        **{f"{name}_sd": value for name, value in spread.items()},
        **{f"param:{name}": value for name, value in trial.params.items()},
        **{f"metric:{name}": attrs.get("metrics", {}).get(name) for name in terms.constraints},
        "feasible": is_feasible(trial) if trial.constraints else None,
        "seed": attrs.get("seed"),
        "last_step": max(trial.intermediate_values, default=None),
        "seconds": attrs.get("seconds"),
        "started_at": begun.get("at"),
        "attempts": attrs.get("attempts"),
        "retry_of": attrs.get("retry_of"),
        "seeds": " ".join(attrs.get("seed_results", {})) or None,
        "reason": attrs.get("reason"),
        "host": begun.get("host"),
        "revision": begun.get("revision"),
        "folder": attrs.get("folder"),
        "overrides": " ".join(attrs.get("overrides", [])) or None,
    }


def state_of(trial: "FrozenTrial") -> str:
    """What became of a trial, in the words of the table: out_of_memory is complete and infeasible to Optuna."""
    if ran_out_of_memory(trial):
        return "out_of_memory"
    return "failed" if trial.state.name == "FAIL" else trial.state.name.lower()


def value_names(terms: SweepTerms) -> tuple[str, ...]:
    """The objectives' names; a task that returns bare numbers has none."""
    count = len(terms.directions)
    return terms.objectives or (("value",) if count == 1 else tuple(f"value_{number}" for number in range(count)))


def save_terms(terms: SweepTerms, sweep_dir: Path, application: str) -> None:
    """Keep in the folder what is needed to open the sweep again (`distill report FOLDER`), and Optuna's version.

    application  names the config that trials are composed from
    """
    storage = {key: value for key, value in terms.storage.__dict__.items() if value is not None}
    told = {
        "study_name": terms.name,
        "storage": {**storage, "engine": dict(terms.storage.engine)},
        "directions": list(terms.directions),
        "objectives": list(terms.objectives),
        "constraints": dict(terms.constraints),
        "application": application,
        "versions": collect_versions(("optuna",)),
    }
    write_atomic(sweep_dir / TERMS_FILE, yaml.safe_dump(told, sort_keys=False).encode())


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / TERMS_FILE).exists()


def report_again(folder: Path, composers: Mapping[str, Compose]) -> str:
    """Rebuild a sweep's report from its storage. Raises ConfigError where that is gone.

    composers  application -> what composes its configs, of those that are at hand
    """
    from research.sweeps.storages import StorageSpec

    told_terms = yaml.safe_load((folder / TERMS_FILE).read_text())
    spec = StorageSpec(**told_terms["storage"])
    if spec.name == "memory":
        raise ConfigError(
            f"{folder} was swept with storage memory, which ended with its process; its files are as it left them"
        )
    if spec.name == "journal" and not Path(str(spec.path)).exists():
        moved = folder / Path(str(spec.path)).name
        if not moved.exists():
            raise ConfigError(f"{folder} keeps its study in {spec.path}, which is gone")
        spec = StorageSpec(spec.name, path=str(moved.absolute()))
    terms = SweepTerms(
        storage=spec,
        name=told_terms["study_name"],
        directions=tuple(told_terms["directions"]),
        objectives=tuple(told_terms["objectives"]),
        constraints=told_terms["constraints"],
    )
    return build_sweep_report(TrialStore(terms), folder, composers.get(told_terms["application"]))


def _write_table(rows: list[dict[str, Any]], folder: Path) -> None:
    """The table as CSV and parquet, parameters that only some trials have left empty in the others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(key for row in rows for key in row))
    first = [c for c in columns if not c.startswith("param:")]
    at = next((n for n, c in enumerate(first) if c in ("feasible",)), len(first))
    columns = [*first[:at], *(c for c in columns if c.startswith("param:")), *first[at:]]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / TRIALS_CSV, text.getvalue().encode())
    table = pa.table({column: _column([row.get(column) for row in rows]) for column in columns})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    write_atomic(folder / TRIALS_PARQUET, sink.getvalue())


def _column(values: list[Any]) -> list[Any]:
    """Values of one kind: a parameter whose choices are of several kinds is written as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values] if float in kinds else values
    return values if len(kinds) <= 1 else [None if value is None else str(value) for value in values]


def _write_results(best: "list[FrozenTrial]", store: TrialStore, folder: Path) -> None:
    """The file that hydra's own Optuna plugin leaves, for what reads it."""
    if len(store.terms.directions) == 1:
        found: Mapping[str, Any] = {
            "name": "optuna",
            "best_params": dict(best[0].params) if best else {},
            "best_value": best[0].values[0] if best else None,
        }
    else:
        found = {"name": "optuna", "solutions": [{"params": dict(t.params), "values": list(t.values)} for t in best]}
    write_atomic(folder / RESULTS, yaml.safe_dump(dict(found), sort_keys=False).encode())


def _write_best(best: "list[FrozenTrial]", store: TrialStore, folder: Path, compose: Compose) -> None:
    """The best trial as an experiment; of several objectives one file for each trial that no other beats."""
    several = len(store.terms.directions) > 1
    kept = {f"pareto_{trial.number}.yaml" for trial in best}
    for old in folder.glob("pareto_*.yaml"):
        if old.name not in kept or not several:
            old.unlink(missing_ok=True)  # another command's report may have been quicker
    for trial in best:
        values = ", ".join(f"{n} {v:.6g}" for n, v in zip(value_names(store.terms), trial.values, strict=True))
        comment = f"trial {trial.number} of the sweep {store.terms.name}: {values}"
        text = experiment_text(trial.user_attrs.get("overrides", []), compose, comment)
        write_atomic(folder / (f"pareto_{trial.number}.yaml" if several else BEST), text.encode())
    if several and best:  # the first objective's best, so that there is one file with this name always
        sign = -1.0 if store.terms.directions[0] == "maximize" else 1.0
        first = min(best, key=lambda trial: sign * trial.values[0])
        write_atomic(folder / BEST, (folder / f"pareto_{first.number}.yaml").read_bytes())


def _write_figures(store: TrialStore, folder: Path) -> list[str]:
    """History, slices and importances, or the trade-off of two objectives; what cannot be drawn yet is left out."""
    import matplotlib
    import optuna

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as drawn

    complete = [t for t in store.trials() if state_of(t) == "complete"]
    if len(complete) < FEWEST_FOR_FIGURES:
        return []
    study = _with_values(store)
    wanted = {name: getattr(drawn, call) for name, call in FIGURES.items()}
    several = len(store.terms.directions) > 1
    arguments: dict[str, Any] = {}
    if several:
        wanted = {"pareto": drawn.plot_pareto_front} if len(store.terms.directions) < 4 else {}
        arguments = {"target_names": list(value_names(store.terms))}
    elif len(complete) < 4 or all(len({str(t.params.get(n)) for t in complete}) < 2 for n in complete[0].params):
        wanted.pop("importance")
    written = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna.logging.disable_default_handler()
        for name, draw in wanted.items():
            plt.close("all")
            try:
                draw(study, **({"target_name": value_names(store.terms)[0]} if not several else arguments))
            except (ValueError, RuntimeError):  # too few different trials for this figure
                continue
            plt.gcf().savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            written.append(f"{name}.png")
    plt.close("all")
    return written


def _with_values(store: TrialStore) -> Any:
    """The study for figures: where trials ran out of memory, a copy without them, since their values are infinite."""
    import optuna

    study = store.study()
    trials = study.get_trials(deepcopy=False)
    if not any(map(ran_out_of_memory, trials)):
        return study
    directions: Any = list(store.terms.directions)
    shown = optuna.create_study(study_name=store.terms.name, directions=directions)
    shown.add_trials([trial for trial in trials if not ran_out_of_memory(trial)])
    return shown
