"""A trained network on disk: `architecture.json` beside `model.safetensors`, and the hash that names it.

The hash of the weights is the network's identity everywhere: in run records, in cache manifests, and as the check that
what is loaded is what was saved. A language model's folder is a Hugging Face folder as well.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from research.errors import CheckpointError
from research.models.language import AbstractLanguageModel, write_folder

ARCHITECTURE_FILE = "architecture.json"
WEIGHTS_FILE = "model.safetensors"
SHARDS_FILE = f"{WEIGHTS_FILE}.index.json"  # name of each tensor -> the file it is in, where there are several

SELF = "."  # a stored description's `path` where the folder itself holds the model


def weights_sha256(module: nn.Module) -> str:
    """Hex sha256 over the names, dtypes, shapes and bytes of the state dict, in order of name."""
    return _state_sha256(module.state_dict())


def _state_sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_network(folder: Path, module: nn.Module, architecture: dict[str, Any], *, half: bool = False) -> str:
    """Write a network and the plain description it is rebuilt from; returns the weights' sha256.

    A language model leaves as transformers writes it, with config.json, generation_config.json and that library's own
    parameter names, adapters merged: `AutoModelForCausalLM.from_pretrained` loads it without this package. Above
    5 GB its weights are several files and their index.

    half  round floating-point weights to float16, which halves the file; the hash is that of the rounded weights as
          they are loaded back, in their own dtype
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(module, AbstractLanguageModel):
        sha256, architecture = _save_language_model(folder, module, architecture, half)
    else:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
        if half:
            module = copy.deepcopy(module)
            tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
            module.load_state_dict(tensors)
        sha256 = weights_sha256(module)
        (folder / WEIGHTS_FILE).write_bytes(save(tensors))  # cloned: the format refuses tensors that share memory
    (folder / ARCHITECTURE_FILE).write_text(json.dumps({**architecture, "sha256": sha256}, indent=2) + "\n")
    return sha256


def _save_language_model(
    folder: Path, module: AbstractLanguageModel, architecture: dict[str, Any], half: bool
) -> tuple[str, dict[str, Any]]:
    """Write the plain model of transformers; the hash of its weights, and how the folder is described from now on."""
    plain = module.exported()
    state = {f"model.{name}": tensor for name, tensor in plain.state_dict().items()}
    if half:
        state = {n: t.half().to(t.dtype) if t.is_floating_point() else t for n, t in state.items()}
        plain = copy.deepcopy(plain).half()
    write_folder(plain, folder)
    network = dict(architecture.get("network", {}))
    if "path" not in network:
        return _state_sha256(state), architecture
    base = {name: network[name] for name in ("path", "revision") if network.get(name) is not None}
    if Path(base["path"]).exists():
        base["path"] = Path(base["path"]).name  # where it lay on this machine means nothing elsewhere
    kept = {name: value for name, value in network.items() if name != "revision" and not name.startswith("lora_")}
    return _state_sha256(state), {**architecture, "network": {**kept, "path": SELF}, "base": base}


def read_architecture(folder: Path) -> dict[str, Any]:
    """The plain description in a network folder. Raises CheckpointError where it is missing or not JSON."""
    path = folder / ARCHITECTURE_FILE
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"no {ARCHITECTURE_FILE} in {folder}; expected a folder of `distill train`") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); train or copy it again") from None


def has_own_path(architecture: Mapping[str, Any]) -> bool:
    """Whether the stored network is read by transformers from the folder itself, as a pretrained model is."""
    network = architecture.get("network")
    return isinstance(network, Mapping) and network.get("path") == SELF


def at_home(architecture: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A stored architecture whose network, where it is read from its own folder, finds that folder."""
    if not has_own_path(architecture):
        return architecture
    return {**architecture, "network": {**architecture["network"], "path": str(folder)}}


def load_weights(module: nn.Module, folder: Path, expected_sha256: str | None) -> None:
    """Load a folder's weights into `module`; refuses other shapes, another hash, and weights that are all zero."""
    path = folder / WEIGHTS_FILE
    state = _read_weights(folder)
    if isinstance(module, AbstractLanguageModel):
        state = _own_names(module, state)
    check_state(module, state, str(path))
    module.load_state_dict(state)
    refuse_zero_weights(module, str(path))
    check_sha256(module, path, expected_sha256)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of `model.safetensors`, or of the files that `model.safetensors.index.json` names."""
    path, index = folder / WEIGHTS_FILE, folder / SHARDS_FILE
    if path.exists() or not index.exists():
        return _read_file(path)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); train or copy the folder again") from None
    return {name: tensor for file in names for name, tensor in _read_file(folder / Path(str(file)).name).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from None


def check_sha256(module: nn.Module, path: Path, expected_sha256: str | None) -> None:
    """Raise CheckpointError where the weights read from `path` are not those that its architecture file names."""
    if expected_sha256 is not None and weights_sha256(module) != expected_sha256:
        raise CheckpointError(
            f"{path} is damaged: its weights do not hash to {expected_sha256[:12]}.., as {ARCHITECTURE_FILE} says; "
            "train or copy it again"
        )


def _own_names(module: AbstractLanguageModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of transformers under this module's names; what the module does not have keeps its name."""
    names = module.stored_names()
    unknown = {name: tensor for name, tensor in state.items() if name not in names.values()}
    return unknown | {own: state[stored] for own, stored in names.items() if stored in state}


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


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer of transformers beside the weights, so that the folder needs nothing else."""
    tokenizer.save_pretrained(folder)


def write_model_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write README.md: what the model is, how it is loaded, and what its run record says of it.

    record  a run record's fields; of those that are there, `experiment, command, seed, revision, config_hash, student,
            teacher, versions` are told and every number of `metrics` is tabulated
    """
    name = record.get("experiment") or folder.resolve().parent.name
    told = ("command", "seed", "revision", "config_hash", "student", "teacher", "versions")
    facts = [f"* {key}: `{json.dumps(record[key], default=str)}`" for key in told if record.get(key) is not None]
    metrics = [f"| {key} | {value:.6g} |" for key, value in sorted(dict(record.get("metrics") or {}).items())]
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [distillation]", "---", ""),
        *(f"# {name}", "", "A student written by `distill train`. It loads without that package:", "", "```python"),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *("", 'model = AutoModelForCausalLM.from_pretrained("this folder")'),
        *('tokenizer = AutoTokenizer.from_pretrained("this folder")', "```", "", "## Record", "", *facts),
    ]
    if metrics:
        lines += ["", "## Metrics", "", "| metric | value |", "|---|---|", *metrics]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
