"""From a plain description to a network: the same route for configs, run folders and checkpoints.

A description is data, wherever it comes from: `_target_` is imported only under the allowed prefixes, and every other
key must be a parameter of that class. What only the data know, the facts, is added late and stored beside it.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from research.arguments import check_names, check_types, locate_target, missing_arguments
from research.errors import ConfigError

ALLOWED_PREFIXES: tuple[str, ...] = ("research.models.", "torch.nn.")
CLASS_FACTS = ("input_shape", "num_classes")
TEXT_FACTS = ("vocab_size", "eos_token_id", "pad_token_id", "tokenizer_sha256")


class DataFacts(TypedDict, total=False):
    """What only the data know of a network; either the two of classification or the four of text.

    input_shape       shape of one input
    num_classes       classes to tell apart
    vocab_size        tokens of the tokenizer
    eos_token_id      id of the token that ends a document, or several
    pad_token_id      id that fills rows up; may be an EOS
    tokenizer_sha256  fingerprint of the tokenizer: stored, and compared where a network comes with one
    """

    input_shape: Sequence[int]
    num_classes: int
    vocab_size: int
    eos_token_id: int | Sequence[int]
    pad_token_id: int
    tokenizer_sha256: str | None


def allow_prefix(prefix: str) -> None:
    """Let descriptions name classes under one more import prefix, such as "my_package.models."."""
    global ALLOWED_PREFIXES
    if prefix not in ALLOWED_PREFIXES:
        ALLOWED_PREFIXES = (*ALLOWED_PREFIXES, prefix)


def build_network(description: Mapping[str, Any], *, key: str = "model", **facts: Unpack[DataFacts]) -> nn.Module:
    """The network of a description, fitted to the facts of the data; it is given those that its class asks for.

    Raises ConfigError, naming `key`, for a target that is no network defined under the allowed prefixes, and for keys
    that are unknown, missing, of another type, or the data's to set.
    """
    network_class = _network_class(description.get("_target_"), key)
    arguments = {name: value for name, value in description.items() if name != "_target_"}
    parameters = inspect.signature(network_class).parameters
    check_names(network_class, str(description["_target_"]), key, arguments)
    told = stored_facts(facts)
    if "input_shape" in told:
        told["input_shape"] = tuple(told["input_shape"])
    for name in arguments.keys() & {*CLASS_FACTS, *TEXT_FACTS}:
        raise ConfigError(f"{key}.{name} is set by the data, which have {told.get(name)!r}; leave it out")
    check_types(network_class, key, arguments)
    arguments |= {name: fact for name, fact in told.items() if name in parameters}
    for name in missing_arguments(network_class, arguments):
        _refuse_missing(name, key, network_class.__name__, told)
    return network_class(**arguments)


def _refuse_missing(name: str, key: str, network: str, facts: Mapping[str, Any]) -> None:
    if name in CLASS_FACTS or name in TEXT_FACTS:
        kind, given = ("classes", "text") if name in CLASS_FACTS else ("text", "classes")
        raise ConfigError(
            f"{key} is a {network}, which is for {kind} and needs {name}; these data are {given} "
            f"({', '.join(facts) or 'nothing is known of them'}); choose another model or other data"
        )
    raise ConfigError(f"{key}.{name} is not set; {network} needs it")


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


def describe(description: Mapping[str, Any], **facts: Unpack[DataFacts]) -> dict[str, Any]:
    """What a folder or checkpoint stores so that :func:`rebuild` needs nothing else."""
    return {"network": dict(description), **stored_facts(facts)}


def stored_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON holds them, in a fixed order; raises ConfigError for names that are no facts."""
    known = (*CLASS_FACTS, *TEXT_FACTS)
    if unknown := sorted(facts.keys() - set(known)):
        raise ConfigError(f"{', '.join(unknown)}: no fact of the data; expected some of {', '.join(known)}")
    return {
        name: list(facts[name]) if isinstance(facts[name], list | tuple | torch.Size) else facts[name]
        for name in known
        if name in facts
    }


def facts_of(architecture: Mapping[str, Any]) -> DataFacts:
    """The facts that a stored architecture was built with; raises ConfigError where they are damaged.

    Either both facts of classification or, of text, all but a fingerprint that was not known.
    """
    told = {name: architecture[name] for name in (*CLASS_FACTS, *TEXT_FACTS) if name in architecture}
    complete = any(all(name in told for name in needed) for needed in (CLASS_FACTS, TEXT_FACTS[:3]))
    if not complete:
        raise _damaged("facts of the data are missing")
    return DataFacts(**told)  # type: ignore[typeddict-item]


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """The network, untrained, of a stored architecture; raises ConfigError where its fields are not all there."""
    try:
        description, facts = dict(architecture["network"]), facts_of(architecture)
    except (KeyError, TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else _damaged(error) from None
    with torch.random.fork_rng(devices=[]):  # stored weights follow: a run's random numbers are not for its teachers
        return build_network(description, **facts)


def _damaged(reason: object) -> ConfigError:
    return ConfigError(
        f"a stored architecture is damaged ({reason}); expected network with {' and '.join(CLASS_FACTS)}, "
        f"or with {', '.join(TEXT_FACTS[:3])}"
    )
