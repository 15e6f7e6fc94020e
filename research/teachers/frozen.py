"""A trained network as a teacher: in eval mode, without gradient, its weights checked against their hash."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from research.errors import ConfigError
from research.losses.projection import project
from research.models.flops import BatchFlops, flops_per_row
from research.models.language import AbstractLanguageModel
from research.models.weights import refuse_zero_weights, weights_sha256
from research.records import Batch, DenseLogits, HiddenProjection, TokenBatch
from research.teachers.base import AbstractTeacher, TeacherIdentity


@dataclass(frozen=True)
class LoadedNetwork:
    """A network read from disk with what is known of it; made by `research.teachers.load.load_network`.

    input_shape  shape of one input; None for a language model, whose documents have any length
    num_classes  classes, or the tokens of the vocabulary
    """

    network: nn.Module
    input_shape: tuple[int, ...] | None
    num_classes: int
    source: str
    training_flops: float | None = None
    training_tokens: float | None = None
    training_seconds: float | None = None


class FrozenTeacher(AbstractTeacher):
    """`DenseLogits` from a network that this class alone holds, or what makes them.

    signal  dense: every logit, in float32; hidden: the last hidden states and the output head of a language model, in
            its own precision, for a loss that never writes all logits out. Equal but for rounding; in the counts of
            FLOPs the head is the teacher's either way

    The network is switched to eval mode and stripped of gradients once; its hash is taken at construction, so a
    record names exactly the weights that taught. It runs in its own precision, whatever the student trains in, so that
    its signal is the one that a cache of it holds.
    """

    def __init__(self, loaded: LoadedNetwork, signal: Literal["dense", "hidden"] = "dense") -> None:
        if signal not in ("dense", "hidden"):
            raise ConfigError(f"teacher.signal is {signal!r}; expected dense or hidden")
        if signal == "hidden" and not isinstance(loaded.network, AbstractLanguageModel):
            raise ConfigError(
                f"teacher.signal is hidden, and {loaded.source} is a {type(loaded.network).__name__}; hidden states "
                "are given by language models, use signal=dense"
            )
        self.gives_hidden = signal == "hidden"
        self.max_positions = getattr(loaded.network, "max_positions", None)
        refuse_zero_weights(loaded.network, loaded.source)
        self._network = loaded.network.eval().requires_grad_(False)
        self._input_shape = loaded.input_shape
        self.num_classes = loaded.num_classes
        self._flops = BatchFlops(self._network, backward=False)
        self.identity = TeacherIdentity(
            kind="frozen",
            sha256=weights_sha256(loaded.network),
            source=loaded.source,
            details={},
            training_flops=loaded.training_flops,
            training_tokens=loaded.training_tokens,
            training_seconds=loaded.training_seconds,
        )

    @property
    def network(self) -> nn.Module:
        """The network itself, in eval mode and without gradients, for whoever has it write."""
        return self._network

    @property
    def is_language_model(self) -> bool:
        """Whether its rows are documents of any length."""
        return self._input_shape is None

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseLogits | HiddenProjection:
        inputs = batch.network_inputs()
        with torch.autocast(inputs[0].device.type, enabled=False):
            if self.gives_hidden:
                return self._network.hidden_projection(*inputs)  # type: ignore[operator]
            return DenseLogits(self._network(*inputs).float())

    @torch.no_grad()
    def signal_at(self, batch: TokenBatch, place_BT: Tensor) -> DenseLogits | HiddenProjection:
        """The same; where a language model can, its last layer and head run at those places alone.

        :meth:`flops_of` counts them everywhere, as for a teacher that cannot.
        """
        inputs = batch.network_inputs()
        with torch.autocast(inputs[0].device.type, enabled=False):
            if not (self.is_language_model and self._network.reads_places(*inputs)):  # type: ignore[operator]
                return self.signal(batch).at(place_BT)
            hidden = self._network.hidden_projection_at(batch.ids_BT, batch.position_BT, place_BT)  # type: ignore[operator]
            return hidden if self.gives_hidden else DenseLogits(project(hidden).float())

    def to(self, device: torch.device | str) -> "FrozenTeacher":
        self._network.to(device)
        return self

    def flops_per_row(self) -> float:
        """Of a classifier; a language model's depend on the length of a row, see :meth:`flops_of`."""
        if self._input_shape is None:
            raise TypeError(f"{self.identity.source} is a language model: its FLOPs are those of a batch, flops_of")
        return flops_per_row(self._network, self._input_shape, backward=False)

    def flops_of(self, batch: Batch) -> float:
        return self._flops.of(batch)

    def summary(self) -> dict[str, Any]:
        return {"parameters": sum(parameter.numel() for parameter in self._network.parameters())}
