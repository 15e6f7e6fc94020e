"""From a sweeper's options to what a sweep is made of, checked: every mistake is told before the first trial."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from research.errors import ConfigError
from research.schemas import nearest
from research.sweeps.engines import SINGLE_OBJECTIVE, build_pruner, build_sampler
from research.sweeps.search_space import SearchSpace
from research.sweeps.storages import storage_spec
from research.sweeps.sweep_plan import SweepLimits, SweepPlan
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_constraints import ON_OUT_OF_MEMORY, OUT_OF_MEMORY
from research.sweeps.trial_context import application_program
from research.sweeps.trial_runs import RunPlan, own_program

MAPPINGS = ("objectives", "constraints", "hypervolume", "params", "zipped", "fixed", "copy_from")
DIRECTIONS = ("minimize", "maximize")
QUIET = "hydra.job_logging.root.handlers=[file]"
OF_SWEEPS = ("hydra.sweep", "hydra/sweep", "hydra.launcher", "hydra/launcher", "hydra.mode", "hydra.run.")


def normalised(options: Any) -> dict[str, Any]:
    """A sweeper's keywords as plain containers, its mappings {} where they are null.

    Hydra 1.3 gives config nodes, 1.4 plain containers.
    """
    items: Any = OmegaConf.to_container(options, resolve=True) if OmegaConf.is_config(options) else options
    found = {str(key): _container(value) for key, value in items.items()}
    return found | {key: found.get(key) or {} for key in MAPPINGS}


def _container(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return dict(value) if isinstance(value, Mapping) else value


def run_overrides(config: DictConfig) -> tuple[str, ...]:
    """The command's overrides of Hydra's own config that hold for a single run too, such as hydra.searchpath."""
    given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    return tuple(str(text) for text in given if not str(text).lstrip("+~").startswith(OF_SWEEPS))


def sweep_terms_of(options: Mapping[str, Any], space: SearchSpace, sweep_dir: Path, config: DictConfig) -> SweepTerms:
    """What all processes of the sweep must know, checked."""
    directions, objectives = _objectives(options)
    sampler, pruner = dict(options["sampler"] or {}), dict(options["pruner"] or {})
    if sampler.get("name") == "tpe" and sampler.get("group") is None:
        sampler["group"] = space.is_conditional and bool(sampler.get("multivariate"))
    if sampler.get("name") == "tpe" and space.is_conditional and sampler.get("multivariate") and not sampler["group"]:
        raise ConfigError(
            "hydra.sweeper.sampler.multivariate draws conditional parameters independently, and without saying so, "
            "where group is false; leave group to null"
        )
    _check_engines(sampler, pruner, directions, options)
    if not 0 < float(options["lease_s"]) < float(options["stale_s"]):
        raise ConfigError(
            f"hydra.sweeper.lease_s is {options['lease_s']} and stale_s {options['stale_s']}; a trial must give "
            "several signs of life before it counts as interrupted"
        )
    _check_constraints(options, objectives)
    return SweepTerms(
        storage=storage_spec(options["storage"] or {}, sweep_dir),
        name=options["study_name"] or sweep_dir.name,
        directions=directions,
        objectives=objectives,
        constraints={str(key): float(bound) for key, bound in options["constraints"].items()},
        box=_box(options["hypervolume"], objectives),
        sampler=sampler,
        pruner=pruner,
        fixed=space.check_point(options["fixed"], "fixed"),
        lease_s=float(options["lease_s"]),
        stale_s=float(options["stale_s"]),
        max_attempts=int(options["max_attempts"]),
        retries=int(options["retries"]),
        out_of_memory=options["out_of_memory"],
    )


def _check_engines(
    sampler: Mapping[str, Any], pruner: Mapping[str, Any], directions: Sequence[str], options: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a sampler or a pruner that cannot be built, or not for this search."""
    build_sampler(sampler, None)
    build_pruner(pruner)
    name = pruner.get("name")
    if name != "none" and len(directions) > 1:
        raise ConfigError(
            f"pruner {name} compares one value, and there are {len(directions)} objectives; give pruner none"
        )
    if name == "wilcoxon" and not options["seeds"]:
        raise ConfigError("pruner wilcoxon compares trials seed by seed; give hydra.sweeper.seeds, such as [0,1,2,3,4]")
    if len(directions) > 1 and sampler["name"] in SINGLE_OBJECTIVE:
        raise ConfigError(
            f"sampler {sampler['name']} searches for one value, and there are {len(directions)} objectives; give "
            "nsgaii, tpe or gp"
        )
    if options["fixed"] and sampler["name"] == "brute_force":
        raise ConfigError(
            "sampler brute_force would wait for the values that hydra.sweeper.fixed leaves out; give sampler grid, "
            "which tries every point that is left"
        )


