"""From a sweeper's options to a sweep: everything is checked before the first trial is made."""

import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from research.errors import ConfigError
from research.schemas import nearest
from research.sweeps.engines import SINGLE_OBJECTIVE, build_pruner, build_sampler, storage_spec
from research.sweeps.search_space import Parameter, SearchSpace, parse_space
from research.sweeps.sweep_controller import SweepController, SweepPlan, quiet_launches
from research.sweeps.sweep_progress import watching_sweep
from research.sweeps.sweep_report import Compose, build_sweep_report, save_terms
from research.sweeps.trial_context import application_program
from research.sweeps.trial_runs import RunPlan, TrialRuns, own_program, refuse_in_a_rank
from research.sweeps.trial_store import SweepTerms, TrialStore
from research.sweeps.trial_work import SweepLimits, TrialWork, key_of

log = logging.getLogger(__name__)
MAPPINGS = ("objectives", "constraints", "hypervolume", "params", "zipped", "fixed", "copy_from")
DIRECTIONS = ("minimize", "maximize")
QUIET = "hydra.job_logging.root.handlers=[file]"
OF_SWEEPS = ("hydra.sweep", "hydra/sweep", "hydra.launcher", "hydra/launcher", "hydra.mode", "hydra.run.")


def sweep(
    options: Mapping[str, Any],
    arguments: Sequence[str],
    hydra_context: HydraContext,
    task: TaskFunction,
    config: DictConfig,
    launcher_for: Callable[[TaskFunction, DictConfig], Any],
    *,
    is_shown: bool = True,
) -> tuple[list[Any], TrialStore]:
    """Run a sweep, or go on with it, and write its report.

    options   keywords of the sweeper, as :func:`normalised` gives them
    is_shown  whether a display says how far it is, and its end what it left
    Returns the launcher's returns, launch by launch, and the trials.
    """
    import optuna

    refuse_in_a_rank()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    sweep_dir = Path(str(config.hydra.sweep.dir)).absolute()
    loader = hydra_context.config_loader
    space, fixed = parse_space(
        options["params"], arguments, zipped=options["zipped"], conditional=options["conditional"], config_loader=loader
    )
    if not space.parameters and (options["sampler"] or {}).get("name") != "grid":  # a grid of nothing is one point
        raise ConfigError("nothing is searched; give a key several values, such as lr='interval(0.001,0.1)' or x=1,2")
    terms = _terms(options, space, sweep_dir, config)
    _check_seeds(options, space)
    own = run_overrides(config)
    _check_composes(space, [*fixed, *own, *_first_seed(options)], loader, config)
    plan = _plan(options, config, terms)
    work = TrialWork(
        store=TrialStore(terms),
        space=space,
        runs=TrialRuns(task, hydra_context, _run_plan(options, config)),
        sweep_dir=str(sweep_dir),
        fixed=tuple(fixed),
        order=tuple(key_of(argument) for argument in arguments),
        gpus=_gpus(options["gpus"], plan.n_jobs),
    )
    _make_folder(sweep_dir)
    quiet = quiet_launches(config)
    remembered = {
        "space": space.described(),
        "fixed": sorted(fixed),
        "seeds": list(options["seeds"]),
        "directions": list(terms.directions),
        "objectives": list(terms.objectives),
    }
    controller = SweepController(
        plan, work, task, lambda wrapped: launcher_for(wrapped, quiet), remembered, folders_of(loader, config)
    )
    controller.open()
    _keep_config(config, terms, sweep_dir)
    try:
        return controller.run(watching_sweep if is_shown else lambda store, target: nullcontext()), work.store
    finally:
        _report(work.store, sweep_dir, composer(loader, str(config.hydra.job.config_name), own), is_shown)


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


def composer(loader: Any, config_name: str, own: Sequence[str] = ()) -> Compose:
    """Composes an application's config as a single run would, from a list of overrides; `own` are Hydra's."""

    def compose(overrides: list[str]) -> DictConfig:
        found: DictConfig = loader.load_configuration(
            config_name=config_name, overrides=[*overrides, *own], run_mode=RunMode.RUN
        )
        return found

    return compose


def folders_of(loader: Any, config: DictConfig) -> Callable[[int, list[str]], str] | None:
    """Trial's number, overrides -> its folder by the template of hydra.sweep.subdir; None where that has the number."""
    template: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if re.search(r"hydra[.:]job\.(num|id)", str(template["subdir"])):
        return None

    def folder(number: int, overrides: list[str]) -> str:
        found = loader.load_sweep_config(config, overrides)
        return str(Path(str(found.hydra.sweep.dir), str(found.hydra.sweep.subdir)).absolute())

    return folder


def _application(config: DictConfig) -> str:
    """The name of the config that trials are made of, where `distill report` can find it again."""
    return f"distill {config.hydra.job.config_name}" if application_program() else str(config.hydra.job.name)


