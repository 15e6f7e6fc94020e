"""From a plain description to a network: the same route for configs, run folders and checkpoints.

A description is data, wherever it comes from: `_target_` is imported only under the allowed prefixes, and every other
key must be a parameter of that class.
"""

import difflib
import inspect
from collections.abc import Sequence
from pydoc import locate
from typing import Any

from torch import nn

from research.errors import ConfigError

ALLOWED_PREFIXES: tuple[str, ...] = ("research.models.", "torch.nn.")


def allow_prefix(prefix: str) -> None:
    """Let descriptions name classes under one more import prefix, such as "my_package.models."."""
    global ALLOWED_PREFIXES
    if prefix not in ALLOWED_PREFIXES:
        ALLOWED_PREFIXES = (*ALLOWED_PREFIXES, prefix)


def build_network(description: dict[str, Any], *, input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The network of a description, fitted to the data's input shape and number of classes.

    Raises ConfigError for a target outside the allowed prefixes or one that is no network, and for unknown keys.
    """
    arguments = {key: value for key, value in description.items() if key != "_target_"}
    target = description.get("_target_")
    if not isinstance(target, str) or not target.startswith(ALLOWED_PREFIXES):
        raise ConfigError(
            f"a model's _target_ is {target!r}; expected a class under {', '.join(ALLOWED_PREFIXES)} "
            "(add a prefix in Python with research.models.build.allow_prefix)"
        )
    network_class = locate(target)
    if not (inspect.isclass(network_class) and issubclass(network_class, nn.Module)):
        raise ConfigError(f"a model's _target_ is {target!r}, which is not a torch.nn.Module class")
    parameters = inspect.signature(network_class).parameters
    for key in arguments:
        if key not in parameters:
            close = difflib.get_close_matches(key, parameters, n=1)
            hint = f"; nearest valid: {close[0]}" if close else ""
            raise ConfigError(f"unknown key model.{key} for {target}{hint}. Valid keys: {', '.join(parameters)}")
    facts = {"input_shape": tuple(input_shape), "num_classes": num_classes}
    arguments |= {key: value for key, value in facts.items() if key in parameters}
    return network_class(**arguments)


def describe(description: dict[str, Any], *, input_shape: Sequence[int], num_classes: int) -> dict[str, Any]:
    """What a folder or checkpoint stores so that :func:`rebuild` needs nothing else."""
    return {"network": dict(description), "input_shape": list(input_shape), "num_classes": num_classes}


def rebuild(architecture: dict[str, Any]) -> nn.Module:
    """The network, untrained, of a stored architecture; raises ConfigError where it does not have the three fields."""
    try:
        network, shape, classes = (architecture[key] for key in ("network", "input_shape", "num_classes"))
    except KeyError as error:
        raise ConfigError(f"a stored architecture lacks {error}; expected network, input_shape, num_classes") from None
    return build_network(network, input_shape=shape, num_classes=classes)
