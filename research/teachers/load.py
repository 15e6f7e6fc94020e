"""Teachers by name, as the `teacher` config group builds them, and networks read from wherever they were left.

A path may be a run folder of `distill train`, its `student` folder, a Lightning checkpoint, or a Hugging Face folder.
"""

import json
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from research.errors import CheckpointError, ConfigError
from research.models.build import rebuild
from research.models.weights import ARCHITECTURE_FILE, WEIGHTS_FILE, check_state, load_weights, read_architecture
from research.teachers.cache import CachedTeacher
from research.teachers.ensemble import EnsembleTeacher
from research.teachers.frozen import FrozenTeacher, LoadedNetwork

NETWORK_FOLDER = "student"
CHECKPOINT_SUFFIXES = (".ckpt",)


def load_network(path: str | Path, *, input_shape: Sequence[int], num_classes: int) -> LoadedNetwork:
    """Read a trained network that fits inputs of `input_shape` and predicts `num_classes`.

    Raises CheckpointError naming the path where nothing can be read there, or where the network does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"no file or folder {path}; give a run folder, a .ckpt file or a Hugging Face folder, "
            f"or train one into it: distill train experiment=NAME hydra.run.dir={path}"
        )
    if path.suffix in CHECKPOINT_SUFFIXES:
        loaded = _from_checkpoint(path)
    elif (path / NETWORK_FOLDER / ARCHITECTURE_FILE).exists():
        loaded = _from_folder(path / NETWORK_FOLDER, _training_flops(path / "run.json"))
    elif (path / ARCHITECTURE_FILE).exists():
        loaded = _from_folder(path, _training_flops(path.parent / "run.json"))
    elif (path / "config.json").exists():
        loaded = _from_hugging_face(path, input_shape, num_classes)
    else:
        raise CheckpointError(
            f"{path} holds no network: expected {NETWORK_FOLDER}/{ARCHITECTURE_FILE} (a finished run), "
            f"{ARCHITECTURE_FILE} with {WEIGHTS_FILE}, or a Hugging Face config.json"
        )
    if loaded.num_classes != num_classes:
        raise CheckpointError(
            f"{path} predicts {loaded.num_classes} classes, the data have {num_classes}; "
            "teacher and student must share them"
        )
    if tuple(loaded.input_shape) != tuple(input_shape):
        raise CheckpointError(f"{path} takes inputs of shape {loaded.input_shape}, the data have {tuple(input_shape)}")
    return loaded


def frozen(path: str | None, *, input_shape: Sequence[int], num_classes: int) -> FrozenTeacher:
    """`teacher=frozen teacher.path=...`: one network, scored live."""
    return FrozenTeacher(load_network(_given(path), input_shape=input_shape, num_classes=num_classes))


def ensemble(
    paths: Sequence[str],
    *,
    input_shape: Sequence[int],
    num_classes: int,
    mean: str = "arithmetic",
    temperature: float = 1.0,
    streamed: bool = True,
) -> EnsembleTeacher:
    """`teacher=ensemble teacher.paths=[a,b,...]`: the mean of several networks."""
    loaders = [partial(load_network, path, input_shape=input_shape, num_classes=num_classes) for path in paths or []]
    return EnsembleTeacher(loaders, mean=mean, temperature=temperature, streamed=streamed)


def cached(
    path: str | None, *, input_shape: Sequence[int], num_classes: int, teacher_sha256: str | None = None
) -> CachedTeacher:
    """`teacher=cached teacher.path=...`: signals written by `distill cache`; `teacher_sha256` pins whose."""
    teacher = CachedTeacher(Path(_given(path)), expected_teacher_sha256=teacher_sha256)
    if teacher.num_classes != num_classes:
        raise CheckpointError(f"the cache {path} holds {teacher.num_classes} classes, the data have {num_classes}")
    return teacher


def _given(path: str | None) -> str:
    if not path:
        raise ConfigError(
            "teacher.path is not set; give the folder of a finished run, a cache, or a Hugging Face folder"
        )
    return str(path)


def _from_folder(folder: Path, training_flops: float | None) -> LoadedNetwork:
    architecture = read_architecture(folder)
    network = rebuild(architecture)
    load_weights(network, folder, architecture.get("sha256"))
    return LoadedNetwork(
        network, tuple(architecture["input_shape"]), int(architecture["num_classes"]), str(folder), training_flops
    )


def _from_checkpoint(path: Path) -> LoadedNetwork:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        architecture, named = json.loads(checkpoint["architecture"]), dict(checkpoint["state_dict"])
    except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path} ({type(error).__name__}); expected a checkpoint written by `distill train`, "
            "which holds plain tensors and its architecture"
        ) from None
    network = rebuild(architecture)
    state = {name.removeprefix("student."): tensor for name, tensor in named.items()}
    check_state(network, state, str(path))
    network.load_state_dict(state)
    return LoadedNetwork(network, tuple(architecture["input_shape"]), int(architecture["num_classes"]), str(path))


def _from_hugging_face(path: Path, input_shape: Sequence[int], num_classes: int) -> LoadedNetwork:
    from research.models.pretrained import HuggingFaceClassifier

    network = HuggingFaceClassifier(path, input_shape=input_shape, num_classes=num_classes)
    return LoadedNetwork(network, tuple(input_shape), num_classes, str(path))


def _training_flops(record: Path) -> float | None:
    """FLOPs of the student updates in a run record, None where there is no record or it does not say."""
    try:
        return json.loads(record.read_text())["ledger"]["student_update"]["flops"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
