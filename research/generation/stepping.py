"""One more token of every row of a rotary decoder, by plain tensor calls over its own weights and a cache with room.

A forward pass of the library for one token makes masks, copies every layer's cache to lengthen it, and goes through a
dozen modules and wrappers a layer; in a small model that takes as long as the products do. Here is what that pass does,
in its order, and nothing around it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

FAMILIES = ("Llama", "Qwen2", "Qwen3")
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
LIBRARY = "transformers."
GENERAL = {nn.Embedding, nn.Linear, nn.ModuleList}
ACTIVATION = "SiLUActivation"
LENGTH_CHANGES_ROTATION = ("dynamic", "longrope")
LEAST_ROOM = 32


def can_step(model: Any, device: torch.device) -> bool:
    """Whether :class:`RotaryStepper` does for ``model`` what its own forward pass does.

    Every module has to be one that the library builds for these families: no adapter, no quantised or sharded part, no
    other ``forward``, and no hook, which would not be called. All layers attend to everything before. Under autocast
    the library's own pass is asked, so that the model is sampled in the precision that it is trained in.
    """
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in FAMILIES or torch.is_autocast_enabled(device.type) or getattr(model, "tp_size", None) is not None:
        return False
    config = model.config
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    if config.rope_parameters["rope_type"] in LENGTH_CHANGES_ROTATION:
        return False
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return False
    return all(_is_plain(module, family) for module in model.modules())


def _is_plain(module: nn.Module, family: str) -> bool:
    kind = type(module)
    if kind not in GENERAL:
        known = kind.__name__ == ACTIVATION or kind.__name__ in [family + part for part in PARTS]
        if not known or not kind.__module__.startswith(LIBRARY):
            return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


Matrix = tuple[Tensor, Tensor | None]  # weight [out, in] and bias
Norm = tuple[Tensor, float]  # gain and epsilon


@dataclass(slots=True)
class Layer:
    """One layer's weights as they are now, and its keys and values [B, heads, places, D].

    The places behind those written hold nothing. A module's attributes take longer to look up than to read here.
    """

    before: Norm
    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    after: Norm
    gate: Matrix
    up: Matrix
    down: Matrix
    query_norm: Norm | None
    key_norm: Norm | None
    key_BHTD: Tensor
    value_BHTD: Tensor

    @classmethod
    def of(cls, layer: Any, cache: Any) -> "Layer":
        attention, mlp = layer.self_attn, layer.mlp
        has_norms = hasattr(attention, "q_norm")
        return cls(
            before=_norm(layer.input_layernorm),
            query=_matrix(attention.q_proj),
            key=_matrix(attention.k_proj),
            value=_matrix(attention.v_proj),
            out=_matrix(attention.o_proj),
            after=_norm(layer.post_attention_layernorm),
            gate=_matrix(mlp.gate_proj),
            up=_matrix(mlp.up_proj),
            down=_matrix(mlp.down_proj),
            query_norm=_norm(attention.q_norm) if has_norms else None,
            key_norm=_norm(attention.k_norm) if has_norms else None,
            key_BHTD=cache.keys,
            value_BHTD=cache.values,
        )

    def write(self, place: int, key_BHD: Tensor, value_BHD: Tensor) -> None:
        """At ``place``, the first that is free; where there is none, room for a quarter more is made."""
        if self.key_BHTD.shape[2] == place:
            self.key_BHTD, self.value_BHTD = _longer(self.key_BHTD), _longer(self.value_BHTD)
        self.key_BHTD.select(2, place).copy_(key_BHD)
        self.value_BHTD.select(2, place).copy_(value_BHD)

    def select(self, place_B: Tensor) -> None:
        """Keep these rows, in this order."""
        self.key_BHTD, self.value_BHTD = self.key_BHTD[place_B], self.value_BHTD[place_B]


class RotaryStepper:
    """The rows of a batch behind their prompts, for a model that :func:`can_step`.

    model       in eval mode; its weights are read once, here
    cache       the library's cache of the prompts, whose keys and values are taken over
    visible_BT  bool, at least as long as the rows will grow: which places may be attended to; None: all
    capacity    most tokens that will be fed
    """

    @torch.inference_mode()
    def __init__(self, model: Any, cache: Any, visible_BT: Tensor | None, capacity: int) -> None:
        decoder = model.model
        self._visible_BT, self._length = visible_BT, int(cache.get_seq_length())
        self._layers = [Layer.of(*pair) for pair in zip(decoder.layers, cache.layers, strict=True)]
        self._embedding_VC = decoder.embed_tokens.weight
        self._norm, self._head = _norm(decoder.norm), _matrix(model.lm_head)
        self._head_width, self._scale = decoder.layers[0].self_attn.head_dim, decoder.layers[0].self_attn.scaling
        place_1T = torch.arange(self._length + capacity, device=self._embedding_VC.device)[None]
        cos_1TD, sin_1TD = decoder.rotary_emb(self._embedding_VC[:1], place_1T)
        half = self._head_width // 2
        self._cos_TD, self._signed_sin_TD = cos_1TD[0], torch.cat([-sin_1TD[0, :, :half], sin_1TD[0, :, half:]], -1)

    @torch.inference_mode()
    def feed(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        """Logits [B, V] of what follows ``token_B``, which stands at ``position_B`` of its document."""
        turn_B1D = self._cos_TD[position_B][:, None], self._signed_sin_TD[position_B][:, None]
        seen_B11T = None if self._visible_BT is None else self._visible_BT[:, None, None, : self._length + 1]
        hidden_BC = F.embedding(token_B, self._embedding_VC)
        for layer in self._layers:
            hidden_BC = hidden_BC + self._attend(layer, _normed(hidden_BC, *layer.before), turn_B1D, seen_B11T)
            normed_BC = _normed(hidden_BC, *layer.after)
            gated_BC = F.silu(F.linear(normed_BC, *layer.gate), inplace=True).mul_(F.linear(normed_BC, *layer.up))
            hidden_BC = hidden_BC + F.linear(gated_BC, *layer.down)
        self._length += 1
        return F.linear(_normed(hidden_BC, *self._norm), *self._head)

    @torch.inference_mode()
    def select(self, place_B: Tensor) -> None:
        """Go on with these rows, in this order."""
        for layer in self._layers:
            layer.select(place_B)
        if self._visible_BT is not None:
            self._visible_BT = self._visible_BT[place_B]

    def _attend(
        self, layer: Layer, hidden_BC: Tensor, turn_B1D: tuple[Tensor, Tensor], seen_B11T: Tensor | None
    ) -> Tensor:
        rows, width = hidden_BC.shape[0], self._head_width
        query_BHD = F.linear(hidden_BC, *layer.query).view(rows, -1, width)
        key_BHD = F.linear(hidden_BC, *layer.key).view(rows, -1, width)
        if layer.query_norm is not None and layer.key_norm is not None:
            query_BHD, key_BHD = _normed(query_BHD, *layer.query_norm), _normed(key_BHD, *layer.key_norm)
        value_BHD = F.linear(hidden_BC, *layer.value).view(rows, -1, width)
        layer.write(self._length, _turned(key_BHD, *turn_B1D), value_BHD)
        # the query heads of one key head stand beside each other: they attend as if they were places of one sequence
        mixed_BHGD = F.scaled_dot_product_attention(
            _turned(query_BHD, *turn_B1D).view(rows, key_BHD.shape[1], -1, width),
            layer.key_BHTD[:, :, : self._length + 1],
            layer.value_BHTD[:, :, : self._length + 1],
            attn_mask=seen_B11T,
            scale=self._scale,
        )
        return F.linear(mixed_BHGD.reshape(rows, -1), *layer.out)


def _matrix(linear: Any) -> Matrix:
    return linear.weight, linear.bias


def _norm(norm: Any) -> Norm:
    return norm.weight, norm.variance_epsilon


def _normed(input: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """In float32 up to the gain, as the library's norms are; torch's own norm goes on in the input's precision."""
    if input.dtype == gain.dtype == torch.float32:
        return F.rms_norm(input, gain.shape, gain, epsilon)
    wide = input.float()
    inverse_root = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return gain * (wide * inverse_root).to(input.dtype)


def _turned(heads_BHD: Tensor, cos_B1D: Tensor, signed_sin_B1D: Tensor) -> Tensor:
    """Each pair (x_i, x_{i + D/2}) rotated by the angle of its place."""
    swapped_BHD = heads_BHD.roll(heads_BHD.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads_BHD * cos_B1D, swapped_BHD, signed_sin_B1D)


def _longer(kept_BHTD: Tensor) -> Tensor:
    rows, heads, places, width = kept_BHTD.shape
    grown_BHTD = kept_BHTD.new_empty(rows, heads, places + max(LEAST_ROOM, places // 4), width)
    grown_BHTD[:, :, :places] = kept_BHTD
    return grown_BHTD
