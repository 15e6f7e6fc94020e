"""From a plain description to a network: the same route for configs, run folders and checkpoints.

A description is data, wherever it comes from: `_target_` is imported only under the allowed prefixes, and every other
key must be a parameter of that class.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from research.arguments import check_names, check_types, locate_target, missing_arguments
from research.errors import ConfigError

ALLOWED_PREFIXES: tuple[str, ...] = ("research.models.", "torch.nn.")


def allow_prefix(prefix: str) -> None:
    """Let descriptions name classes under one more import prefix, such as "my_package.models."."""
    global ALLOWED_PREFIXES
    if prefix not in ALLOWED_PREFIXES:
        ALLOWED_PREFIXES = (*ALLOWED_PREFIXES, prefix)


def build_network(
    description: Mapping[str, Any], *, input_shape: Sequence[int], num_classes: int, key: str = "model"
) -> nn.Module:
    """The network of a description, fitted to the data's input shape and number of classes.

    Raises ConfigError, naming `key`, for a target that is no network defined under the allowed prefixes, and for keys
    that are unknown, missing, of another type, or the data's to set.
    """
    network_class = _network_class(description.get("_target_"), key)
    arguments = {name: value for name, value in description.items() if name != "_target_"}
    parameters = inspect.signature(network_class).parameters
    check_names(network_class, str(description["_target_"]), key, arguments)
    facts: dict[str, Any] = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    for name in arguments.keys() & facts.keys():
        raise ConfigError(f"{key}.{name} is set by the data, which have {facts[name]!r}; leave it out")
    check_types(network_class, key, arguments)
    arguments |= {name: fact for name, fact in facts.items() if name in parameters}
    for name in missing_arguments(network_class, arguments):
        raise ConfigError(f"{key}.{name} is not set; {network_class.__name__} needs it")
    return network_class(**arguments)


def _network_class(target: object, key: str) -> type[nn.Module]:
    if not isinstance(target, str) or not target.startswith(ALLOWED_PREFIXES):
        raise ConfigError(
            f"{key}._target_ is {target!r}; expected a class under {', '.join(ALLOWED_PREFIXES)} "
            "(add a prefix in Python with research.models.build.allow_prefix)"
        )
    found = locate_target(target, key, ALLOWED_PREFIXES)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ConfigError(f"{key}._target_ is {target!r}, which is not a torch.nn.Module class")
    return found


def describe(description: Mapping[str, Any], *, input_shape: Sequence[int], num_classes: int) -> dict[str, Any]:
    """What a folder or checkpoint stores so that :func:`rebuild` needs nothing else."""
    return {"network": dict(description), "input_shape": list(input_shape), "num_classes": num_classes}


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """The network, untrained, of a stored architecture; raises ConfigError where it does not have the three fields."""
    try:
        network, shape, classes = (architecture[name] for name in ("network", "input_shape", "num_classes"))
        description = dict(network)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"a stored architecture is damaged ({error}); expected network, input_shape and num_classes"
        ) from None
    with torch.random.fork_rng(devices=[]):  # stored weights follow: a run's random numbers are not for its teachers
        return build_network(description, input_shape=shape, num_classes=classes)
