"""A trained network on disk: `architecture.json` beside `model.safetensors`, and the hash that names it.

The hash of the weights is the network's identity everywhere: in run records, in cache manifests, and as the check that
what is loaded is what was saved.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from research.errors import CheckpointError

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "model.safetensors"


def weights_sha256(module: nn.Module) -> str:
    """Hex sha256 over the names, dtypes, shapes and bytes of the state dict, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_network(folder: Path, module: nn.Module, architecture: dict[str, Any], *, half: bool = False) -> str:
    """Write a network and the plain description it is rebuilt from; returns the weights' sha256.

    half  round floating-point weights to float16, which halves the file; the hash is that of the rounded weights as
          they are loaded back, in their own dtype
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    if half:
        module = copy.deepcopy(module)
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
        module.load_state_dict(tensors)
    sha256 = weights_sha256(module)
    (folder / WEIGHTS_FILE).write_bytes(save(tensors))  # cloned: the format refuses tensors that share memory
    (folder / ARCHITECTURE_FILE).write_text(json.dumps({**architecture, "sha256": sha256}, indent=2) + "\n")
    return sha256


def read_architecture(folder: Path) -> dict[str, Any]:
    """The plain description in a network folder. Raises CheckpointError where it is missing or not JSON."""
    path = folder / ARCHITECTURE_FILE
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"no {ARCHITECTURE_FILE} in {folder}; expected a folder of `distill train`") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); train or copy it again") from None


def load_weights(module: nn.Module, folder: Path, expected_sha256: str | None) -> None:
    """Load `model.safetensors` into `module`; refuses other shapes, another hash, and weights that are all zero."""
    path = folder / WEIGHTS_FILE
    try:
        state = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from None
    check_state(module, state, str(path))
    module.load_state_dict(state)
    refuse_zero_weights(module, str(path))
    if expected_sha256 is not None and weights_sha256(module) != expected_sha256:
        raise CheckpointError(
            f"{path} is damaged: its weights do not hash to {expected_sha256[:12]}.., as {ARCHITECTURE_FILE} says; "
            "train or copy it again"
        )


def check_state(module: nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Raise CheckpointError, naming the first differences, where `state` is of another architecture than `module`."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own == given:
        return
    differences = [
        f"{name}: file has {given.get(name, 'nothing')}, network needs {own.get(name, 'nothing')}"
        for name in sorted(own.keys() | given.keys())
        if own.get(name) != given.get(name)
    ]
    raise CheckpointError(
        f"{source} is of another architecture than the configured network ({len(differences)} tensors differ): "
        + "; ".join(differences[:3])
    )


def refuse_zero_weights(module: nn.Module, source: str) -> None:
    """A network whose weight matrices are all zero was never loaded; going on with it would distil nothing.

    Vectors do not count: the scales of a batch normalisation are 1 in a network that was never trained either.
    """
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1] or list(module.parameters())
    if not any(bool(matrix.any()) for matrix in matrices):
        raise CheckpointError(f"{source} holds only zeros; the weights were never trained or not saved")


def is_finite(module: nn.Module) -> bool:
    """Whether every parameter is free of NaN and infinities."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def count_parameters(module: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
