"""From a sweeper's options to a sweep: everything is checked before the first trial is made."""

import copy
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from research.errors import ConfigError
from research.schemas import nearest
from research.sweeps.gpus import gpus_of
from research.sweeps.search_space import Parameter, SearchSpace
from research.sweeps.space_parser import parse_space
from research.sweeps.sweep_controller import SweepController
from research.sweeps.sweep_options import (
    check_seeds,
    first_seed,
    run_overrides,
    run_plan_of,
    sweep_plan_of,
    sweep_terms_of,
)
from research.sweeps.sweep_progress import told, watching_sweep
from research.sweeps.sweep_report import Compose, build_sweep_report, save_terms
from research.sweeps.sweep_terms import SweepTerms
from research.sweeps.trial_context import Check, application_check, application_program
from research.sweeps.trial_runs import TrialRuns, refuse_in_a_rank
from research.sweeps.trial_store import TrialStore
from research.sweeps.trial_values import NO_NUMBER
from research.sweeps.trial_work import TrialWork, errors_of, key_of

log = logging.getLogger(__name__)


def sweep(
    options: Mapping[str, Any],
    arguments: Sequence[str],
    hydra_context: HydraContext,
    task: TaskFunction,
    config: DictConfig,
    launcher_for: Callable[[TaskFunction, DictConfig], Any],
    *,
    check: Check | None = None,
    is_shown: bool = True,
) -> tuple[list[Any], TrialStore]:
    """Run a sweep, or go on with it, and write its report.

    options   keywords of the sweeper, as :func:`normalised` gives them
    check     what the application refuses of a trial; None: what it told with its program, if anything
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
    terms = sweep_terms_of(options, space, sweep_dir, config)
    check_seeds(options, space)
    own = run_overrides(config)
    check, always = check or application_check(), [*fixed, *own, *first_seed(options)]
    _check_composes(space, always, loader, config, lambda trial: check(trial, terms.objectives) if check else None)
    plan = sweep_plan_of(options, config, terms)
    work = TrialWork(
        store=TrialStore(terms),
        space=space,
        runs=TrialRuns(task, hydra_context, run_plan_of(options, config)),
        sweep_dir=str(sweep_dir),
        fixed=tuple(fixed),
        order=tuple(key_of(argument) for argument in arguments),
        gpus=gpus_of(options["gpus"], plan.n_jobs),
    )
    _make_folder(sweep_dir)
    quiet = quiet_launches(config)
    remembered = _remembered(space, fixed, options, terms)
    controller = SweepController(
        plan, work, task, lambda wrapped: launcher_for(wrapped, quiet), remembered, folders_of(loader, config)
    )
    controller.open()
    begun = []

    def begin() -> None:
        _keep_config(config, terms, sweep_dir)
        begun.append(True)

    try:
        return controller.run(watching_sweep if is_shown else lambda store, target: nullcontext(), begin), work.store
    finally:
        if begun:  # the report of a sweep that another command controls is that command's
            _report(work.store, sweep_dir, composer(loader, str(config.hydra.job.config_name), own), is_shown)


def _remembered(
    space: SearchSpace, fixed: Sequence[str], options: Mapping[str, Any], terms: SweepTerms
) -> dict[str, Any]:
    """What must be the same when the sweep goes on."""
    return {
        "space": space.described(),
        "fixed": sorted(fixed),
        "seeds": list(options["seeds"]),
        "directions": list(terms.directions),
        "objectives": list(terms.objectives),
        **({"constraints": dict(terms.constraints)} if terms.constraints else {}),
        **({"out_of_memory": terms.out_of_memory} if terms.out_of_memory != "fail" else {}),
    }


def refuse_fruitless(store: TrialStore, returns: Sequence[Any] = ()) -> None:
    """Raise ConfigError, with the first failure's reason and folder, where trials ended and none of them completed.

    An application that told nothing of itself has its own first error raised, as from Hydra's other sweepers. Its grid,
    if its task returns no number at all, is a plain multirun, not a search without a result.

    returns  what the launches returned
    """
    counts = store.counts()
    if not counts.finished or counts.complete:
        return
    ended = [trial for trial in store.trials() if trial.state.is_finished()]
    failed = [trial for trial in ended if trial.state.name == "FAIL"]
    are_no_numbers = all(str(trial.user_attrs.get("reason")).endswith(NO_NUMBER) for trial in ended)
    if are_no_numbers and store.terms.sampler["name"] == "grid" and not application_program():
        return
    first = (failed or ended)[0]
    reason = str(first.user_attrs.get("reason") or "no reason").rstrip(".")
    text = (
        f"no trial of the sweep {store.terms.name!r} was completed ({told(counts)}). Trial {first.number} ended with: "
        f"{reason}; see {first.user_attrs.get('folder')}"
    )
    own = next((error for launch in returns for error in errors_of(launch)), None)
    if failed and own is not None and not application_program():
        log.error(text)
        raise own
    raise ConfigError(text)


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


def _check_composes(
    space: SearchSpace,
    fixed: Sequence[str],
    loader: Any,
    config: DictConfig,
    check: Callable[[DictConfig], None] = lambda trial: None,
) -> None:
    """Compose one trial for every value of every group and block: a typing error costs no trial.

    check   told each composed trial; it raises ConfigError for what the application refuses
    """
    name = config.hydra.job.config_name
    for point in _samples(space):
        overrides = [*fixed, *space.overrides(point)]
        try:
            trial = loader.load_configuration(config_name=name, overrides=overrides, run_mode=RunMode.RUN)
        except HydraException as error:
            text = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise ConfigCompositionException(
                f"a trial does not compose ({', '.join(space.overrides(point))}): {text}{_near(text, config)}"
            ) from None
        check(trial)


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


def _near(text: str, config: DictConfig) -> str:
    """The nearest key of the config, where Hydra says that it knows none of that name."""
    named = re.search(r"Could not override '([^']+)'", text)
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


def quiet_launches(config: DictConfig) -> DictConfig:
    """A sweep's config whose launcher does not print a line for every job: the sweep has a display of its own."""
    config = copy.deepcopy(config)
    if OmegaConf.select(config, "hydra.hydra_logging.root") is not None:
        root = config.hydra.hydra_logging.root
        with read_write(root), open_dict(root):  # Hydra 1.4 hands out what may not be written to
            root.level = "WARNING"
    return config


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
        lines = build_sweep_report(store, sweep_dir, compose)
        if is_shown:
            print(lines)
    except Exception:
        log.exception("the report of %s could not be written; `distill report %s` tries again", sweep_dir, sweep_dir)
