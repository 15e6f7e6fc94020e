"""Optuna's samplers and pruners by name, from the settings that a config writes out.

Imports Optuna when something is built, and nothing of it before: every command loads this module's neighbours.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from research.errors import ConfigError
from research.schemas import nearest
from research.sweeps.storages import experimental, missing_package, one_of

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "gp": "GPSampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
    "brute_force": "BruteForceSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "grid": "RandomSampler",  # a grid's points are listed as trials before the first one is drawn
}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "patient": "PatientPruner",
    "threshold": "ThresholdPruner",
    "wilcoxon": "WilcoxonPruner",
}
SINGLE_OBJECTIVE = ("cmaes",)


def build_sampler(node: Mapping[str, Any], seed: int | None, sequence: int | None = None) -> "BaseSampler":
    """The sampler that a config names, every setting as written there. Raises ConfigError for what it does not take.

    sequence   seed of the one sequence of points that all processes of a sweep go along (qmc); None: as `seed`
    """
    import optuna

    given = {str(key): value for key, value in node.items() if value is not None}
    name = one_of(given.pop("name", None), SAMPLERS, "sampler")
    made = getattr(optuna.samplers, SAMPLERS[name])
    given.pop("seed", None)
    if name in ("grid", "random"):
        given = {key: value for key, value in given.items() if key not in _all_settings(optuna.samplers, SAMPLERS)}
    _check_settings(made, given, f"sampler {name}")
    if name == "qmc" and sequence is not None:  # its points outside the sequence, such as the first, by `seed` still
        given["independent_sampler"], seed = optuna.samplers.RandomSampler(seed=seed), sequence
    try:
        with experimental():
            return made(seed=seed, **given)
    except ImportError as error:
        raise missing_package(f"sampler {name}", error) from None


def build_pruner(node: Mapping[str, Any]) -> "BasePruner":
    """The pruner that a config names; `wrapped` of a patient one is another such node."""
    import optuna

    given = {str(key): value for key, value in node.items() if value is not None}
    name = one_of(given.pop("name", None), PRUNERS, "pruner")
    made = getattr(optuna.pruners, PRUNERS[name])
    if name == "none":
        given = {key: value for key, value in given.items() if key not in _all_settings(optuna.pruners, PRUNERS)}
    if name == "patient":
        wrapped = given.pop("wrapped", None)
        given["wrapped_pruner"] = build_pruner(wrapped) if wrapped else None
    else:
        _check_settings(made, given, f"pruner {name}")
    try:
        with experimental():
            return made(**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"pruner {name} refuses its settings: {error}") from None


def _all_settings(module: Any, names: Mapping[str, str]) -> set[str]:
    """What any of the others can be set to: left over in a search file when one is exchanged for its control."""
    kinds = [getattr(module, name) for name in set(names.values())]
    return {"wrapped", *(key for kind in kinds for key in inspect.signature(kind.__init__).parameters)}


def _check_settings(made: Any, given: Mapping[str, Any], where: str) -> None:
    known = [name for name in inspect.signature(made.__init__).parameters if name != "self"]
    for key in given:
        if key not in known:
            raise ConfigError(f"{where} has no setting {key}{nearest(key, known)}; its settings: {', '.join(known)}")
