"""Image classifiers from a Hugging Face folder, as networks from this project's inputs to logits [B, V].

Only local code and safetensors are used: remote code is never run.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

from torch import Tensor, nn

from research.errors import CheckpointError
from research.models.classifiers import image_shape


class HuggingFaceClassifier(nn.Module):
    """`AutoModelForImageClassification` behind the call `network(inputs) -> logits`.

    folder       written by `save_pretrained`: config.json and safetensors weights
    input_shape  shape of one input of the data; flat square images are unflattened, one channel is repeated
                 where the model expects several
    """

    def __init__(self, folder: str | Path, *, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        from transformers import AutoModelForImageClassification

        try:
            self.model = AutoModelForImageClassification.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is not an image classifier that transformers can load: {error}") from None
        config = self.model.config
        if config.num_labels != num_classes:
            raise CheckpointError(f"{folder} predicts {config.num_labels} classes, the data have {num_classes}")
        self.image_shape = image_shape(input_shape)
        self.channels = int(getattr(config, "num_channels", self.image_shape[0]))
        if self.image_shape[0] not in (1, self.channels):
            raise CheckpointError(f"{folder} expects {self.channels} channels, the data have {self.image_shape[0]}")
        size = getattr(config, "image_size", None)
        if isinstance(size, int) and size != self.image_shape[1]:
            raise CheckpointError(
                f"{folder} expects images of {size}x{size}, the data have {self.image_shape[1:]} "
                f"({prod(input_shape)} inputs)"
            )

    def forward(self, inputs: Tensor) -> Tensor:
        pixels = inputs.reshape(-1, *self.image_shape).expand(-1, self.channels, -1, -1)
        return self.model(pixel_values=pixels).logits