def _check_constraints(options: Mapping[str, Any], objectives: Sequence[str]) -> None:
    given = options["out_of_memory"]
    if given not in ON_OUT_OF_MEMORY:
        raise ConfigError(f"hydra.sweeper.out_of_memory is {given!r}; expected {' or '.join(ON_OUT_OF_MEMORY)}")
    for key in options["constraints"]:
        if not objectives:
            raise ConfigError(
                f"constraints.{key} bounds a returned metric, so the task must return a mapping; set objectives"
            )
        if str(key) == OUT_OF_MEMORY:
            raise ConfigError(
                f"constraints.{key} has the name under which the sweeper keeps what ran out of memory; give the metric "
                "another name"
            )


def _box(given: Mapping[str, Any], objectives: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Worst and best of both objectives, by which a hypervolume is measured."""
    if given and (set(given) != set(objectives) or len(objectives) != 2):
        raise ConfigError(
            f"hydra.sweeper.hypervolume names {', '.join(map(str, given))}; give [worst, best] of the two objectives"
        )
    box = {str(name): (float(ends[0]), float(ends[1])) for name, ends in given.items()}
    if any(worst == best for worst, best in box.values()):
        raise ConfigError(f"hydra.sweeper.hypervolume is {given}; worst and best must differ")
    return box


def _objectives(options: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    given = options["objectives"]
    if given:
        names, directions = tuple(map(str, given)), tuple(map(str, given.values()))
    else:
        single = options["direction"]
        names, directions = (), tuple(map(str, single if isinstance(single, list | tuple) else [single]))
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ConfigError(
                f"the direction {direction!r}{nearest(direction, DIRECTIONS)}; expected {' or '.join(DIRECTIONS)}"
            )
    for name in (*names, *options["constraints"]):
        if str(name).startswith(("test/", "test_")):
            raise ConfigError(
                f"{name} is measured on the test split, which is reported once; search by a metric of validation, "
                f"such as val/{str(name).partition('/')[2] or 'errors'}"
            )
    return directions, names


def check_seeds(options: Mapping[str, Any], space: SearchSpace) -> None:
    seeds, key = [int(seed) for seed in options["seeds"]], options["seed_key"]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"hydra.sweeper.seeds is {seeds}; give each seed once")
    if seeds and any(key.lstrip("+") in parameter.keys for parameter in space.parameters):
        raise ConfigError(f"{key} is searched, and hydra.sweeper.seeds gives it values too; leave one of them out")


def first_seed(options: Mapping[str, Any]) -> list[str]:
    return [f"{options['seed_key']}={int(seed)}" for seed in options["seeds"][:1]]


def sweep_plan_of(options: Mapping[str, Any], config: DictConfig, terms: SweepTerms) -> SweepPlan:
    for key in ("target", "patience"):
        if options[key] is not None and len(terms.directions) > 1:
            raise ConfigError(
                f"hydra.sweeper.{key} looks at one value, and there are {len(terms.directions)} objectives; give "
                "n_trials or timeout"
            )
    jobs = options["n_jobs"]
    if jobs is None:
        jobs = OmegaConf.select(config, "hydra.launcher.n_jobs", default=None) or 1
    copied = options["copy_from"] or {}
    return SweepPlan(
        n_trials=int(options["n_trials"]),
        n_jobs=os.cpu_count() or 1 if jobs == -1 else int(jobs),
        mode=options["mode"],
        enqueue=tuple(options["enqueue"]),
        copy_from=dict(copied),
        resume=options["resume"],
        on_change=options["on_change"],
        limits=SweepLimits(
            timeout=options["timeout"],
            target=options["target"],
            patience=options["patience"],
            max_failures=options["max_failures"],
            max_failure_rate=options["max_failure_rate"],
        ),
        sampler_seed=(options["sampler"] or {}).get("seed"),
    )


def run_plan_of(options: Mapping[str, Any], config: DictConfig) -> RunPlan:
    handlers = OmegaConf.select(config, "hydra.job_logging.root.handlers", default=None)
    has_file = OmegaConf.select(config, "hydra.job_logging.handlers.file", default=None) is not None
    return RunPlan(
        seeds=tuple(int(seed) for seed in options["seeds"]),
        seed_key=options["seed_key"],
        subprocess=bool(options["subprocess"]),
        program=application_program() or own_program(),
        quiet=(QUIET,) if handlers and has_file else (),
        hydra=run_overrides(config),
        prune_on=_on_validation(options["prune_on"]),
        prune_step=options["prune_step"],
    )


def _on_validation(metric: str | None) -> str | None:
    if metric is not None and not metric.startswith("val/"):
        raise ConfigError(
            f"hydra.sweeper.prune_on is {metric!r}; only metrics of validation select: give one of val/..."
        )
    return metric