def _terms(options: Mapping[str, Any], space: SearchSpace, sweep_dir: Path, config: DictConfig) -> SweepTerms:
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
    if not 0 < float(options["lease_s"]) < float(options["stale_s"]):
        raise ConfigError(
            f"hydra.sweeper.lease_s is {options['lease_s']} and stale_s {options['stale_s']}; a trial must give "
            "several signs of life before it counts as interrupted"
        )
    for key in options["constraints"]:
        if not objectives:
            raise ConfigError(
                f"constraints.{key} bounds a returned metric, so the task must return a mapping; set objectives"
            )
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


def _check_seeds(options: Mapping[str, Any], space: SearchSpace) -> None:
    seeds, key = [int(seed) for seed in options["seeds"]], options["seed_key"]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"hydra.sweeper.seeds is {seeds}; give each seed once")
    if seeds and any(key.lstrip("+") in parameter.keys for parameter in space.parameters):
        raise ConfigError(f"{key} is searched, and hydra.sweeper.seeds gives it values too; leave one of them out")


def _first_seed(options: Mapping[str, Any]) -> list[str]:
    return [f"{options['seed_key']}={int(seed)}" for seed in options["seeds"][:1]]


def _plan(options: Mapping[str, Any], config: DictConfig, terms: SweepTerms) -> SweepPlan:
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


def _run_plan(options: Mapping[str, Any], config: DictConfig) -> RunPlan:
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


def _check_composes(space: SearchSpace, fixed: Sequence[str], loader: Any, config: DictConfig) -> None:
    """Compose one trial for every value of every group and block: a typing error costs no trial."""
    name = config.hydra.job.config_name
    for point in _samples(space):
        overrides = [*fixed, *space.overrides(point)]
        try:
            loader.load_configuration(config_name=name, overrides=overrides, run_mode=RunMode.RUN)
        except HydraException as error:
            told = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ConfigCompositionException(
                f"a trial does not compose ({', '.join(space.overrides(point))}): {told}{_near(told, config)}"
            ) from None


def _samples(space: SearchSpace) -> list[dict[str, Any]]:
    """Points that together show every value of every discrete parameter, and both ends of the others."""
    widest = max((len(_shown(parameter)) for parameter in space.parameters), default=1)
    found = [_point(space, {}, number) for number in range(widest)]
    for parameter in space.parameters:  # a block whose condition no point above met
        if parameter.when and not any(parameter.name in point for point in found):
            found.append(_point(space, {name: values[0] for name, values in parameter.when}, 0))
    return found


def _point(space: SearchSpace, wanted: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The point of the wanted values and, of every other parameter, its value with that number."""

    def value(parameter: Parameter) -> Any:
        shown = _shown(parameter)
        return wanted.get(parameter.name, shown[number % len(shown)])

    return space.draw(value)


def _shown(parameter: Parameter) -> list[Any]:
    return parameter.values() if parameter.choices else [parameter.low, parameter.high]


def _near(told: str, config: DictConfig) -> str:
    """The nearest key of the config, where Hydra says that it knows none of that name."""
    named = re.search(r"Could not override '([^']+)'", told)
    if not named:
        return ""
    return nearest(named[1].lstrip("+"), _keys(OmegaConf.to_container(config, resolve=False)))


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, Mapping):
        return []
    found = []
    for key, value in node.items():
        if prefix or key != "hydra":
            found += [f"{prefix}{key}", *_keys(value, f"{prefix}{key}.")]
    return found


def _gpus(given: Any, n_jobs: int) -> tuple[str, ...]:
    """One GPU for every worker where there are several; what the user says goes first."""
    if given is not None:
        return tuple(str(one) for one in given)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if n_jobs == 1:
        return ()
    if visible is not None:
        found = [one.strip() for one in visible.split(",") if one.strip()]
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        found = [
            str(number)
            for number, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU"))
        ]
    else:
        found = []
    return tuple(found) if len(found) > 1 else ()


def _keep_config(config: DictConfig, terms: SweepTerms, sweep_dir: Path) -> None:
    """What Hydra keeps of a multirun, and what a report needs; of a command that was not refused."""
    OmegaConf.save(config, sweep_dir / "multirun.yaml")
    save_terms(terms, sweep_dir, _application(config))


def _make_folder(sweep_dir: Path) -> None:
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=sweep_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f"the sweep folder {sweep_dir} cannot be written: {error.strerror}; set hydra.sweep.dir"
        ) from None


def _report(store: TrialStore, sweep_dir: Path, compose: Compose, is_shown: bool) -> None:
    """Write what there is to tell; a sweep whose report fails has still run."""
    try:
        told = build_sweep_report(store, sweep_dir, compose)
        if is_shown:
            print(told)
    except Exception:
        log.exception("the report of %s could not be written; `distill report %s` tries again", sweep_dir, sweep_dir)
