"""Teachers by name, as the `teacher` config group builds them, and networks read from wherever they were left.

A path may be a run folder of `distill train`, its `student` folder, a Lightning checkpoint, or a Hugging Face folder.
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import nn

from research.errors import CheckpointError, ConfigError
from research.models.build import DataFacts, build_network, facts_of, rebuild
from research.models.weights import (
    ARCHITECTURE_FILE,
    WEIGHTS_FILE,
    at_home,
    check_sha256,
    check_state,
    has_own_path,
    load_weights,
    read_architecture,
)
from research.teachers.cache import CachedTeacher
from research.teachers.ensemble import EnsembleTeacher
from research.teachers.frozen import FrozenTeacher, LoadedNetwork
from research.text.hub import TOKENIZER_FILES, holds_tokenizer, hub_folder

NETWORK_FOLDER = "student"
CHECKPOINT_SUFFIXES = (".ckpt",)
BESIDE_UPDATES = ("rollout", "prompt_prefill", "teacher_scoring")  # what training costs beside the student's updates
DTYPES = ("float32", "bfloat16", "float16", "auto")
UNROUNDED = ("float32", "auto")
PRETRAINED = "research.models.pretrained_language.PretrainedLanguageModel"


def load_network(path: str | Path, *, dtype: str = "float32", **facts: Unpack[DataFacts]) -> LoadedNetwork:
    """Read a trained network that fits the facts of the data: inputs and classes, or the tokens of the text.

    path   as this module's first lines say; of text also a hub id such as "Qwen/Qwen2.5-7B-Instruct"
    dtype  of a language model's weights. bfloat16, float16: rounded to it; float32 (the default): a Hugging Face
           folder's in it, a run's as they were trained; auto: as they are stored. A classifier has float32 alone

    Raises CheckpointError naming the path where nothing can be read there, or where the network does not fit, and
    ConfigError for a dtype that it cannot have.
    """
    path = Path(path)
    _check_dtype(dtype, facts)
    if not path.exists():
        fetched = hub_folder(str(path)) if "vocab_size" in facts else None
        if fetched is not None:
            return replace(_from_hugging_face(fetched, facts, dtype), source=str(path))
        raise CheckpointError(
            f"no file or folder {path}; give a run folder, a .ckpt file, a Hugging Face folder or, of text, a hub id, "
            f"or train one into it: distill train experiment=NAME hydra.run.dir={path}"
        )
    if path.suffix in CHECKPOINT_SUFFIXES:
        return _rounded(_from_checkpoint(path, facts), dtype)
    if (path / NETWORK_FOLDER / ARCHITECTURE_FILE).exists():
        return _rounded(_from_folder(path / NETWORK_FOLDER, facts, _training_cost(path / "run.json")), dtype)
    if (path / ARCHITECTURE_FILE).exists():
        return _rounded(_from_folder(path, facts, _training_cost(path.parent / "run.json")), dtype)
    if (path / "config.json").exists():
        return _from_hugging_face(path, facts, dtype)
    raise CheckpointError(
        f"{path} holds no network: expected {NETWORK_FOLDER}/{ARCHITECTURE_FILE} (a finished run), "
        f"{ARCHITECTURE_FILE} with {WEIGHTS_FILE}, or a Hugging Face config.json"
    )


def frozen(
    path: str | None,
    *,
    dtype: str = "float32",
    signal: Literal["dense", "hidden"] = "dense",
    **facts: Unpack[DataFacts],
) -> FrozenTeacher:
    """`teacher=frozen teacher.path=...`: one network, scored live.

    dtype   as in :func:`load_network`
    signal  dense, or a language model's hidden states, see :class:`research.teachers.frozen.FrozenTeacher`
    """
    return FrozenTeacher(load_network(_given(path), dtype=dtype, **facts), signal)


def ensemble(
    paths: Sequence[str],
    *,
    mean: str = "arithmetic",
    temperature: float = 1.0,
    streamed: bool = True,
    **facts: Unpack[DataFacts],
) -> EnsembleTeacher:
    """`teacher=ensemble teacher.paths=[a,b,...]`: the mean of several networks."""
    loaders = [partial(load_network, path, **facts) for path in paths or []]
    return EnsembleTeacher(loaders, mean=mean, temperature=temperature, streamed=streamed)


def cached(path: str | None, *, teacher_sha256: str | None = None, **facts: Unpack[DataFacts]) -> CachedTeacher:
    """`teacher=cached teacher.path=...`: signals written by `distill cache`; `teacher_sha256` pins whose."""
    if "num_classes" not in facts:
        raise ConfigError(
            "teacher=cached holds one signal for each row of a classification split, and these data are text; "
            "choose teacher=frozen"
        )
    teacher = CachedTeacher(Path(_given(path)), expected_teacher_sha256=teacher_sha256)
    if teacher.num_classes != facts["num_classes"]:
        raise CheckpointError(
            f"the cache {path} holds {teacher.num_classes} classes, the data have {facts['num_classes']}"
        )
    return teacher


def _given(path: str | None) -> str:
    if not path:
        raise ConfigError(
            "teacher.path is not set; give the folder of a finished run, a cache, or a Hugging Face folder"
        )
    return str(path)


def _check_dtype(dtype: str, facts: DataFacts) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"teacher.dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if "vocab_size" not in facts and dtype not in UNROUNDED:
        raise ConfigError(f"teacher.dtype is {dtype}, and a classifier runs in float32; leave it out")


def _rounded(loaded: LoadedNetwork, dtype: str) -> LoadedNetwork:
    """Its floating-point parameters in a half precision, where one is asked for; buffers keep theirs."""
    if dtype not in UNROUNDED:
        for parameter in loaded.network.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return loaded


def _from_folder(folder: Path, facts: DataFacts, cost: Mapping[str, float | None]) -> LoadedNetwork:
    architecture = read_architecture(folder)
    _refuse_unfit(folder, facts_of(architecture), facts)
    network = rebuild(at_home(architecture, folder))
    if has_own_path(architecture):
        check_sha256(network, folder, architecture.get("sha256"))
    else:
        load_weights(network, folder, architecture.get("sha256"))
    loaded = _loaded(network, facts_of(architecture), str(folder))
    known: dict[str, Any] = {f"training_{name}": value for name, value in cost.items()}
    return replace(loaded, **known)


def _from_checkpoint(path: Path, facts: DataFacts) -> LoadedNetwork:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        architecture, named = json.loads(checkpoint["architecture"]), dict(checkpoint["state_dict"])
    except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path} ({type(error).__name__}); expected a checkpoint written by `distill train`, "
            "which holds plain tensors and its architecture"
        ) from None
    network = rebuild(architecture)
    _refuse_unfit(path, facts_of(architecture), facts)
    state = {name.removeprefix("student."): tensor for name, tensor in named.items()}
    check_state(network, state, str(path))
    network.load_state_dict(state)
    return _loaded(network, facts_of(architecture), str(path))


def _from_hugging_face(path: Path, facts: DataFacts, dtype: str) -> LoadedNetwork:
    if "vocab_size" not in facts:
        from research.models.pretrained import HuggingFaceClassifier

        shape, classes = facts["input_shape"], facts["num_classes"]
        return _loaded(HuggingFaceClassifier(path, input_shape=shape, num_classes=classes), facts, str(path))
    _refuse_other_tokens(path, facts.get("tokenizer_sha256"))
    description = {"_target_": PRETRAINED, "path": str(path), "dtype": dtype}
    compared = DataFacts(**{**facts, "tokenizer_sha256": None})  # above, and not once more
    return _loaded(build_network(description, key="teacher", **compared), facts, str(path))


def _loaded(network: nn.Module, facts: DataFacts, source: str) -> LoadedNetwork:
    if "vocab_size" in facts:
        return LoadedNetwork(network, None, int(facts["vocab_size"]), source)
    return LoadedNetwork(network, tuple(facts["input_shape"]), int(facts["num_classes"]), source)


def _refuse_unfit(path: Path, own: DataFacts, facts: DataFacts) -> None:
    """Raise CheckpointError where a network was made for other inputs, other classes or other tokens."""
    if ("vocab_size" in own) != ("vocab_size" in facts):
        kinds = ("a language model", "classes") if "vocab_size" in own else ("a classifier", "text")
        raise CheckpointError(f"{path} is {kinds[0]}, the data are {kinds[1]}; give a network for such data")
    if "vocab_size" not in own:
        if own["num_classes"] != facts["num_classes"]:
            raise CheckpointError(
                f"{path} predicts {own['num_classes']} classes, the data have {facts['num_classes']}; "
                "teacher and student must share them"
            )
        if tuple(own["input_shape"]) != tuple(facts["input_shape"]):
            shapes = tuple(own["input_shape"]), tuple(facts["input_shape"])
            raise CheckpointError(f"{path} takes inputs of shape {shapes[0]}, the data have {shapes[1]}")
        return
    if own["vocab_size"] != facts["vocab_size"]:
        raise CheckpointError(
            f"{path} predicts {own['vocab_size']} tokens, the data's tokenizer has {facts['vocab_size']}; "
            "teacher and student must share their tokenizer"
        )
    known, given = own.get("tokenizer_sha256"), facts.get("tokenizer_sha256")
    if known is not None and given is not None and known != given:
        raise _other_tokens(path, known, given)


def _refuse_other_tokens(path: Path, given: str | None) -> None:
    """Compare the tokenizer in a Hugging Face folder with the data's, where that is known."""
    if given is None:
        return
    from research.text.tokenizer import build_tokenizer, tokenizer_sha256

    if not holds_tokenizer(path):
        raise CheckpointError(
            f"{path} holds no tokenizer ({', '.join(TOKENIZER_FILES)}), so nothing says that its ids mean what the "
            "data's mean; save the teacher's tokenizer into the folder"
        )
    own = tokenizer_sha256(build_tokenizer(str(path)))
    if own != given:
        raise _other_tokens(path, own, given)


def _other_tokens(path: Path, own: str, given: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was made for another tokenizer ({own[:12]}..) than the data's ({given[:12]}..): its ids stand for "
        "other text. Give data.tokenizer the teacher's, or a teacher of the same tokenizer"
    )


def _training_cost(record: Path) -> dict[str, float | None]:
    """FLOPs, tokens and seconds that a run record tells of its training: updates, rollouts, its teacher's scoring.

    None where there is no record or it does not say; a part that the record does not have was not done.
    """
    try:
        ledger = json.loads(record.read_text())["ledger"]
        parts = [ledger["student_update"], *(ledger[part] for part in BESIDE_UPDATES if part in ledger)]
        values = {name: [part.get(name) for part in parts] for name in ("flops", "tokens", "seconds")}
        return {name: None if None in given else float(sum(given)) for name, given in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
