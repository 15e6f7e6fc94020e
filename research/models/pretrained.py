"""Image classifiers from a Hugging Face folder, as networks from this project's inputs to logits [B, V].

Only local code and safetensors are used: remote code is never run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from research.errors import CheckpointError
from research.models.classifiers import image_shape

PREPROCESSOR_FILE = "preprocessor_config.json"


class HuggingFaceClassifier(nn.Module):
    """`AutoModelForImageClassification` behind the call `network(inputs) -> logits`, in float32.

    folder       written by `save_pretrained`: config.json, safetensors weights and, where the model's inputs are
                 rescaled or normalised, preprocessor_config.json, whose factor, mean and deviation are applied here
    input_shape  shape of one input of the data, pixels in 0..1; flat square images are unflattened, one channel is
                 repeated where the model expects several

    Raises CheckpointError where the folder cannot be loaded, lacks weights that the classifier needs, or is for other
    classes, channels or image sizes.
    """

    pixel_factor: Tensor
    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(self, folder: str | Path, *, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        model = _load(folder)
        self.model, config = model, model.config
        if config.num_labels != num_classes:
            raise CheckpointError(f"{folder} predicts {config.num_labels} classes, the data have {num_classes}")
        self.image_shape = image_shape(input_shape)
        self.channels = int(getattr(config, "num_channels", self.image_shape[0]))
        if self.image_shape[0] not in (1, self.channels):
            raise CheckpointError(f"{folder} expects {self.channels} channels, the data have {self.image_shape[0]}")
        expected = _image_size(config)
        if expected is not None and expected != self.image_shape[1:]:
            raise CheckpointError(f"{folder} expects images of {expected}, the data have {self.image_shape[1:]}")
        factor, mean, deviation = _preprocessing(Path(folder))
        self.register_buffer("pixel_factor", self._per_channel(factor))
        self.register_buffer("pixel_mean", self._per_channel(mean))
        self.register_buffer("pixel_deviation", self._per_channel(deviation))

    def forward(self, inputs: Tensor) -> Tensor:
        pixels = inputs.reshape(-1, *self.image_shape).expand(-1, self.channels, -1, -1)
        normalised = (pixels * self.pixel_factor - self.pixel_mean) / self.pixel_deviation
        return self.model(pixel_values=normalised).logits

    def _per_channel(self, values: float | Sequence[float]) -> Tensor:
        tensor = torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
        if len(tensor) not in (1, self.channels):
            raise CheckpointError(f"{PREPROCESSOR_FILE} is of {len(tensor)} channels, the model of {self.channels}")
        return tensor


def _load(folder: str | Path) -> Any:
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):  # it draws initial weights before it reads the trained ones
            model, report = AutoModelForImageClassification.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is not an image classifier that transformers can load: {error}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its tensors ({', '.join(missing[:3])}), which would be random; "
            "give the folder of a trained image classifier"
        )
    return model


def _image_size(config: Any) -> tuple[int, int] | None:
    """(height, width) that the model is built for, or None where any size will do."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else None


def _preprocessing(folder: Path) -> tuple[float, Any, Any]:
    """Factor, mean and deviation, one number or one for each channel: the model sees (inputs * factor - mean) / dev."""
    path = folder / PREPROCESSOR_FILE
    try:
        options = json.loads(path.read_text()) if path.exists() else {}
        factor = 255 * options.get("rescale_factor", 1 / 255) if options.get("do_rescale", False) else 1.0
        if not options.get("do_normalize", False):
            return factor, 0.0, 1.0
        return factor, options["image_mean"], options["image_std"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save the model's processor again") from None
